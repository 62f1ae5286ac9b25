"""Phantom CT, the atlas: outlines of the trunk, the spine, centre lines of tubes, and the named landmarks, in atlas mm.

Axes: x to the patient's right, y anterior, z superior (RAS world), origin in the fifth lumbar vertebra's canal. Sizes
and places follow standard anatomy: lumbar bodies about 27 mm high with 8 mm discs, kidneys 11 cm long at T12-L3 with
the right one lower, liver span about 16 cm, spleen 11 cm, aorta 20-30 mm wide that divides at L4, carina at T5,
pancreas head at L2.
"""

import numpy as np
from scipy.interpolate import PchipInterpolator

from datasets.phantom.shapes import curve

PROFILE_LOW_MM, PROFILE_HIGH_MM = -320, 640

# z: half width, front y, back y of the skin, of the muscles' outside, and of the chest and belly cavity.
_OUTLINES = {
    -220: (182, 84, -104, 166, 64, -82, 4, 4, -4),
    -160: (184, 92, -110, 167, 72, -90, 30, 25, -28),
    -120: (186, 102, -114, 167, 82, -90, 48, 62, -52),
    -80: (184, 112, -112, 165, 92, -86, 74, 82, -60),
    -40: (178, 124, -105, 157, 104, -81, 106, 94, -50),
    0: (171, 132, -97, 149, 113, -78, 125, 102, -48),
    40: (163, 134, -93, 143, 116, -77, 128, 105, -54),
    80: (160, 134, -93, 142, 117, -78, 129, 106, -60),
    120: (163, 134, -98, 146, 118, -83, 132, 107, -68),
    160: (167, 134, -105, 151, 118, -91, 136, 106, -76),
    200: (170, 132, -111, 155, 117, -98, 139, 104, -82),
    250: (174, 127, -117, 159, 112, -104, 140, 98, -86),
    300: (180, 119, -120, 165, 104, -107, 135, 86, -87),
    350: (188, 106, -121, 172, 90, -108, 120, 68, -84),
    390: (192, 88, -119, 176, 72, -106, 94, 48, -76),
    420: (186, 70, -115, 170, 54, -101, 60, 28, -62),
    445: (142, 58, -105, 127, 43, -91, 20, 4, -30),
    465: (84, 54, -91, 71, 43, -77, 3, 2, -6),
    500: (66, 55, -79, 56, 45, -66, 1, 1, -1),
}


def _profile(first: int) -> np.ndarray:
    """Table [960, 4] per mm of z: half width, centre y, front half depth, back half depth."""
    knots = np.array(sorted(_OUTLINES), float)
    values = np.array([_OUTLINES[int(z)][first : first + 3] for z in knots], float)
    z = np.clip(np.arange(PROFILE_LOW_MM, PROFILE_HIGH_MM), knots[0], knots[-1])
    width, front, back = PchipInterpolator(knots, values)(z).T
    centre = back + 0.46 * (front - back)
    return np.stack([width, centre, front - centre, centre - back], -1).astype(np.float32)


SKIN, MUSCLE, CAVITY = _profile(0), _profile(3), _profile(6)


def _roundness(qx: np.ndarray, qy: np.ndarray) -> np.ndarray:
    """1 on an outline between an ellipse and a rounded box, growing linearly along each ray."""
    qx2, qy2 = qx * qx, qy * qy
    return np.sqrt(0.7 * (qx2 + qy2) + 0.3 * np.sqrt(qx2 * qx2 + qy2 * qy2))


def outline_distance(profile: np.ndarray, x, y, z, with_direction: bool = False):
    """Distance (mm, along the ray from the middle; negative inside) to one of SKIN, MUSCLE, CAVITY.

    With `with_direction` it also returns the unit vectors [..., 3] of those rays.
    """
    row = np.clip(z - PROFILE_LOW_MM, 0, len(profile) - 1).astype(np.int32)
    width, centre, front, back = (profile[:, column].take(row) for column in range(4))
    dy = y - centre
    ratio = _roundness(x / width, dy / np.where(dy > 0, front, back))
    ray = np.sqrt(x * x + dy * dy)
    distance = ray * (1 - 1 / np.maximum(ratio, np.float32(0.02)))
    if not with_direction:
        return distance
    safe = np.maximum(ray, 1e-3)
    return distance, np.stack([x / safe, dy / safe, np.zeros_like(ray)], -1)


def cavity_distance(x, y, z) -> np.ndarray:
    """Distance to the chest and belly cavity: its outline without the ridge of back muscles along the spine."""
    outline = outline_distance(CAVITY, x, y, z)
    row = np.clip(z - PROFILE_LOW_MM, 0, len(_RIDGE) - 1).astype(np.int32)
    centre, width, depth = (_RIDGE[:, column].take(row) for column in range(3))
    ratio = np.square(x / width) + np.square(np.maximum(y - centre, 0) / depth)
    return np.maximum(outline, (1 - np.sqrt(ratio)) * depth)


def outline_point(profile: np.ndarray, angle: float, z: float, outside_mm: float) -> np.ndarray:
    """The point on an outline at an angle from the back (0) over the right side (pi / 2) to the front (pi)."""
    width, centre, front, back = profile[int(np.clip(round(z) - PROFILE_LOW_MM, 0, len(profile) - 1))]
    dx, dy = np.sin(angle), -np.cos(angle)
    ray = 1 / float(_roundness(dx / width, dy / (front if dy > 0 else back))) + outside_mm
    return np.array([dx * ray, centre + dy * ray, z])


def diaphragm_height(x, y) -> np.ndarray:
    """Atlas z of the diaphragm above a place: two domes, the right one higher, falling to the walls, lowest behind."""
    fx = x * np.float32(1 / 138)
    fy = (y - np.float32(8)) * np.float32(1 / 95)
    rho2 = np.minimum(fx * fx + fy * fy, 1.6)
    middle = np.exp(-((x * np.float32(1 / 42)) ** 2) - ((y - 40) * np.float32(1 / 48)) ** 2)
    fall = (56 - 28 * np.clip(fy, -1, 1)) * rho2 * rho2
    return 233 + 7 * np.tanh(x * np.float32(1 / 40)) - 14 * middle - fall


# name, y and z of the body's centre, half width, half depth, height of the body.
VERTEBRAE = (
    ("C6", 8, 460, 11, 8, 13),
    ("C7", 3, 443, 13, 9, 14),
    ("T1", -5, 425, 15, 10, 15),
    ("T2", -13, 406, 15, 11, 16),
    ("T3", -21, 386, 15, 12, 17),
    ("T4", -27, 365, 15, 13, 17.5),
    ("T5", -31, 344, 15.5, 13.5, 18),
    ("T6", -33, 322, 16, 14, 18.5),
    ("T7", -33, 299, 16.5, 14.5, 19),
    ("T8", -30, 275, 17, 15, 20),
    ("T9", -25, 250, 18, 15.5, 21),
    ("T10", -19, 224, 19, 16, 22),
    ("T11", -12, 197, 20, 16.5, 23),
    ("T12", -4, 168, 21, 17, 25),
    ("L1", 5, 137, 22, 17, 26),
    ("L2", 14, 104, 23, 17.5, 27),
    ("L3", 20, 70, 24, 18, 27.5),
    ("L4", 22, 35, 25, 18, 27.5),
    ("L5", 16, 0, 26, 18, 26.5),
)
SACRUM = (
    ((1, -31, 27, 16), (-14, -56, 23, 12), (-30, -78, 19, 9))
    + ((-43, -98, 15, 7), (-49, -117, 11, 6), (-46, -134, 6, 4))
)  # fmt: skip

# With the sixth lumbar vertebra that some patients have in the place of the first sacral one.
SPINE = (*VERTEBRAE, ("L6", 1, -31, 26, 17, 22))


def _ridge() -> np.ndarray:
    """Table [960, 3] per mm of z: centre y, half width and half depth of the back muscles' ridge."""
    z = np.arange(PROFILE_LOW_MM, PROFILE_HIGH_MM)
    knots = np.array([-60, 0, 90, 150, 200, 300, 420], float)
    spine = np.interp(z, [row[2] for row in VERTEBRAE[::-1]], [row[1] for row in VERTEBRAE[::-1]])
    behind = np.interp(z, knots, [96, 84, 80, 78, 77, 74, 72])
    width = np.interp(z, knots, [30, 74, 76, 66, 54, 50, 44])
    depth = np.interp(z, knots, [20, 50, 50, 46, 42, 40, 40])
    return np.stack([spine - behind, width, depth], -1).astype(np.float32)


_RIDGE = _ridge()


def vertebra_frame(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, forward and upward unit vectors (atlas) of one entry of SPINE."""
    here = SPINE[index]
    above = SPINE[max(index - 1, 0)]
    below = SPINE[index + 1] if index + 1 < len(SPINE) else ("S2", *SACRUM[1])
    up = np.array([0.0, above[1] - below[1], above[2] - below[2]])
    up /= np.linalg.norm(up)
    return np.array([0.0, here[1], here[2]]), np.array([0.0, up[2], -up[1]]), up


def vertebra_point(index: int, right: float, forward: float, up: float) -> np.ndarray:
    """An atlas point given in a vertebra's own frame (mm)."""
    centre, ahead, above = vertebra_frame(index)
    return centre + right * np.array([1.0, 0, 0]) + forward * ahead + up * above


_RIB_DROP_MM = (20, 40, 56, 64, 70, 74, 78, 82, 84, 78, 56, 26, 12)
_RIB_END = (2.35, 2.45, 2.5, 2.52, 2.52, 2.5, 2.46, 2.28, 2.1, 1.85, 1.3, 0.82, 0.72)


def rib(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre line and radii of a rib (number 1-13, side 1 right, -1 left), from the vertebra to its front end."""
    index = 1 + number
    half_width, half_depth = VERTEBRAE[index][3:5]
    head = vertebra_point(index, side * (half_width + 3), -half_depth + 2, 6)
    neck = vertebra_point(index, side * (half_width + 16), -half_depth - 12, 4)
    angles = np.linspace(0.62 if number < 12 else 0.5, _RIB_END[number - 1], 9)
    points = [head, neck]
    for angle in angles:
        part = (angle - angles[0]) / (angles[-1] - angles[0])
        z = neck[2] - 4 - _RIB_DROP_MM[number - 1] * part**1.15
        point = outline_point(CAVITY, angle, z, 6.5)
        points.append(point * [side, 1, 1])
    radii = np.concatenate([[4.0, 4.0], np.linspace(5.0, 4.6, 9)])
    return curve(np.column_stack([np.array(points), radii]), 10.0)


def sternum_point(z: float, side: float = 0.0) -> np.ndarray:
    """A point in the breastbone's middle layer at height z, `side` mm to the right."""
    front = outline_point(CAVITY, np.pi, z, 6.0)
    return np.array([side, front[1], z])


CURVES = {
    "aorta": curve(
        [(8, 34, 296, 15), (20, 42, 322, 16), (19, 36, 350, 15.5), (6, 20, 368, 14.5), (-12, -2, 364, 13.5)]
        + [(-23, -16, 340, 13), (-24, -14, 300, 12.5), (-21, -6, 260, 12), (-15, 7, 223, 11.5), (-9, 22, 180, 11)]
        + [(-6, 34, 140, 10.5), (-5, 43, 104, 10), (-4, 49, 70, 9.5), (-2, 50, 40, 9)]
    ),
    "cava": curve(
        [(13, 46, 28, 10.5), (18, 49, 60, 11), (20, 46, 100, 11.5), (22, 41, 140, 12), (26, 38, 180, 13)]
        + [(28, 38, 212, 13.5), (27, 40, 240, 13)]
    ),
    "superior_cava": curve([(27, 42, 296, 10), (29, 38, 330, 9.5), (27, 34, 375, 8.5)]),
    "right_vein": curve([(27, 34, 375, 8), (34, 28, 400, 7), (62, 18, 418, 6.5), (110, 0, 420, 6)]),
    "left_vein": curve(
        [(27, 34, 376, 7.5), (0, 44, 384, 7), (-34, 30, 402, 7), (-66, 18, 418, 6.5), (-112, 0, 420, 6)]
    ),
    "innominate": curve([(14, 28, 368, 6.5), (20, 22, 395, 6), (30, 14, 420, 4.5), (60, 4, 428, 4)]),
    "left_carotid": curve([(2, 18, 368, 4.5), (-12, 16, 400, 4), (-24, 14, 460, 4)]),
    "right_carotid": curve([(22, 18, 404, 4), (24, 14, 460, 4)]),
    "left_subclavian": curve([(-10, 4, 366, 5), (-20, 2, 400, 5), (-46, 2, 428, 4.5), (-80, -4, 424, 4)]),
    "pulmonary_trunk": curve([(-14, 60, 300, 14), (-18, 48, 320, 14), (-16, 28, 330, 13)]),
    "right_pulmonary": curve([(-14, 26, 330, 12), (10, 18, 326, 11), (36, 12, 322, 10), (54, 6, 308, 7)]),
    "left_pulmonary": curve([(-16, 26, 330, 12), (-32, 8, 336, 10.5), (-48, -4, 322, 8)]),
    "trachea": curve([(0, 26, 470, 9), (1, 22, 430, 9), (2, 14, 390, 9), (2, 8, 346, 9.5)]),
    "right_bronchus": curve([(2, 8, 346, 8), (18, 4, 332, 7.5), (38, -2, 316, 6.5), (52, -8, 296, 4.5)]),
    "left_bronchus": curve([(2, 8, 346, 8), (-18, 4, 334, 7), (-40, -4, 322, 6), (-54, -12, 304, 4.5)]),
    "esophagus": curve(
        [(-2, 14, 462, 7), (-3, 6, 425, 7.5), (-4, -3, 385, 8), (-3, -8, 345, 8), (-3, -5, 305, 8.5), (-7, 6, 268, 8.5)]
        + [(-14, 20, 236, 9), (-21, 30, 212, 9.5), (-33, 32, 198, 10)]
    ),
    "stomach": curve(
        [(-68, 14, 206, 30), (-72, 28, 186, 34), (-74, 46, 160, 31), (-66, 64, 136, 27), (-44, 78, 118, 24)]
        + [(-16, 84, 110, 20), (8, 80, 112, 15), (24, 72, 117, 10)]
    ),
    "duodenum": curve(
        [(27, 71, 117, 10), (40, 62, 121, 12.5), (49, 52, 112, 12.5), (52, 44, 90, 12.5), (47, 43, 68, 12.5)]
        + [(28, 58, 58, 11.5), (6, 67, 57, 10.5), (-18, 63, 64, 11), (-34, 56, 84, 11), (-40, 62, 98, 11)]
    ),
    "pancreas": curve(
        [(32, 60, 80, 12), (33, 60, 92, 16), (24, 66, 104, 13), (8, 70, 113, 10.5), (-14, 68, 122, 12)]
        + [(-38, 54, 130, 12), (-62, 36, 140, 11.5), (-84, 16, 147, 10)],
        7.0,
    ),
    "splenic_vein": curve(
        [(10, 60, 112, 6), (-14, 58, 121, 5.5), (-40, 43, 129, 5.5), (-64, 24, 141, 5), (-88, 4, 152, 4.5)]
    ),
    "portal_vein": curve([(9, 60, 106, 6.5), (14, 56, 118, 7.5), (24, 54, 134, 7.5), (40, 52, 148, 7)]),
    "mesenteric_vein": curve([(8, 68, 30, 4), (11, 72, 66, 5), (11, 66, 92, 6), (9, 60, 106, 6.5)]),
    "mesenteric_artery": curve(
        [(-5, 54, 116, 4), (-4, 64, 108, 4), (-4, 72, 90, 4), (-2, 76, 62, 3.6), (4, 74, 20, 3)]
    ),
    "celiac": curve([(-7, 44, 130, 4), (-7, 56, 132, 4), (-10, 60, 131, 3.6)]),
    "splenic_artery": curve([(-10, 60, 131, 3.2), (-36, 50, 140, 3), (-62, 30, 148, 3), (-88, 6, 160, 2.8)]),
    "hepatic_artery": curve([(-10, 60, 131, 3.2), (10, 66, 128, 3), (26, 62, 138, 2.8), (38, 58, 150, 2.2)]),
    "right_renal_artery": curve([(-2, 42, 104, 3.4), (20, 34, 103, 3.2), (44, 12, 97, 3)]),
    "left_renal_artery": curve([(-10, 42, 106, 3.4), (-26, 30, 107, 3.2), (-46, 12, 107, 3)]),
    "right_renal_vein": curve([(26, 44, 100, 5), (38, 28, 98, 5), (48, 12, 96, 4.5)]),
    "left_renal_vein": curve([(14, 52, 104, 5), (-4, 57, 104, 4.2), (-22, 48, 106, 5), (-46, 18, 108, 5)]),
    "right_iliac_artery": curve(
        [(-2, 50, 42, 7), (14, 52, 20, 6.5), (34, 50, -20, 6)]
        + [(52, 52, -60, 5.5), (66, 68, -105, 5), (72, 70, -160, 4.6)]
    ),
    "left_iliac_artery": curve(
        [(-2, 50, 42, 7), (-17, 52, 20, 6.5), (-36, 50, -20, 6)]
        + [(-53, 52, -60, 5.5), (-66, 68, -105, 5), (-72, 70, -160, 4.6)]
    ),
    "right_iliac_vein": curve(
        [(13, 46, 30, 9), (24, 42, 10, 7.5), (40, 40, -25, 7)]
        + [(54, 42, -62, 6.5), (58, 62, -105, 6), (62, 62, -160, 5.6)]
    ),
    "left_iliac_vein": curve(
        [(12, 46, 28, 9), (-8, 41, 12, 7.5), (-36, 38, -25, 7)]
        + [(-52, 42, -62, 6.5), (-57, 62, -105, 6), (-61, 62, -160, 5.6)]
    ),
    "colon": curve(
        [(94, 62, -36, 22), (100, 44, -8, 25), (102, 30, 28, 24), (102, 30, 62, 22), (92, 62, 76, 20)]
        + [(66, 84, 64, 19), (28, 92, 48, 19), (-10, 92, 48, 19), (-46, 86, 66, 18), (-78, 66, 94, 18)]
        + [(-104, 34, 118, 17), (-110, 8, 108, 17), (-110, 8, 70, 16), (-108, 14, 30, 16), (-104, 34, -8, 16)]
        + [(-88, 58, -38, 16), (-56, 60, -52, 16), (-22, 44, -44, 16), (6, 20, -48, 16), (8, -8, -66, 16)]
        + [(0, -26, -90, 17), (0, -26, -112, 19), (0, -16, -134, 14), (0, -20, -156, 9)],
        11.0,
    ),
}

KIDNEYS = {1: (62.0, 4.0, 92.0), -1: (-64.0, 2.0, 106.0)}
KIDNEY_RADII_MM = (28.5, 26.5, 56.0)
LIVER_PARTS = (((72, 16, 164), (72, 94, 80)), ((28, 46, 184), (70, 60, 48)), ((-24, 68, 194), (58, 40, 32)))
SPLEEN = ((-103.0, -16.0, 166.0), (33.0, 50.0, 56.0))
GALLBLADDER = curve([(48, 58, 124, 7), (54, 68, 114, 12), (60, 80, 104, 15), (64, 88, 98, 14)], 6.0)
FEMUR_HEAD = (90.0, 18.0, -108.0)
HEART = ((-14.0, 44.0, 264.0), (62.0, 48.0, 50.0))
BLADDER = ((0.0, 42.0, -106.0), (42.0, 34.0, 30.0))
