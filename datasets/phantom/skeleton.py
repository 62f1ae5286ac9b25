"""Phantom CT, bones: vertebrae with discs and arches, sacrum, ribs, sternum, shoulders, pelvis, femora.

HU: cortical bone 500-1400 (thin shells come out lower by partial volume), cancellous bone of lumbar vertebrae 100
(old) to 230 (young; Pickhardt 2013: below 110 suggests osteoporosis), discs 70-100, costal cartilage 80-120, cord 35,
fluid 14.
"""

import numpy as np

from datasets.phantom.atlas import (
    CAVITY,
    FEMUR_HEAD,
    SACRUM,
    SPINE,
    VERTEBRAE,
    outline_point,
    rib,
    sternum_point,
    vertebra_frame,
    vertebra_point,
)
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region, capsule, curve, noise, smooth_union, triangle

METAL_HU = 6000.0  # before blur and partial volume; stored volumes end at 3071


def paint_skeleton(canvas: Canvas, patient: Patient) -> None:
    """Paint all bones that a patient has, and metal in them."""
    bone_hu, anatomy = patient.bone_hu, patient.anatomy
    _paint_shoulders(canvas, bone_hu)
    for number in range(1, anatomy.rib_pairs + 1):
        for side in (1, -1):
            _paint_rib(canvas, number, side, bone_hu)
    _paint_sternum(canvas, bone_hu)
    _paint_pelvis(canvas, bone_hu)
    _paint_sacrum(canvas, bone_hu)
    for index in range(len(VERTEBRAE) + (anatomy.num_lumbar > 5)):
        _paint_vertebra(canvas, index, bone_hu)
    if anatomy.num_lumbar < 5:
        _join_last_vertebra(canvas, bone_hu)
    _paint_canal(canvas)
    _paint_metal(canvas, anatomy.metal)


def _join_last_vertebra(canvas: Canvas, bone_hu: float) -> None:
    """The fifth lumbar vertebra is part of the sacrum: broad wings, and bone instead of the disc below it."""
    region = canvas.region((-64, -40, -40), (64, 40, 20))
    wings = (triangle(region, (side * 18, 4, 2), (side * 52, -22, -8), (side * 34, -24, -32), 15.0) for side in (1, -1))
    disc = capsule(region, (0, 12, -12), (0, 6, -22), 17.0, 17.0)[0]
    paint_bone(canvas, region, smooth_union([disc, *wings], 5.0), 0.75 * bone_hu, 1.5, 520.0)


def _paint_metal(canvas: Canvas, metal: str) -> None:
    """A hip prosthesis (cup, head, stem), or two pairs of screws with rods in L4 and L5."""
    titanium = np.float32(METAL_HU)
    if metal in ("right_hip", "left_hip"):
        mirror = np.array([1 if metal == "right_hip" else -1, 1, 1])
        head = np.array(FEMUR_HEAD) * mirror
        canvas.paint_ellipsoid(head, (25, 25, 25), titanium, None)
        stem = np.array([head, (122, 8, -132) * mirror, (126, 4, -160) * mirror, (120, 8, -240) * mirror])
        canvas.paint_tube(stem, np.array([9.0, 10.0, 8.0, 6.0]), titanium, None)
    elif metal == "spine":
        last = len(VERTEBRAE) - 1
        for side in (1, -1):
            ends = []
            for index in (last - 1, last):
                start, stop = (vertebra_point(index, side * x, y, 3) for x, y in ((17, -40), (11, 4)))
                canvas.paint_tube(np.array([start, stop]), np.full(2, 3.2), titanium, None)
                ends.append(start)
            canvas.paint_tube(np.array(ends), np.full(2, 3.0), titanium, None)


def paint_bone(canvas: Canvas, region: Region, distance: np.ndarray, bone_hu: float, shell_mm: float, shell_hu=850.0):
    """Paint a bone: a dense shell around cancellous bone whose beams follow atlas noise."""
    region, distance = canvas.trim(region, distance)
    inner = bone_hu + 38 * noise(region, "fine") + 22 * noise(region, "middle")
    depth = np.clip((-distance - shell_mm) * np.float32(1 / max(canvas.softness_mm, 1.0)) + 0.5, 0, 1)
    canvas.paint(region, distance, shell_hu + depth * (inner - shell_hu))


def _local(region: Region, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, forward and upward mm in a vertebra's frame."""
    centre, ahead, up = (v.astype(np.float32) for v in vertebra_frame(index))
    y, z = region.y - centre[1], region.z - centre[2]
    return region.x, y * ahead[1] + z * ahead[2], y * up[1] + z * up[2]


def _paint_vertebra(canvas: Canvas, index: int, bone_hu: float) -> None:
    _, y, z, half_width, half_depth, height = SPINE[index]
    region = canvas.region((-50, y - 72, z - height / 2 - 34), (50, y + half_depth + 10, z + height / 2 + 14))
    x, ahead, up = _local(region, index)
    waist = 1 - 0.10 * np.clip(1 - (2 * up / height) ** 2, 0, 1)
    qx, qy = x / (half_width * waist), ahead / (half_depth * waist)
    flat_back = np.maximum(qy * qy, 1.15 * np.square(np.minimum(qy, 0)))
    wall = (np.sqrt(qx * qx + flat_back) - 1) * half_depth
    gap = 0.15 * height + 1.2
    disc = np.maximum(wall - 1, np.abs(up + height / 2 + gap / 2) - gap / 2)
    canvas.paint(region, disc, 85.0)
    paint_bone(canvas, region, np.maximum(wall, np.abs(up) - height / 2), bone_hu, 1.4, 620.0)
    _paint_arch(canvas, region, index)


def _paint_arch(canvas: Canvas, region: Region, index: int) -> None:
    """Pedicles, laminae, spinous, transverse and articular processes."""
    name, *_, half_width, half_depth, height = SPINE[index]
    lumbar = name.startswith("L")
    back = -half_depth
    drop, reach, size = (-12.0, 34.0, 1.0) if lumbar else (-24.0, 26.0, 0.85)
    parts = [((0, back - 20, -4), (0, back - 46, drop), 4.5 * size, 4.0 * size)]
    for side in (1, -1):
        pedicle = side * 0.58 * half_width
        parts += [
            ((pedicle, back + 3, 4), (pedicle * 1.08, back - 12, 3), 4.6 * size, 4.6 * size),
            ((pedicle * 1.05, back - 12, 1), (0, back - 22, -5), 3.8 * size, 3.8 * size),
            ((pedicle * 1.1, back - 11, 3), (side * reach, back - 15, 3), 4.4 * size, 3.6 * size),
        ]
        facets = (pedicle * 1.15, back - 14, 0.45 * height), (pedicle * 1.15, back - 15, -0.62 * height)
        parts.append((*facets, 5.0 * size, 4.6 * size))
    distances = (
        capsule(region, vertebra_point(index, *start), vertebra_point(index, *stop), first, last)[0]
        for start, stop, first, last in parts
    )
    paint_bone(canvas, region, smooth_union(distances, 3.0), 260.0, 1.5, 650.0)


def _paint_canal(canvas: Canvas) -> None:
    """Spinal canal with fat, fluid and cord."""
    line = [vertebra_point(k, 0, -row[4] - 9, 0) for k, row in enumerate(VERTEBRAE)]
    line += [np.array([0, y - depth - 4, z]) for y, z, _, depth in SACRUM[:3]]
    points = np.array(line)
    radii = np.full(len(points), 8.5)
    radii[-3:] = (7.0, 5.0, 3.0)
    region, distance, _ = canvas.tube(*curve(np.column_stack([points, radii]), 12.0), pad_mm=2)
    canvas.paint(region, distance, -40.0)
    canvas.paint(region, distance + 1.5, 14.0)
    canvas.paint(region, distance + 4.0, np.where(region.z > 120, 36.0, 24.0).astype(np.float32))


def _paint_sacrum(canvas: Canvas, bone_hu: float) -> None:
    region = canvas.region((-62, -75, -142), (62, 24, -8))
    bodies = (
        capsule(region, (0, y, z), (0, y2, z2), depth, depth2, (0.62 * depth / width * 1.6, 1, 1))[0]
        for (y, z, width, depth), (y2, z2, _, depth2) in zip(SACRUM[:-1], SACRUM[1:])
    )
    alae = (
        triangle(region, (side * 10, -6, -26), (side * 52, -32, -26), (side * 18, -42, -92), 19.0) for side in (1, -1)
    )
    distance = smooth_union([smooth_union(bodies, 5.0), *alae], 6.0)
    crest = capsule(region, (0, -30, -38), (0, -58, -100), 7.0, 4.0)[0]
    paint_bone(canvas, region, smooth_union([distance, crest], 8.0), 0.75 * bone_hu, 1.5, 520.0)


def _paint_rib(canvas: Canvas, number: int, side: int, bone_hu: float) -> None:
    points, radii = rib(number, side)
    paint_bone(canvas, *canvas.tube(points, radii, stretch=(1.25, 1.25, 0.85), pad_mm=2)[:2], bone_hu + 40, 1.3, 700.0)
    if number > 10:
        return
    end = points[-1]
    if number <= 7:
        height = (382, 352, 330, 308, 290, 274, 262)[number - 1]
        goal = sternum_point(height, side * 15.0)
        middle = outline_point(CAVITY, 2.88, min(end[2], height) - (4 if number > 3 else -4), 6.0) * [side, 1, 1]
    else:
        goal = rib(number - 1, side)[0][-1] + np.array([-side * 14.0, 3.0, 3.0])
        middle = (end + goal) / 2
    line = curve(np.column_stack([[end, middle, goal], [4.6, 4.8, 5.0]]), 10.0)
    region, distance, _ = canvas.tube(*line, pad_mm=2)
    canvas.paint(region, distance, 105 + 18 * noise(region, "middle"))


def _paint_sternum(canvas: Canvas, bone_hu: float) -> None:
    heights = np.array([392, 376, 352, 320, 290, 262, 246])
    widths = np.array([22.0, 21.0, 15.0, 17.0, 18.0, 13.0, 6.0])
    points = np.array([sternum_point(z) for z in heights])
    region, distance, _ = canvas.tube(*curve(np.column_stack([points, widths]), 9.0), stretch=(1, 3.0, 1), pad_mm=2)
    paint_bone(canvas, region, distance / 2.2, 0.75 * bone_hu, 1.4, 520.0)


# Spine, neck and side border of the shoulder blade, and the head of the humerus: start, stop, radii; right side.
_SHOULDER = (
    ((86, -98, 402), (148, -62, 432), 3.5, 6.0),
    ((136, -54, 408), (146, -44, 412), 9.0, 12.0),
    ((142, -54, 404), (106, -93, 302), 4.5, 4.0),
    ((156, -40, 418), (159, -40, 424), 17.0, 17.0),
)


def _paint_shoulders(canvas: Canvas, bone_hu: float) -> None:
    for side in (1, -1):
        mirror = np.array([side, 1, 1])
        clavicle = np.array([(14, 50, 398, 7), (50, 40, 412, 5.5), (92, 12, 424, 5.5), (138, -30, 430, 6)], float)
        paint_bone(canvas, *canvas.tube(*curve(clavicle * [side, 1, 1, 1], 10.0), pad_mm=2)[:2], 180.0, 1.8, 900.0)
        blade = [((84, -92, 404), (142, -52, 412), (104, -94, 300))]
        paint_bone(canvas, *canvas.plates(np.array(blade) * mirror, 5.0)[:2], 200.0, 1.5, 700.0)
        for start, stop, *radii in _SHOULDER:
            region, distance, _ = canvas.tube(np.array([start, stop], float) * mirror, np.array(radii, float))
            paint_bone(canvas, region, distance, 190.0, 1.5, 700.0)


_WING = ((48, -62, -18), (70, -50, 12), (96, -24, 26), (118, 18, 26), (128, 56, 6), (124, 76, -14))
_BRIM = ((50, -44, -52), (60, -30, -58), (76, -6, -74), (88, 14, -80), (96, 34, -78), (104, 50, -68))
_RAMI = (((62, 52, -112), (9, 60, -130), 9, 8), ((9, 58, -134), (44, 4, -160), 7.5, 8))


def _paint_pelvis(canvas: Canvas, bone_hu: float) -> None:
    """Iliac wings, hip sockets, pubis, ischium and femora."""
    for side in (1, -1):
        mirror = np.array([side, 1, 1])
        _paint_wing(canvas, mirror, bone_hu)
        _paint_hip(canvas, mirror, bone_hu)
        for start, stop, *radii in _RAMI:
            region, distance, _ = canvas.tube(np.array([start, stop], float) * mirror, np.array(radii, float))
            paint_bone(canvas, region, distance, 190.0, 1.6, 600.0)
    canvas.paint_ellipsoid((0, 61, -132), (3.5, 9, 15), 90.0)


def _paint_wing(canvas: Canvas, mirror: np.ndarray, bone_hu: float) -> None:
    """The iliac wing: plates between crest and brim, with thick edges along both."""
    wing, brim = np.array(_WING, float) * mirror, np.array(_BRIM, float) * mirror
    plates = [
        corner for k in range(5) for corner in ((wing[k], wing[k + 1], brim[k]), (brim[k], brim[k + 1], wing[k + 1]))
    ]
    parts = [canvas.plates(plates, 8.0), canvas.tube(wing, np.full(6, 6.5)), canvas.tube(brim, np.full(6, 8.5))]
    for region, distance, *_ in parts:
        paint_bone(canvas, region, distance, bone_hu + 20, 1.8, 700.0)


def _paint_hip(canvas: Canvas, mirror: np.ndarray, bone_hu: float) -> None:
    """Socket, ischium and the femur with its head, neck and shaft."""
    head = np.array(FEMUR_HEAD) * mirror
    ends = np.array([(40, -44, -172), (150, 66, -70)]) * mirror
    region = canvas.region(ends.min(0), ends.max(0))
    if region.is_empty:
        return
    dx, dy, dz = (v - np.float32(c) for v, c in zip((region.x, region.y, region.z), head))
    ball = np.sqrt(dx * dx + dy * dy + dz * dz)
    open_side = mirror[0] * dx * 0.75 + dy * 0.25 - dz * 0.6  # the socket opens outwards, forwards and down
    socket = np.maximum(np.maximum(ball - 36, 26.5 - ball), open_side - 4)
    ischium = capsule(region, (78, -4, -112) * mirror, (56, -26, -152) * mirror, 15.0, 14.0)[0]
    pubis = capsule(region, (76, 38, -104) * mirror, (60, 53, -113) * mirror, 12.0, 9.0)[0]
    hip = smooth_union([socket, ischium, pubis], 6.0)
    paint_bone(canvas, region, np.maximum(hip, 26.5 - ball), bone_hu + 20, 2.0, 700.0)
    neck = capsule(region, head, (128, 6, -132) * mirror, 15.0, 15.0)[0]
    trochanter = capsule(region, (132, 4, -124) * mirror, (128, 4, -150) * mirror, 14.0, 15.0)[0]
    femur = smooth_union([neck, trochanter], 6.0)
    paint_bone(canvas, region, np.minimum(ball - 24, femur), bone_hu + 40, 2.6, 1000.0)
    region, distance, _ = canvas.tube(np.array([(126, 4, -150), (120, 8, -260)]) * mirror, np.array([16.0, 14.0]))
    paint_bone(canvas, region, distance, 20.0, 6.0, 1400.0)
