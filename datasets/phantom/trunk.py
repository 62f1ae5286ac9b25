"""Phantom CT, trunk: arms, skin, fat, muscles, lungs with their vessels, heart, great vessels and airways."""

from functools import lru_cache

import numpy as np

from datasets.phantom.atlas import CURVES, HEART, MUSCLE, SKIN, cavity_distance, diaphragm_height, outline_distance
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region, curve, ellipsoid_local, noise

NUM_LUNG_TWIGS = 240  # of each lung
EVERYWHERE = ((-330, -320, -320), (330, 320, 640))


def paint_trunk(canvas: Canvas, patient: Patient) -> None:
    """Paint the body from the skin inwards, up to the lungs and the chest's organs."""
    everything = canvas.region(*EVERYWHERE)
    paint_arms(canvas, patient)
    _paint_wall(canvas, everything, patient)
    _paint_muscles(canvas, patient)
    _paint_lungs(canvas, patient)
    _paint_heart(canvas, patient)
    _paint_chest_vessels(canvas, patient)


def _paint_wall(canvas: Canvas, everything: Region, patient: Patient) -> None:
    """Skin, fat with strands, the muscle layer with its fat planes, and fat in the cavity."""
    x, y, z = everything.x, everything.y, everything.z
    strands, broad = noise(everything, "middle"), noise(everything, "coarse")
    fat = patient.hu["fat"] + 5 * strands
    groove = 7 * np.exp(-((x * np.float32(1 / 15)) ** 2)) * (y < 0)  # along the spine
    skin = outline_distance(SKIN, x, y, z) + groove
    canvas.paint(everything, skin, np.float32(30.0))
    canvas.paint(everything, skin + np.float32(2.2), fat + 45 * np.clip(strands - 1.7, 0, 1))
    outer = outline_distance(MUSCLE, x, y, z) + groove + 1.5 * broad
    inner = cavity_distance(x, y, z)
    muscle = np.full(x.shape, patient.hu["muscle"], np.float32)
    muscle -= (50 + 70 * patient.marbling) * np.clip(strands - 1.3 + 0.5 * patient.marbling, 0, 0.8)
    # The three layers of the flanks, and single muscles elsewhere, with fat between them.
    flank = (np.abs(x) > 85) & (y > -45) & (y < 70) & (z > 30) & (z < 165) & (inner < 26)
    layers = np.cos((outer - inner * 0.3) * np.float32(2 * np.pi / 9.0) + broad) - 0.8
    single = 0.35 - np.abs(noise(everything, "coarse", 90.0))
    muscle -= 90 * np.clip(np.where(flank, layers * 5, single * (2 + 2 * patient.marbling)), 0, 1)
    midline = np.abs(x) < 3.0
    muscle[midline & (y > 60) & (z < 200)] = -40.0
    _gluteal_planes(muscle, x, y, z, outer + 1.2 * strands)
    canvas.paint(everything, outer, muscle)
    inside = patient.hu["fat"] + 5 * strands + 70 * np.clip(strands - 1.7, 0, 1)
    canvas.paint(everything, inner, inside)


# Upper arm, forearm and hand of the right side, atlas mm and radius: beside the body, or above the head.
_ARM_DOWN = ((168, -34, 404, 40), (196, -34, 330, 43), (214, -26, 210, 42), (222, -4, 120, 38), (214, 40, 20, 34))
_ARM_DOWN += ((206, 66, -60, 26), (200, 74, -130, 22))
_ARM_UP = ((150, -34, 408, 42), (176, -22, 452, 44), (196, -10, 520, 42), (190, 20, 600, 38))


def paint_arms(canvas: Canvas, patient: Patient) -> None:
    """Skin, fat, muscles and bone of both arms; the trunk is painted over the shoulders."""
    knots = np.array(_ARM_DOWN if patient.anatomy.arms_down else _ARM_UP, float)
    for side in (1, -1):
        points, radii = curve(knots * [side, 1, 1, 1], 16.0)
        region, distance, _ = canvas.tube(points, radii, pad_mm=1)
        if region.is_empty:
            continue
        canvas.paint(region, distance, np.float32(30.0))
        canvas.paint(region, distance + 2.2, np.float32(patient.hu["fat"]))
        planes = 80 * np.clip(0.3 - np.abs(noise(region, "coarse")), 0, 0.3) / 0.3
        canvas.paint(region, distance + 9 + 2 * noise(region, "coarse", 30.0), patient.hu["muscle"] - planes)
        canvas.paint_tube(points, np.full(len(points), 11.0), np.float32(1000.0), None)
        canvas.paint_tube(points, np.full(len(points), 5.5), np.float32(0.0), None)


def _gluteal_planes(muscle: np.ndarray, x, y, z, outer: np.ndarray) -> None:
    """Fat between the layers of the buttocks and around the thighs' vessels, drawn into the muscle's HU."""
    if z.min() > 20:
        return
    low = np.clip((24 - z) * np.float32(0.1), 0, 1)
    bend = outer + np.float32(26) + np.float32(0.06) * (z + 60)
    deep = np.abs(bend) < 1.8
    deeper = np.abs(bend + 19) < 1.5
    behind = y < 40
    muscle[(deep | deeper) & behind & (low > 0.5)] = -80.0
    cleft = (np.abs(x) < 7 + 0.16 * np.maximum(-70 - z, 0)) & (y < -62 + 0.15 * np.maximum(-90 - z, 0)) & (z < -40)
    muscle[cleft] = -95.0


_MUSCLES = {
    # name: knots (x, y, z, radius) of the right side, stretch of the section
    "erector_low": (
        ((34, -68, -60, 17), (36, -54, 0, 23), (38, -54, 60, 25), (36, -60, 130, 23), (32, -74, 200, 19)),
        (1, 1.25, 1),
    ),
    "erector_high": (((32, -74, 200, 18), (28, -86, 300, 15), (26, -76, 380, 14), (22, -46, 450, 14)), (0.8, 1.2, 1)),
    "psoas": (
        ((24, 4, 140, 6), (31, 10, 104, 12), (40, 14, 64, 19), (47, 20, 20, 23), (60, 34, -30, 22), (80, 48, -74, 19))
        + ((94, 48, -112, 17), (108, 18, -150, 14)),
        (1, 0.9, 1),
    ),
    "quadratus": (((66, -34, 22, 15), (62, -34, 70, 16), (54, -38, 120, 11)), (0.8, 1.35, 1)),
    "iliacus": (((104, 34, 8, 11), (98, 40, -20, 18), (92, 46, -60, 17), (94, 46, -100, 13)), (0.9, 1, 1)),
    "obturator": (((56, 22, -84, 8), (57, 16, -110, 10), (52, 8, -134, 9), (46, 0, -150, 8)), (1.2, 0.62, 1)),
}


def _paint_muscles(canvas: Canvas, patient: Patient) -> None:
    for knots, stretch in _MUSCLES.values():
        for side in (1, -1):
            line = curve(np.array(knots, float) * [side, 1, 1, 1], 14.0)
            region, distance, _ = canvas.tube(*line, stretch=stretch, pad_mm=3)
            grain = noise(region, "middle")
            canvas.paint(region, distance, patient.hu["muscle"] - 60 - 40 * np.clip(grain, -1, 1))
            canvas.paint(region, distance + 1.2, patient.hu["muscle"] + 4 - 80 * np.clip(grain - 1.3, 0, 0.8))
    for side in (1, -1):  # the diaphragm's pillars, on both sides of the aorta
        crus = [(side * 9 - 4, 40, 106, 3.5), (side * 15 - 6, 32, 138, 5), (side * 17 - 8, 20, 178, 5)]
        canvas.paint_tube(*curve([*crus, (side * 17 - 12, 22, 206, 4)], 12.0), np.float32(patient.hu["muscle"]))
    for side in (1, -1):  # fat of the armpit, and under the breast muscles
        for centre, radii in (
            ((134, 6, 372), (13, 34, 46)),
            ((92, 62, 372), (34, 4, 36)),
            ((118, -72, 350), (26, 4, 40)),
        ):
            canvas.paint_ellipsoid((side * centre[0], *centre[1:]), radii, np.float32(patient.hu["fat"]))


def lung_distance(region: Region) -> np.ndarray:
    """Distance to both lungs: the chest cavity above the diaphragm without the mediastinum."""
    x, y, z = region.x, region.y, region.z
    wall = cavity_distance(x, y, z) + 2
    floor = (diaphragm_height(x, y) + 3 - z) * np.float32(0.8)
    front = np.clip((y - 45) * np.float32(1 / 40), 0, 1)
    half = 20 + 11 * np.exp(-(((z - 338) * np.float32(1 / 40)) ** 2) - ((y - 8) * np.float32(1 / 42)) ** 2) - 8 * front
    half += 2.6 * noise(region, "coarse")
    return np.maximum(np.maximum(wall, floor), half - np.abs(x + 2))


def _paint_lungs(canvas: Canvas, patient: Patient) -> None:
    region = canvas.region((-150, -100, 118), (150, 112, 445))
    x, y, z = region.x, region.y, region.z
    belly = np.abs(z - diaphragm_height(x, y)) * np.float32(0.8) - 2.2
    canvas.paint(region, np.maximum(belly, cavity_distance(x, y, z) - 1), np.float32(patient.hu["muscle"]))
    distance = lung_distance(region)
    air = patient.hu["lung"] - 0.35 * y + 26 * noise(region, "fine") + 18 * noise(region, "middle")
    canvas.paint(region, distance, air)
    blood = 0.5 * (patient.hu["right_heart"] + patient.hu["aorta"])
    canvas.paint_segments(lung_vessels(patient.seed, patient.texture_mm), blood)
    fissure = np.abs(y + 0.75 * (z - 300) + 6 * noise(region, "coarse", 60.0)) - 0.5
    canvas.paint(region, np.maximum(fissure, distance + 1), np.float32(-560.0), None, opacity=0.6)


def grow_tree(rng: np.random.Generator, root, targets: np.ndarray, leaf_mm: float, grow: float):
    """A branching tree from a root to targets: segments (start, stop, radius, radius), thicker towards the root.

    Each target joins the nearest node of the tree built so far, nearest targets first.
    """
    nodes, parents = [np.asarray(root, float)], [-1]
    for target in sorted(targets, key=lambda point: float(np.linalg.norm(point - nodes[0]))):
        nearest = int(np.argmin(np.linalg.norm(np.array(nodes) - target, axis=1)))
        bend = 0.5 * (nodes[nearest] + target) + rng.normal(0, 0.08, 3) * np.linalg.norm(target - nodes[nearest])
        nodes += [bend, target]
        parents += [nearest, len(nodes) - 2]
    load = np.ones(len(nodes))
    for k in range(len(nodes) - 1, 0, -1):
        load[parents[k]] += load[k]
    radii = leaf_mm * load**grow
    return [
        (nodes[parents[k]], nodes[k], min(radii[parents[k]], 1.25 * radii[k]), radii[k]) for k in range(1, len(nodes))
    ]


@lru_cache(maxsize=1)
def lung_vessels(seed: int, texture_mm: tuple[float, float, float]) -> tuple:
    """A patient's own lung vessels as segments in the atlas."""
    rng = np.random.Generator(np.random.PCG64([4411, seed]))
    segments = []
    for side, hilum in ((1, (40, 4, 312)), (-1, (-42, -2, 316))):
        points = rng.uniform((26, -86, 130), (138, 100, 432), (1400, 3)) * [side, 1, 1]
        points = points.astype(np.float32)
        place = Region((), points[:, 0], points[:, 1], points[:, 2], texture_mm)
        inside = points[lung_distance(place) < -6][:NUM_LUNG_TWIGS]
        segments += grow_tree(rng, hilum, inside.astype(float), 1.0, 0.36)
    return tuple(segments)


def _paint_heart(canvas: Canvas, patient: Patient) -> None:
    """Fat, muscle and the four chambers; the axis points to the left, down and forwards."""
    centre, radii = HEART
    region = canvas.around(centre, np.array(radii) + 12)
    hu = patient.hu
    x, y, z = (v - np.float32(c) for v, c in zip((region.x, region.y, region.z), centre))
    axis = np.array([-0.72, 0.42, -0.55], np.float32)
    axis /= np.linalg.norm(axis)
    across = np.cross(axis, [0, 0, 1]).astype(np.float32)
    across /= np.linalg.norm(across)
    up = np.cross(across, axis)
    a = x * axis[0] + y * axis[1] + z * axis[2]
    b = x * across[0] + y * across[1] + z * across[2]
    c = x * up[0] + y * up[1] + z * up[2]
    floor = (diaphragm_height(region.x, region.y) + 3 - region.z) * np.float32(0.8)
    outer = np.maximum(ellipsoid_local(a, b, c, (63, 46, 44)), floor)
    canvas.paint(region, outer - 4 + 3 * noise(region, "coarse"), np.float32(hu["fat"] + 8))
    canvas.paint(region, outer + 1, np.float32(hu["myocardium"]))
    left, right = hu["aorta"], hu["right_heart"]
    # across (b) points to the patient's back left; negative b is the right front
    chambers = (
        ((16, 12, -2), (34, 21, 21), left),
        ((14, -19, 0), (34, 14, 26), right),
        ((-34, 14, 8), (22, 24, 20), left),
        ((-32, -18, -4), (22, 21, 24), right),
    )
    for (ca, cb, cc), size, value in chambers:
        found = ellipsoid_local(a - ca, b - cb, c - cc, size)
        canvas.paint(region, np.maximum(found, outer + 4), value + 5 * noise(region, "middle"))


def _paint_chest_vessels(canvas: Canvas, patient: Patient) -> None:
    hu = patient.hu
    values = {
        "pulmonary_trunk": hu["right_heart"], "right_pulmonary": hu["right_heart"], "left_pulmonary": hu["right_heart"],
        "superior_cava": 1.1 * hu["right_heart"], "right_vein": hu["cava"], "left_vein": 1.2 * hu["right_heart"],
        "innominate": hu["aorta"], "left_carotid": hu["aorta"], "right_carotid": hu["aorta"],
        "left_subclavian": hu["aorta"],
    }  # fmt: skip
    for name, value in values.items():
        canvas.paint_tube(*CURVES[name], np.float32(value))
    canvas.paint_ellipsoid((22, 14, 446), (11, 10, 20), hu["muscle"] + 55)
    canvas.paint_ellipsoid((-18, 14, 446), (11, 10, 20), hu["muscle"] + 55)
    for name in ("trachea", "right_bronchus", "left_bronchus"):
        region, distance, _ = canvas.tube(*CURVES[name], pad_mm=3)
        canvas.paint(region, distance - 1.6, np.float32(40.0))
        canvas.paint(region, distance, np.float32(-990.0))
