"""Phantom CT, landmarks: named atlas points (mm) a radiologist could mark on bones, vessels, airways and organs."""

import numpy as np

from datasets.phantom.atlas import CURVES, FEMUR_HEAD, KIDNEYS, VERTEBRAE, rib, sternum_point, vertebra_point
from datasets.phantom.variants import Anatomy, absent_landmarks


def _nearest_on(name: str, z: float) -> np.ndarray:
    """The point of a centre line that is nearest to a height."""
    points = CURVES[name][0]
    return points[np.argmin(np.abs(points[:, 2] - z))]


def _bones() -> dict[str, np.ndarray]:
    found = {}
    for index, (name, *_, half_depth, _height) in enumerate(VERTEBRAE):
        found[f"{name}_body"] = vertebra_point(index, 0, 0, 0)
        if name.startswith("C"):
            continue
        reach = 34.0 if name.startswith("L") else 26.0
        found[f"{name}_spinous_tip"] = vertebra_point(index, 0, -half_depth - 46, -12 if name.startswith("L") else -18)
        for side, word in ((1, "right"), (-1, "left")):
            found[f"{name}_{word}_transverse_tip"] = vertebra_point(index, side * (reach + 4), -half_depth - 15, 3)
    for number in range(1, 13):
        for side, word in ((1, "right"), (-1, "left")):
            line = rib(number, side)[0]
            found[f"{word}_rib_{number}_front_end"] = line[-1]
            if 2 <= number <= 11:
                found[f"{word}_rib_{number}_middle"] = line[len(line) // 2]
    for side, word in ((1, "right"), (-1, "left")):
        mirror = np.array([side, 1, 1])
        found[f"{word}_femoral_head"] = np.array(FEMUR_HEAD) * mirror
        found[f"{word}_anterior_iliac_spine"] = np.array([124.0, 76.0, -14.0]) * mirror
        found[f"{word}_iliac_crest_top"] = np.array([112.0, 2.0, 27.0]) * mirror
        found[f"{word}_ischial_tuberosity"] = np.array([55.0, -26.0, -152.0]) * mirror
        found[f"{word}_greater_trochanter"] = np.array([132.0, 4.0, -128.0]) * mirror
    found["pubic_symphysis"] = np.array([0.0, 62.0, -134.0])
    found["sacral_promontory"] = np.array([0.0, 15.0, -20.0])
    found["sternal_notch"] = sternum_point(390.0)
    found["sternal_angle"] = sternum_point(352.0)
    found["xiphoid"] = sternum_point(250.0)
    return found


def _vessels_and_airways() -> dict[str, np.ndarray]:
    found = {
        "carina": np.array([2.0, 8.0, 344.0]),
        "aortic_arch_top": CURVES["aorta"][0][np.argmax(CURVES["aorta"][0][:, 2])],
        "aortic_root": CURVES["aorta"][0][0],
        "aortic_bifurcation": np.array([-2.0, 50.0, 41.0]),
        "caval_confluence": CURVES["cava"][0][0],
        "celiac_origin": CURVES["celiac"][0][0],
        "superior_mesenteric_origin": CURVES["mesenteric_artery"][0][0],
        "right_renal_artery_origin": CURVES["right_renal_artery"][0][0],
        "left_renal_artery_origin": CURVES["left_renal_artery"][0][0],
        "portal_confluence": CURVES["portal_vein"][0][0],
        "portal_bifurcation": CURVES["portal_vein"][0][-1],
        "pulmonary_bifurcation": CURVES["pulmonary_trunk"][0][-1],
        "cava_at_atrium": CURVES["cava"][0][-1],
        "brachiocephalic_confluence": CURVES["superior_cava"][0][-1],
        "aorta_at_T8": _nearest_on("aorta", 275),
        "aorta_at_T12": _nearest_on("aorta", 168),
        "aorta_at_L3": _nearest_on("aorta", 70),
        "cava_at_L2": _nearest_on("cava", 104),
        "cava_at_diaphragm": _nearest_on("cava", 212),
    }
    for side in ("right", "left"):
        found[f"{side}_common_iliac_middle"] = _nearest_on(f"{side}_iliac_artery", 0)
        found[f"{side}_femoral_artery"] = _nearest_on(f"{side}_iliac_artery", -120)
    return found


def _organs() -> dict[str, np.ndarray]:
    found = {
        "liver_right_lobe": np.array([88.0, 14.0, 160.0]),
        "liver_left_lobe": np.array([-4.0, 72.0, 190.0]),
        "liver_dome": np.array([62.0, 20.0, 222.0]),
        "spleen_centre": np.array([-112.0, -16.0, 166.0]),
        "pancreas_head": np.array([33.0, 60.0, 92.0]),
        "pancreas_tail": np.array([-80.0, 20.0, 146.0]),
        "right_adrenal_body": np.array([33.0, 18.0, 158.0]),
        "left_adrenal_body": np.array([-38.0, 21.0, 154.0]),
        "gallbladder_centre": np.array([58.0, 75.0, 108.0]),
        "esophagus_at_T8": _nearest_on("esophagus", 275),
        "gastroesophageal_junction": CURVES["esophagus"][0][-1],
        "stomach_body": np.array([-72.0, 42.0, 165.0]),
        "pylorus": CURVES["stomach"][0][-1],
        "duodenum_descending": np.array([52.0, 44.0, 90.0]),
        "duodenojejunal_flexure": CURVES["duodenum"][0][-1],
        "heart_apex": np.array([-58.0, 66.0, 242.0]),
        "bladder_centre": np.array([0.0, 42.0, -106.0]),
        "right_lung_apex": np.array([34.0, -16.0, 420.0]),
        "left_lung_apex": np.array([-34.0, -16.0, 420.0]),
    }
    for side, word in ((1, "right"), (-1, "left")):
        x, y, z = KIDNEYS[side]
        found[f"{word}_kidney_lateral_cortex"] = np.array([x + side * 17, y, z])
        found[f"{word}_kidney_upper_pole"] = np.array([x - side * 10, y - 7, z + 46])
        found[f"{word}_kidney_lower_pole"] = np.array([x + side * 8, y + 6, z - 46])
    return found


def atlas_landmarks(anatomy: Anatomy | None = None) -> dict[str, np.ndarray]:
    """Landmarks: name -> atlas mm [3]; all, or those that a patient with this anatomy has.

    More than 120, so that 40 and more fall into any scan range.
    """
    found = {**_bones(), **_vessels_and_airways(), **_organs()}
    absent = absent_landmarks(anatomy) if anatomy else set()
    return {name: point for name, point in found.items() if name not in absent}
