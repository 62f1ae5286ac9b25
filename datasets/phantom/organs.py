"""Phantom CT, belly: the 13 labelled organs, their vessels, bowel, bladder and prostate."""

from functools import lru_cache

import numpy as np

from datasets.phantom.atlas import (
    BLADDER,
    CURVES,
    GALLBLADDER,
    KIDNEY_RADII_MM,
    KIDNEYS,
    LIVER_PARTS,
    SPLEEN,
    cavity_distance,
    diaphragm_height,
)
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region, capsule, curve, ellipsoid, ellipsoid_local, noise, smooth_union
from datasets.phantom.trunk import grow_tree

RIGHT_KIDNEY, LEFT_KIDNEY, RIGHT_ADRENAL, LEFT_ADRENAL = 2, 13, 7, 8
NUM_LOOP_KNOTS = 140


def paint_organs(canvas: Canvas, patient: Patient) -> None:
    """Paint everything below the diaphragm and the long vessels; later organs win where two meet."""
    _paint_small_bowel(canvas, patient)
    # Vessels fan out in the fat of the mesentery, the same in all patients.
    canvas.paint_segments(_mesenteric_tree(), patient.hu["portal_vein"])
    _paint_colon(canvas, patient)
    _paint_pelvic_organs(canvas, patient)
    for side, label in ((1, RIGHT_KIDNEY), (-1, LEFT_KIDNEY)):
        _paint_kidney(canvas, patient, side, label)
    _paint_spleen(canvas, patient)
    _paint_liver(canvas, patient)
    _paint_gut(canvas, patient, "stomach", 4.5, 11, "stomach_wall", 0.0, (-55, 60, 140), 36.0, -960.0)
    _paint_pancreas(canvas, patient)
    _paint_gut(canvas, patient, "duodenum", 3.0, 12, "bowel_wall", 61.0, (45, 58, 105), 26.0, -900.0)
    _paint_gallbladder(canvas, patient)
    _paint_adrenals(canvas, patient)
    _paint_vessels(canvas, patient)
    _paint_esophagus(canvas, patient)
    _paint_lesions(canvas, patient)


def _world_y(canvas: Canvas, region: Region) -> np.ndarray:
    """Front-back world mm of a region's voxels, [1, Y, 1]: gas rises along it."""
    return canvas.world_y_mm[region.index[1]][None, :, None]


def _gas_level(patient: Patient, atlas_mm, reach_mm: float) -> float:
    """World y (mm) above which a hollow organ around an atlas point holds gas."""
    middle = patient.deformation.to_world(np.array([atlas_mm], float))[0, 1]
    return middle + reach_mm * (1 - 1.5 * patient.gas)


@lru_cache(maxsize=1)
def _liver_trees() -> tuple:
    """Segments of the portal and of the hepatic venous tree in the atlas."""
    rng = np.random.Generator(np.random.PCG64(7702))
    trees = []
    for roots in (((40, 52, 148), (16, 66, 176)), ((30, 34, 208),)):
        points = rng.uniform((-60, -70, 95), (134, 108, 232), (1500, 3)).astype(np.float32)
        place = Region((), points[:, 0], points[:, 1], points[:, 2])
        inside = points[liver_distance(place) < -9][:64].astype(float)
        near = np.argmin([np.linalg.norm(inside - np.array(root), axis=1) for root in roots], axis=0)
        segments = []
        for k, root in enumerate(roots):
            segments += grow_tree(rng, root, inside[near == k], 1.2, 0.40)
        trees.append(segments)
    trees[0].append((np.array([40.0, 52, 148]), np.array([16.0, 66, 176]), 5.5, 4.5))
    return tuple(trees)


def liver_distance(region: Region) -> np.ndarray:
    """Distance to the liver: lobes joined smoothly, cut by diaphragm, wall, lower border and its neighbours."""
    x, y, z = region.x, region.y, region.z
    distance = smooth_union((ellipsoid(region, centre, radii) for centre, radii in LIVER_PARTS), 18.0)
    wall = cavity_distance(x, y, z) + 3
    dome = (z - diaphragm_height(x, y) + 3) * np.float32(0.85)
    border = (72 + 0.66 * np.maximum(104 - x, 0) + 0.14 * (y - 20) - z) * np.float32(0.8)
    distance = np.maximum(np.maximum(distance, wall), np.maximum(dome, border))
    kidney = 6 - ellipsoid(region, (60, -2, 92), (33, 32, 62))
    spine = 34 - np.sqrt(x * x + np.square(y + 4))
    stomach = 4 - ellipsoid(region, (-72, 36, 176), (42, 52, 50))
    distance = np.maximum(np.maximum(distance, kidney), np.maximum(spine, stomach))
    cleft = np.minimum(3.5 - np.abs(x - 12 + 0.1 * (y - 60)), np.minimum(0.5 * (y - 60), 0.8 * (198 - z)))
    return np.maximum(distance, cleft) + np.float32(1.6) * noise(region, "coarse")


def _paint_liver(canvas: Canvas, patient: Patient) -> None:
    region = canvas.region((-74, -84, 60), (148, 114, 248))
    hu = patient.hu
    distance = liver_distance(region)
    patchy = noise(region, "coarse", patient.noise_offset_mm)
    canvas.paint(region, distance, hu["liver"] + 3 * noise(region, "middle") + 2 * patchy, 1)
    portal, venous = _liver_trees()
    canvas.paint_segments(venous, hu["hepatic_vein"], only_label=1)
    canvas.paint_segments(portal, hu["portal_vein"], only_label=1)


def _paint_spleen(canvas: Canvas, patient: Patient) -> None:
    centre, radii = SPLEEN
    region = canvas.around(centre, np.array(radii) + 6)
    x, y, z = (v - np.float32(c) for v, c in zip((region.x, region.y, region.z), centre))
    y2, z2 = 0.87 * y - 0.5 * z, 0.5 * y + 0.87 * z  # the long axis runs along the tenth rib: back and up
    distance = ellipsoid_local(x, z2, y2, (radii[0], 44.0, 56.0))
    hollow = 4 - ellipsoid(region, (-62, 12, 160), (36, 46, 66))
    wall = cavity_distance(region.x, region.y, region.z) + 4
    dome = (region.z - diaphragm_height(region.x, region.y) + 4) * np.float32(0.85)
    distance = np.maximum(np.maximum(distance, hollow), np.maximum(wall, dome)) + 1.2 * noise(region, "coarse")
    value = patient.hu["spleen"] + 3 * noise(region, "middle")
    if patient.phase == "arterial":  # striped while red and white pulp fill at different speeds
        value = value + 22 * np.sin(noise(region, "coarse") * 3.5 + distance * np.float32(0.5))
    canvas.paint(region, distance, value, 3)


def _paint_kidney(canvas: Canvas, patient: Patient, side: int, label: int) -> None:
    centre = KIDNEYS[side]
    region = canvas.around(centre, (48, 46, 68))
    if region.is_empty:
        return
    hu = patient.hu
    x, y, z = (v - np.float32(c) for v, c in zip((region.x, region.y, region.z), centre))
    x = x * side
    tilt = np.float32(0.22)
    long_axis = z - tilt * x - np.float32(0.14) * y  # upper pole towards the spine and back
    out = x + tilt * z
    ahead = y + np.float32(0.14) * z + np.float32(0.35) * out  # the hilum faces inwards and forwards
    out = out + np.float32(0.0042) * long_axis * long_axis
    canvas.paint(region, ellipsoid_local(out, ahead, long_axis, (41, 40, 66)), np.float32(hu["fat"] - 2), None)
    distance = ellipsoid_local(out, ahead, long_axis, KIDNEY_RADII_MM) + 0.9 * noise(region, "coarse")
    sinus = ellipsoid_local(out + 15, ahead + 1, long_axis, (17, 10, 25)) + 2.0 * noise(region, "middle")
    pyramids = np.cos(long_axis * np.float32(2 * np.pi / 17)) + 0.7 * np.cos(ahead * np.float32(2 * np.pi / 22))
    medulla = np.clip((-distance - 6) * np.float32(0.5), 0, 1) * np.clip(pyramids * 2 + 0.9, 0, 1)
    value = hu["renal_cortex"] + medulla * (hu["renal_medulla"] - hu["renal_cortex"]) + 2 * noise(region, "middle")
    canvas.paint(region, distance, value, label)
    canvas.paint(region, sinus, np.float32(hu["fat"] + 8), 0)
    pelvis = ellipsoid_local(out + 17, ahead, long_axis + 2, (11, 5, 13))
    canvas.paint(region, pelvis, np.float32(hu["urine"]), 0)
    x0, y0, z0 = centre
    ureter = [(x0 - side * 20, y0 + 8, z0 - 8, 3.2), (x0 - side * 20, 28, z0 - 50, 2.6), (side * 40, 46, 20, 2.6)]
    ureter += [(side * 44, 48, -20, 2.6), (side * 46, 20, -80, 2.6), (side * 24, 28, -112, 2.6)]
    canvas.paint_tube(*curve(ureter, 14.0), np.float32(hu["urine"] + 25), None)


def _paint_gut(
    canvas: Canvas, patient: Patient, name: str, wall_mm: float, label: int, wall: str, seed_mm: float,
    gas_around: tuple, gas_reach_mm: float, gas_hu: float,
) -> None:  # fmt: skip
    """Paint a stretch of gut: folded wall, fluid and gas on top of it."""
    region, distance, _ = canvas.tube(*CURVES[name], pad_mm=4)
    own = noise(region, "middle", tuple(o + seed_mm for o in patient.noise_offset_mm))
    distance = distance + 1.2 * noise(region, "coarse")
    if name == "stomach":
        distance = np.maximum(distance, (region.z - diaphragm_height(region.x, region.y) + 4) * np.float32(0.85))
    canvas.paint(region, distance, np.float32(patient.hu[wall]) + 4 * own, label)
    lumen = distance + wall_mm + 1.3 * np.maximum(own, 0)
    content = patient.hu["gut_fluid"] + 8 * own + (220 if patient.oral_contrast else 0)
    canvas.paint(region, lumen, content.astype(np.float32), label)
    gas = np.maximum(lumen + 1, _gas_level(patient, gas_around, gas_reach_mm) - _world_y(canvas, region))
    canvas.paint(region, gas, np.float32(gas_hu), label)


def _paint_pancreas(canvas: Canvas, patient: Patient) -> None:
    region, distance, _ = canvas.tube(*CURVES["pancreas"], pad_mm=5)
    lobules = noise(region, "middle")
    distance = distance + 2.0 * lobules
    value = patient.hu["pancreas"] - 45 * np.clip(lobules - 0.6, 0, 1) + 3 * noise(region, "fine")
    canvas.paint(region, distance, value, 4)
    canvas.paint_tube(CURVES["pancreas"][0][3:], np.full(len(CURVES["pancreas"][0]) - 3, 1.1), np.float32(18.0), None)


def _paint_gallbladder(canvas: Canvas, patient: Patient) -> None:
    region, distance, _ = canvas.tube(*GALLBLADDER, pad_mm=3)
    canvas.paint(region, distance, np.float32(patient.hu["stomach_wall"]), 9)
    canvas.paint(region, distance + 1.6, np.float32(patient.hu["bile"]), 9)
    duct = [(46, 54, 128, 3), (38, 54, 122, 3.2), (34, 56, 100, 3), (42, 52, 86, 2.5)]
    canvas.paint_tube(*curve(duct, 8.0), np.float32(patient.hu["bile"]), None)


_ADRENAL_LIMBS = {
    RIGHT_ADRENAL: (
        ((31, 23, 170), (34, 17, 146), 5.0),
        ((34, 17, 156), (45, 0, 146), 3.7),
        ((32, 18, 160), (34, -6, 150), 3.7),
    ),
    LEFT_ADRENAL: (
        ((-36, 27, 168), (-39, 19, 142), 5.0),
        ((-38, 21, 154), (-56, 5, 142), 3.7),
        ((-38, 21, 156), (-36, 0, 146), 3.7),
    ),
}


def _paint_adrenals(canvas: Canvas, patient: Patient) -> None:
    """Each gland: a body and two limbs that are thin plates standing along the body, like an inverted Y."""
    for label, limbs in _ADRENAL_LIMBS.items():
        corners = np.array([point for start, stop, _ in limbs for point in (start, stop)], float)
        region = canvas.region(corners.min(0) - 12, corners.max(0) + 12)
        parts = (capsule(region, *ends, radius, 0.85 * radius, (1, 1, 0.42))[0] for *ends, radius in limbs)
        canvas.paint(
            region, smooth_union(parts, 2.0), np.float32(patient.hu["adrenal"]) + 4 * noise(region, "fine"), label
        )


def _paint_vessels(canvas: Canvas, patient: Patient) -> None:
    hu = patient.hu
    arteries = ("celiac", "splenic_artery", "hepatic_artery", "mesenteric_artery")
    arteries += ("right_renal_artery", "left_renal_artery", "right_iliac_artery", "left_iliac_artery")
    for name in arteries:
        canvas.paint_tube(*CURVES[name], np.float32(0.95 * hu["aorta"]))
    for name, tissue in (
        ("splenic_vein", "portal_vein"), ("portal_vein", "portal_vein"), ("mesenteric_vein", "portal_vein"),
        ("right_renal_vein", "renal_vein"), ("left_renal_vein", "renal_vein"),
        ("right_iliac_vein", "cava"), ("left_iliac_vein", "cava"),
    ):  # fmt: skip
        canvas.paint_tube(*CURVES[name], np.float32(hu[tissue]))
    region, distance, _ = canvas.tube(*CURVES["cava"], stretch=(0.9, 1.2, 1), pad_mm=2)
    mixing = np.clip((region.z - 90) * np.float32(1 / 30), 0, 1)  # renal blood arrives earlier than the legs'
    value = hu["cava"] + 0.5 * mixing * (hu["renal_vein"] - hu["cava"]) + 3 * noise(region, "middle")
    canvas.paint(region, distance, value, 6)
    region, distance, _ = canvas.tube(*CURVES["aorta"], pad_mm=3)
    canvas.paint(region, distance, np.float32(0.15 * hu["aorta"] + 34), 5)
    canvas.paint(region, distance + 1.2, np.float32(hu["aorta"]), 5)
    plaque = noise(region, "middle", patient.noise_offset_mm) > 2.1
    ring = np.where(plaque, np.abs(distance + 1.5) - 1.5, np.float32(9))
    if patient.bone_hu < 160:  # the old have calcified plaques
        canvas.paint(region, ring, np.float32(600.0), None)


def _paint_esophagus(canvas: Canvas, patient: Patient) -> None:
    region, distance, position = canvas.tube(*CURVES["esophagus"], stretch=(0.85, 1.2, 1), pad_mm=2)
    canvas.paint(region, distance, np.float32(patient.hu["esophagus"]), 10)
    bubbles = 6.6 + 2.4 * noise(region, "middle", patient.noise_offset_mm)
    canvas.paint(region, distance + bubbles, np.float32(-500.0), None, opacity=0.7)


def _paint_colon(canvas: Canvas, patient: Patient) -> None:
    """The colon with pouches; stool with bubbles or fluid, gas on top: contents are the patient's own."""
    region, distance, position = canvas.tube(*CURVES["colon"], pad_mm=6)
    own = noise(region, "middle", patient.noise_offset_mm)
    shape = noise(region, "coarse", patient.noise_offset_mm)
    pouches = np.abs(np.sin(position * np.float32(np.pi / 27) + shape))
    distance = _inside_belly(region, distance + 3.2 * (1 - pouches) + 1.6 * shape)
    canvas.paint(region, distance, np.float32(patient.hu["bowel_wall"] - 10))
    lumen = distance + 2.6
    stool = 30 - 420 * np.clip(own - 0.2 + 0.5 * (patient.stool - 0.5), 0, 1.2)
    canvas.paint(region, lumen, np.where(patient.stool > 0.3, stool, 20 + 6 * own).astype(np.float32))
    level = _gas_level(patient, (0, 84, 60), 34.0) + 12 * np.sin(position * np.float32(1 / 60) + patient.seed % 7)
    canvas.paint(region, np.maximum(lumen + 1, level - _world_y(canvas, region)), np.float32(-960.0))


def _inside_belly(region: Region, distance: np.ndarray) -> np.ndarray:
    """Cut gut where it would press through the belly's wall; the pelvic floor stays open."""
    wall = cavity_distance(region.x, region.y, region.z) + 1.5
    return np.maximum(distance, np.where(region.z > -75, wall, np.float32(-9)))


@lru_cache(maxsize=2)
def _loops(seed: int) -> np.ndarray:
    """Knots of a patient's small bowel: a winding walk between the flexure and the caecum."""
    rng = np.random.Generator(np.random.PCG64(seed))
    low, high = np.array([-88.0, 40, -84]), np.array([84.0, 96, 62])
    points = [np.array([-44.0, 68, 84])]
    heading = np.array([0.3, 0.2, -1.0])
    for step in range(NUM_LOOP_KNOTS):
        part = step / NUM_LOOP_KNOTS
        goal = np.array([-10 + 62 * np.sin(2 * np.pi * 3.5 * part + 3), 68.0, 52 - 128 * part])
        drift = goal - points[-1]
        heading = 0.72 * heading + rng.normal(0, 0.75, 3) * [1.2, 0.6, 1] + 0.009 * drift
        heading /= np.linalg.norm(heading)
        points.append(np.clip(points[-1] + 21 * heading, low, high))
    return np.array(points)


def _paint_small_bowel(canvas: Canvas, patient: Patient) -> None:
    points = _loops(patient.seed)
    radii = 12.0 + 1.6 * np.sin(np.arange(len(points)) * 0.9 + patient.seed % 11)
    region, distance, position = canvas.tube(points, radii, pad_mm=3)
    own = noise(region, "middle", patient.noise_offset_mm)
    folds = np.sin(position * np.float32(2 * np.pi / 8))
    distance = _inside_belly(region, distance)
    canvas.paint(region, distance + 0.8 * own, np.float32(patient.hu["bowel_wall"]))
    content = patient.hu["gut_fluid"] + 12 * own + (250 if patient.oral_contrast else 0)
    lumen = distance + 3 + 1.2 * folds
    canvas.paint(region, lumen, content)
    airy = np.sin(position * np.float32(1 / 45) + patient.seed % 5) > 1.35 - patient.gas
    canvas.paint(region, np.where(airy, lumen + 3 - 2 * own, np.float32(9)), np.float32(-900.0))


@lru_cache(maxsize=1)
def _mesenteric_tree() -> list:
    rng = np.random.Generator(np.random.PCG64(5150))
    targets = rng.uniform((-85, 55, -55), (85, 96, 70), (46, 3))
    return grow_tree(rng, (6, 72, 40), targets, 0.9, 0.32)


def _paint_pelvic_organs(canvas: Canvas, patient: Patient) -> None:
    centre, radii = BLADDER
    region = canvas.around(centre, np.array(radii) + 4)
    distance = ellipsoid(region, centre, radii) + 1.5 * noise(region, "coarse")
    canvas.paint(region, distance, np.float32(patient.hu["muscle"]))
    canvas.paint(region, distance + 3.2, np.float32(patient.hu["urine"]))
    canvas.paint_ellipsoid((0, 22, -146), (22, 16, 18), patient.hu["muscle"] + 4)
    for side in (1, -1):
        canvas.paint_ellipsoid((side * 17, 2, -122), (17, 7, 8), patient.hu["muscle"] - 15)


def _paint_lesions(canvas: Canvas, patient: Patient) -> None:
    """Lesions replace the HU, never the label, and only inside liver and kidneys."""
    for lesion in patient.lesions:
        region = canvas.around(lesion.centre_mm, lesion.radius_mm)
        distance = ellipsoid(region, lesion.centre_mm, (lesion.radius_mm,) * 3)
        kept = np.isin(canvas.label[region.index], (1, RIGHT_KIDNEY, LEFT_KIDNEY))
        canvas.paint(region, np.where(kept, distance, np.float32(9)), np.float32(lesion.hu), None)
