"""Phantom CT, belly: liver, spleen, pancreas, gallbladder, adrenal glands, vessels, bladder, free fluid, lesions."""

from functools import lru_cache

import numpy as np

from datasets.phantom.atlas import (
    BLADDER,
    CURVES,
    GALLBLADDER,
    LIVER_PARTS,
    SPLEEN,
    cavity_distance,
    diaphragm_height,
)
from datasets.phantom.bowel import paint_colon, paint_duodenum, paint_esophagus, paint_small_bowel, paint_stomach
from datasets.phantom.kidneys import LABEL_OF_SIDE, paint_kidneys
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region, capsule, curve, ellipsoid, ellipsoid_local, noise, smooth_union
from datasets.phantom.trunk import grow_tree

LIVER, SPLEEN_LABEL, PANCREAS, AORTA, CAVA, RIGHT_ADRENAL, LEFT_ADRENAL, GALLBLADDER_LABEL = 1, 3, 4, 5, 6, 7, 8, 9
ASCITES_HU = 8.0
CLIP_HU = 2400.0


def paint_organs(canvas: Canvas, patient: Patient) -> None:
    """Paint everything below the diaphragm and the long vessels; later organs win where two meet."""
    if patient.anatomy.ascites:
        _paint_ascites(canvas, patient)
    paint_small_bowel(canvas, patient)
    paint_colon(canvas, patient)
    _paint_pelvic_organs(canvas, patient)
    paint_kidneys(canvas, patient)
    _paint_spleen(canvas, patient)
    _paint_liver(canvas, patient)
    paint_stomach(canvas, patient)
    _paint_pancreas(canvas, patient)
    paint_duodenum(canvas, patient)
    _paint_gallbladder(canvas, patient)
    _paint_adrenals(canvas, patient)
    _paint_vessels(canvas, patient)
    paint_esophagus(canvas, patient)
    _paint_lesions(canvas, patient)


def _paint_ascites(canvas: Canvas, patient: Patient) -> None:
    """Free fluid along the belly's wall, around liver and spleen, and in the pelvis; not behind the peritoneum."""
    region = canvas.region((-150, -60, -130), (150, 130, 240))
    x, y, z = region.x, region.y, region.z
    depth_mm = 34 * patient.anatomy.ascites * (0.6 + 0.4 * np.clip(noise(region, "coarse"), -1, 1))
    wall = cavity_distance(x, y, z)
    rim = np.maximum(wall + 2, -wall - depth_mm)
    pelvis = np.maximum(wall + 2, z + 40 - 50 * np.float32(patient.anatomy.ascites))
    behind = 14 - y - np.float32(0.25) * np.maximum(np.abs(x) - 60, 0)
    fluid = np.maximum(np.minimum(rim, pelvis), np.maximum(behind, z - diaphragm_height(x, y) + 4))
    canvas.paint(region, fluid, np.float32(ASCITES_HU), None)


@lru_cache(maxsize=1)
def _liver_trees(seed: int, shape: str, texture_mm: tuple[float, float, float]) -> tuple:
    """Segments of a patient's portal and hepatic venous tree in the atlas."""
    rng = np.random.Generator(np.random.PCG64([7702, seed]))
    trees = []
    for roots in (((40, 52, 148), (16, 66, 176)), ((30, 34, 208),)):
        points = rng.uniform((-60, -70, 60), (134, 108, 232), (1500, 3)).astype(np.float32)
        place = Region((), points[:, 0], points[:, 1], points[:, 2], texture_mm)
        inside = points[liver_distance(place, shape) < -9][:64].astype(float)
        near = np.argmin([np.linalg.norm(inside - np.array(root), axis=1) for root in roots], axis=0)
        segments = []
        for k, root in enumerate(roots):
            segments += grow_tree(rng, root, inside[near == k], 1.2, 0.40)
        trees.append(segments)
    trees[0].append((np.array([40.0, 52, 148]), np.array([16.0, 66, 176]), 5.5, 4.5))
    return tuple(trees)


# Shape of the liver -> centre and radii of its left part, and the height of its lower border on the right.
_LEFT_PART = {
    "usual": LIVER_PARTS[2],
    "long_left": ((-50, 66, 196), (78, 38, 30)),
    "small_left": ((2, 66, 190), (34, 34, 28)),
    "riedel": LIVER_PARTS[2],
}
_RIGHT_BORDER_MM = {"usual": 72, "long_left": 84, "small_left": 66, "riedel": 18}


def liver_distance(region: Region, shape: str = "usual") -> np.ndarray:
    """Distance to the liver: lobes joined smoothly, cut by diaphragm, wall, lower border and its neighbours."""
    x, y, z = region.x, region.y, region.z
    parts = [*LIVER_PARTS[:2], _LEFT_PART[shape]]
    if shape == "riedel":  # a tongue that hangs down in front of the right colon
        parts.append(((104, 34, 78), (30, 34, 62)))
    distance = smooth_union((ellipsoid(region, centre, radii) for centre, radii in parts), 18.0)
    wall = cavity_distance(x, y, z) + 3
    dome = (z - diaphragm_height(x, y) + 3) * np.float32(0.85)
    border = (_RIGHT_BORDER_MM[shape] + 0.66 * np.maximum(104 - x, 0) + 0.14 * (y - 20) - z) * np.float32(0.8)
    distance = np.maximum(np.maximum(distance, wall), np.maximum(dome, border))
    kidney = 6 - ellipsoid(region, (60, -2, 92), (33, 32, 62))
    spine = 34 - np.sqrt(x * x + np.square(y + 4))
    stomach = 4 - ellipsoid(region, (-72, 36, 176), (42, 52, 50))
    distance = np.maximum(np.maximum(distance, kidney), np.maximum(spine, stomach))
    cleft = np.minimum(3.5 - np.abs(x - 12 + 0.1 * (y - 60)), np.minimum(0.5 * (y - 60), 0.8 * (198 - z)))
    return np.maximum(distance, cleft) + np.float32(1.6) * noise(region, "coarse")


def _paint_liver(canvas: Canvas, patient: Patient) -> None:
    region = canvas.region((-134, -84, 10), (148, 114, 248))
    hu, shape = patient.hu, patient.anatomy.liver
    distance = liver_distance(region, shape)
    patchy = noise(region, "coarse", 50.0)
    canvas.paint(region, distance, hu["liver"] + 3 * noise(region, "middle") + 2 * patchy, LIVER)
    portal, venous = _liver_trees(patient.seed, shape, patient.texture_mm)
    canvas.paint_segments(venous, hu["hepatic_vein"], only_label=LIVER)
    canvas.paint_segments(portal, hu["portal_vein"], only_label=LIVER)


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
    canvas.paint(region, distance, value, SPLEEN_LABEL)
    if patient.anatomy.accessory_spleen is not None:
        place, radius = patient.anatomy.accessory_spleen
        canvas.paint_ellipsoid(place, (radius,) * 3, np.float32(patient.hu["spleen"]), SPLEEN_LABEL)


def _paint_pancreas(canvas: Canvas, patient: Patient) -> None:
    points, radii = CURVES["pancreas"]
    region, distance, _ = canvas.tube(points, radii * patient.width["pancreas"], pad_mm=5)
    lobules = noise(region, "middle")
    distance = distance + 2.0 * lobules
    value = patient.hu["pancreas"] - 60 * np.clip(lobules - 0.9 + 0.5 * patient.marbling, 0, 1)
    canvas.paint(region, distance, value + 3 * noise(region, "fine"), PANCREAS)
    canvas.paint_tube(CURVES["pancreas"][0][3:], np.full(len(CURVES["pancreas"][0]) - 3, 1.1), np.float32(18.0), None)


def _paint_gallbladder(canvas: Canvas, patient: Patient) -> None:
    """The gallbladder, or the clips of its removal; and the common bile duct."""
    if patient.anatomy.has_gallbladder:
        points, radii = GALLBLADDER
        region, distance, _ = canvas.tube(points, radii * patient.width["gallbladder"], pad_mm=3)
        canvas.paint(region, distance, np.float32(patient.hu["stomach_wall"]), GALLBLADDER_LABEL)
        canvas.paint(region, distance + 1.6, np.float32(patient.hu["bile"]), GALLBLADDER_LABEL)
    else:
        for clip in ((47, 57, 125), (51, 62, 120)):
            canvas.paint_ellipsoid(clip, (1.6, 1.6, 3.0), np.float32(CLIP_HU), None)
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
    hu, sides = patient.hu, [{1: "right", -1: "left"}[side] for side in patient.anatomy.kidney_sides]
    arteries = ["celiac", "splenic_artery", "hepatic_artery", "mesenteric_artery"]
    arteries += ["right_iliac_artery", "left_iliac_artery", *(f"{side}_renal_artery" for side in sides)]
    for name in arteries:
        canvas.paint_tube(*CURVES[name], np.float32(0.95 * hu["aorta"]))
    for name, tissue in (
        ("splenic_vein", "portal_vein"), ("portal_vein", "portal_vein"), ("mesenteric_vein", "portal_vein"),
        *((f"{side}_renal_vein", "renal_vein") for side in sides),
        ("right_iliac_vein", "cava"), ("left_iliac_vein", "cava"),
    ):  # fmt: skip
        canvas.paint_tube(*CURVES[name], np.float32(hu[tissue]))
    region, distance, _ = canvas.tube(*CURVES["cava"], stretch=(0.9, 1.2, 1), pad_mm=2)
    mixing = np.clip((region.z - 90) * np.float32(1 / 30), 0, 1)  # renal blood arrives earlier than the legs'
    value = hu["cava"] + 0.5 * mixing * (hu["renal_vein"] - hu["cava"]) + 3 * noise(region, "middle")
    canvas.paint(region, distance, value, CAVA)
    points, radii = CURVES["aorta"]
    region, distance, _ = canvas.tube(points, radii * patient.width["aorta"], pad_mm=3)
    canvas.paint(region, distance, np.float32(0.15 * hu["aorta"] + 34), AORTA)
    canvas.paint(region, distance + 1.2, np.float32(hu["aorta"]), AORTA)
    plaque = noise(region, "middle") > 2.1
    ring = np.where(plaque, np.abs(distance + 1.5) - 1.5, np.float32(9))
    if patient.bone_hu < 160:  # the old have calcified plaques
        canvas.paint(region, ring, np.float32(600.0), None)


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
        kept = np.isin(canvas.label[region.index], (LIVER, *LABEL_OF_SIDE.values()))
        canvas.paint(region, np.where(kept, distance, np.float32(9)), np.float32(lesion.hu), None)
