"""Phantom CT, what a place belongs to: region of the trunk and anatomical structure, of landmarks and of any point.

Regions follow the place, not the name: the chest lies above the diaphragm (in the wall and the spine: above the disc
T11/T12), the pelvis below the top of the iliac crests, the abdomen between. Structures group the landmarks' names;
for points without a name, the atlas is painted at the points themselves.
"""

import re
from functools import cache

import numpy as np

from datasets.lists.label_classes import FLARE22
from datasets.phantom.atlas import cavity_distance, diaphragm_height
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.organs import paint_organs
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region
from datasets.phantom.skeleton import paint_skeleton
from datasets.phantom.trunk import lung_distance, paint_trunk

REGIONS = ("chest", "abdomen", "pelvis")
CREST_TOP_MM = 27.0  # atlas z of the iliac crests' top, about the disc L4/L5
LARGEST_LUNG_HU = -300.0
LOWEST_CHEST_MM = 182.0  # atlas z of the disc T11/T12: the diaphragm's rim goes lower than anyone's idea of a chest
OTHER = "other"

# The first pattern that a landmark's name contains decides, so that adrenal_body is no vertebra.
_STRUCTURE_OF_NAME = (
    ("adrenals", "adrenal"),
    ("kidneys", "kidney"),
    ("ribs", r"_rib_\d+_"),
    ("vertebrae, bodies", r"^[CTL]\d+_body$"),
    ("vertebrae, processes", r"^[CTL]\d+_.*_tip$|^[CTL]\d+_spinous"),
    ("pelvis and femora", "femoral_head|iliac_spine|iliac_crest|ischial|trochanter|symphysis|sacral"),
    ("sternum", "^sternal|^xiphoid"),
    ("lungs and airways", "carina|lung_apex"),
    ("heart and pulmonary artery", "heart|pulmonary_bifurcation|aortic_root"),
    ("aorta", "^aort"),
    ("arteries", "celiac|mesenteric|renal_artery|iliac_middle|femoral_artery"),
    ("veins", "^cava|^caval|portal|brachiocephalic"),
    ("liver", "^liver"),
    ("gallbladder", "gallbladder"),
    ("spleen", "spleen"),
    ("pancreas", "pancreas"),
    ("esophagus", "esophag"),  # the gastroesophageal junction too
    ("stomach", "stomach|pylorus"),
    ("duodenum", "duoden"),
    ("bladder", "bladder"),
)
_PAIRED = {"right kidney": "kidneys", "left kidney": "kidneys", "inferior vena cava": "veins"}
_PAIRED |= {"right adrenal gland": "adrenals", "left adrenal gland": "adrenals"}
_UNPAINTED_HU, _HALF_PAINTED_HU = -60_000.0, -30_000.0


@cache
def structure_of_landmark(name: str) -> str:
    """The structure that a landmark's name speaks of; "other" for names that are not the phantom's."""
    return next((structure for structure, pattern in _STRUCTURE_OF_NAME if re.search(pattern, name)), OTHER)


def region_of_landmark(name: str) -> str:
    """The region of a phantom landmark; "other" for names that are not the phantom's."""
    return _regions_of_landmarks().get(name, OTHER)


@cache
def _regions_of_landmarks() -> dict[str, str]:
    names, places = zip(*atlas_landmarks().items())
    return dict(zip(names, regions_at(np.array(places)).tolist()))


def regions_at(atlas_mm: np.ndarray) -> np.ndarray:
    """One of REGIONS for each atlas point [N, 3] (array of text [N])."""
    x, y, z = np.asarray(atlas_mm, dtype=np.float32).T
    floor = np.maximum(np.where(cavity_distance(x, y, z) < 0, diaphragm_height(x, y), 0), LOWEST_CHEST_MM)
    return np.select([z <= CREST_TOP_MM, z > floor], ["pelvis", "chest"], "abdomen")


def structures_at(patient: Patient, atlas_mm: np.ndarray) -> np.ndarray:
    """What each atlas point [N, 3] is part of in one patient (array of text [N]).

    Bones, the 13 labelled organs, the lungs; "bowel, bladder, small vessels" for what else the belly's organs draw
    (a patient's bowel loops are its own, so their truth is a place, not a loop); what is left is "heart,
    mediastinum, lung vessels", "belly fat", or "wall: muscle, fat, skin".
    """
    points = np.asarray(atlas_mm, dtype=np.float32)
    if not len(points):
        return np.zeros(0, dtype="U1")
    x, y, z = points.T
    coordinates = tuple(np.ascontiguousarray(part[:, None, None]) for part in (x, y, z))
    front = np.zeros(1, np.float32)
    trunk, organs, bones = (Canvas(coordinates, front, 1.0, patient.texture_mm) for _ in range(3))
    for canvas in (trunk, organs, bones):
        canvas.hu[:] = _UNPAINTED_HU
    paint_trunk(trunk, patient)
    paint_organs(organs, patient)
    paint_skeleton(bones, patient)
    named = np.array([OTHER] + [_PAIRED.get(name, name) for name in FLARE22])
    label = organs.label.ravel()
    in_cavity = cavity_distance(x, y, z) < 0
    place = Region((), x, y, z, patient.texture_mm)
    conditions = {
        "bones": bones.hu.ravel() > _HALF_PAINTED_HU,
        "organ": label > 0,
        "bowel, bladder, small vessels": organs.hu.ravel() > _HALF_PAINTED_HU,
        "lungs and airways": (lung_distance(place) < 0) & (trunk.hu.ravel() < LARGEST_LUNG_HU),
        "heart, mediastinum, lung vessels": in_cavity & (z > diaphragm_height(x, y)),
        "belly fat": in_cavity,
    }
    choices = [named[label] if name == "organ" else np.full(len(points), name) for name in conditions]
    return np.select(list(conditions.values()), choices, "wall: muscle, fat, skin")
