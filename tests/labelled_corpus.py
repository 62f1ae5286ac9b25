"""Labelled phantoms of a few kilobytes, and the flags of a finetuning run of seconds, for tests."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.lists.data_list import load_data_list
from datasets.store.volumes import build_store

NAMES = {"0": "background", "1": "liver", "2": "spleen", "5": "aorta"}
HU = {0: 20, 1: 110, 2: 180, 5: 220}
# W, H, D as NIfTI files have them.
SHAPE = (44, 36, 40)
SPACING_MM = (3.0, 3.0, 4.0)
ORGANS = {1: ((14, 14, 20), 9.0), 2: ((32, 20, 22), 6.0), 5: ((22, 26, 20), 3.5)}

TINY = {
    **{"backbone": "unet", "feature_size": 8, "roi_x": 32, "roi_y": 32, "roi_z": 32, "spacing_mm": 4, "batch_size": 1},
    **{"steps": 4, "val_freq": 2, "save_freq": 1, "log_freq": 1, "warmup_steps": 0, "lr": 5e-3, "num_workers": 0},
    **{"device": "cpu", "precision": "fp32", "val_overlap": 0, "overlap": 0, "window_batch": 1, "num_val_cases": 1},
}


def labelled_volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and uint8 labels [X, Y, Z]: balls of three organs in a body, at slightly different places."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij"), axis=-1).astype(float)
    middle = (np.array(SHAPE) - 1) / 2
    body = (((grid - middle)[..., :2] / (middle[:2] * 0.95)) ** 2).sum(-1) < 1
    label = np.zeros(SHAPE, dtype=np.uint8)
    for value, (centre, radius) in ORGANS.items():
        label[np.linalg.norm(grid - centre - rng.normal(0, 1, 3), axis=-1) < radius] = value
    hu = np.where(body, np.vectorize(HU.get)(label), -1000) + rng.normal(0, 10, SHAPE)
    return hu.astype(np.int16), label


def make_labelled_corpus(folder: Path, num_training: int = 3, num_validation: int = 2) -> Path:
    """images/, labels/ and list.json; axes in RAS, so that nothing is canonical by chance."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-60, -50, 100)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    names = [f"case{number}" for number in range(num_training + num_validation)]
    for number, name in enumerate(names):
        hu, label = labelled_volume(number)
        nib.save(nib.Nifti1Image(hu, affine), folder / "images" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"{name}.nii.gz")
    entries = [{"image": f"images/{n}_0000.nii.gz", "label": f"labels/{n}.nii.gz", "name": n} for n in names]
    content = {"labels": NAMES, "training": entries[:num_training], "validation": entries[num_training:]}
    (folder / "list.json").write_text(json.dumps(content))
    return folder


def finetune_arguments(corpus: Path, output_dir: Path, **changed) -> list[str]:
    """The command line of a tiny finetuning run."""
    paths = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store"}
    flags = TINY | paths | {"output_dir": output_dir} | changed
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def make_stored_corpus(folder: Path) -> Path:
    """`make_labelled_corpus`, and all of its cases in a 4 mm store below it."""
    make_labelled_corpus(folder)
    cases = [case for name in ("training", "validation") for case in load_data_list(folder / "list.json", folder, name)]
    build_store(cases, folder / "store", (4.0, 4.0, 4.0), progress=False)
    return folder
