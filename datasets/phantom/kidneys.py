"""Phantom CT, kidneys: cortex, medulla, sinus and ureters; also a single kidney and a horseshoe."""

import numpy as np

from datasets.phantom.atlas import KIDNEY_RADII_MM, KIDNEYS
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, curve, ellipsoid_local, noise

LABEL_OF_SIDE = {1: 2, -1: 13}
SINGLE_FACTOR = 1.12  # on the radii of a kidney that works for both
_ISTHMUS = ((58, 16, 46, 15), (40, 50, 36, 14), (14, 74, 32, 12), (-14, 74, 32, 12), (-42, 48, 42, 14))
_ISTHMUS += ((-60, 14, 58, 15),)


def paint_kidneys(canvas: Canvas, patient: Patient) -> None:
    """Paint the kidneys that a patient has."""
    for side in patient.anatomy.kidney_sides:
        _paint_kidney(canvas, patient, side)
    if patient.anatomy.is_horseshoe:
        region, distance, _ = canvas.tube(*curve(_ISTHMUS, 8.0), pad_mm=2)
        value = np.float32(0.5 * (patient.hu["renal_cortex"] + patient.hu["renal_medulla"]))
        for side, label in LABEL_OF_SIDE.items():
            canvas.paint(region, np.maximum(distance, -side * region.x), value, label)


def _paint_kidney(canvas: Canvas, patient: Patient, side: int) -> None:
    centre, label = KIDNEYS[side], LABEL_OF_SIDE[side]
    region = canvas.around(centre, (50, 48, 72))
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
    radii = np.array(KIDNEY_RADII_MM) * (SINGLE_FACTOR if len(patient.anatomy.kidney_sides) == 1 else 1.0)
    distance = ellipsoid_local(out, ahead, long_axis, radii) + 1.2 * noise(region, "coarse")
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
