"""Synthetic torsos small enough to train SAM on in seconds: organs at the same places of a bent, scaled body."""

import json
from pathlib import Path

import numpy as np

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import write_nifti

SPACING_MM = 8.0
SHAPE = (36, 24, 32)
# Centre (share of the body's half axes, D H W), radius (mm), HU.
ORGANS = {
    "liver": ((0.3, -0.2, -0.4), 50.0, 110.0),
    "spleen": ((0.3, 0.3, 0.55), 30.0, 60.0),
    "heart": ((0.75, -0.2, 0.2), 36.0, 150.0),
    "bladder": ((-0.75, -0.2, 0.0), 30.0, 0.0),
    "left_kidney": ((-0.1, 0.45, 0.4), 28.0, 220.0),
    "right_kidney": ((-0.2, 0.45, -0.4), 28.0, 220.0),
    "gas": ((-0.4, -0.35, 0.3), 26.0, -700.0),
}


def torso(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, list[float]]]:
    """int16 HU [D, H, W], affine, and the organs' centres in world mm."""
    rng = np.random.default_rng(seed)
    affine = np.array([[0, 0, -SPACING_MM, 120], [0, -SPACING_MM, 0, 90], [SPACING_MM, 0, 0, -140], [0, 0, 0, 1.0]])
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    place = (index - (np.array(SHAPE) - 1) / 2) * SPACING_MM
    half = np.array([150.0, 75.0, 105.0]) * rng.uniform(0.88, 1.12, 3)
    hu = np.where((place[..., 1:] / half[1:]) ** 2 @ np.ones(2) < 1, 30.0, -1000.0)
    spine = np.linalg.norm(place[..., 1:] - [0.75 * half[1], 0], axis=-1) < 16
    hu[spine] = 500
    centres = {}
    for name, (share, radius, value) in ORGANS.items():
        centre = np.array(share) * half + rng.normal(0, 5, 3)
        hu[np.linalg.norm(place - centre, axis=-1) < radius * rng.uniform(0.9, 1.1)] = value
        where = index_to_world(affine, centre / SPACING_MM + (np.array(SHAPE) - 1) / 2)
        centres[name] = [float(value) for value in where]
    return (hu + rng.normal(0, 12, SHAPE)).astype(np.int16), affine, centres


def write_torsos(folder: Path, num_training: int, num_validation: int) -> Path:
    """NIfTI files, landmarks/<case>.json and list.json; returns the folder."""
    names = [f"torso{number}" for number in range(num_training + num_validation)]
    (folder / "landmarks").mkdir(parents=True)
    for number, name in enumerate(names):
        hu, affine, centres = torso(number)
        write_nifti(folder / f"{name}.nii.gz", hu, affine)
        (folder / "landmarks" / f"{name}.json").write_text(json.dumps({"case": name, "landmarks_mm": centres}))
    sections = {"training": names[:num_training], "validation": names[num_training:]}
    listed = {key: [{"image": f"{name}.nii.gz", "name": name} for name in part] for key, part in sections.items()}
    (folder / "list.json").write_text(json.dumps(listed))
    return folder
