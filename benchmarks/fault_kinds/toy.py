"""A corpus and networks small enough for hundreds of runs: six bodies of waves, crops of 32 x 32 x 16 voxels."""

import shutil
from pathlib import Path

import numpy as np

from benchmarks.corpus import make_rows, make_store
from benchmarks.results import words
from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case, write_data_list
from datasets.samples.correspondences import CorrespondenceTable

NUM_TRAINING, NUM_VALIDATION = 4, 2
SHAPE, SPACING_MM = (56, 44, 44), 4.0
NUM_STEPS, STEPS_PER_EPOCH = 12, 3
COMMON = {
    **{"backbone": "unet", "feature_size": 6, "roi_z": 32, "roi_y": 32, "roi_x": 16, "batch_size": 2},
    **{"epochs": NUM_STEPS // STEPS_PER_EPOCH, "steps_per_epoch": STEPS_PER_EPOCH, "warmup_epochs": 1, "lr": 1e-3},
    **{"val_freq": 1, "num_val_pairs": 4, "keep_freq": 1, "picture_freq": 0, "log_freq": 1, "num_workers": 0},
    **{"device": "cpu", "precision": "fp32"},
}
HEADS = {"out_dim": 16, "head_hidden_dim": 32, "head_bottleneck_dim": 8}
METHOD_FLAGS = {
    "alice": {
        **HEADS,
        **{"casa_heads": 2, "casa_head_dim": 8, "casa_hidden_dim": 16, "warmup_teacher_temp_epochs": 1},
        **{"min_score": 0, "mask_block": 16},
    },
    "simsiam": {"projector_hidden_dim": 16, "projector_dim": 16, "predictor_dim": 8},
    "caid": {"queue_size": 8, "caid_dim": 8},
}


def make_toy_corpus(folder: Path) -> Path:
    """CT files, `list.json`, `store` and `embeddings` (a table) in a folder; kept where they are complete."""
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = [write_body(folder, number) for number in range(NUM_TRAINING + NUM_VALIDATION)]
    write_data_list(folder / "list.json", folder, cases[:NUM_TRAINING], cases[NUM_TRAINING:])
    store = make_store(cases, folder / "store", spacing_mm=(SPACING_MM,) * 3)
    sources = {name: store.record(name).identity for name in store.names}
    CorrespondenceTable.write(folder / "embeddings", store.names, make_rows(store, 50), {}, sources)
    (folder / "complete").touch()
    return folder


def write_body(folder: Path, number: int) -> Case:
    """An ellipsoid of waves and noise in air."""
    rng = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij"))
    waves = sum(np.sin(rng.uniform(3, 9) * along + rng.uniform(0, 6)) for along in grid)
    hu = np.where((grid**2).sum(axis=0) < 1.2, 40 + 60 * waves + rng.normal(0, 10, SHAPE), -1000)
    affine = SPACING_MM * np.eye(4)[[2, 1, 0, 3]]
    affine[3, 3] = 1
    case = Case(f"Case_{number:05d}", folder / f"Case_{number:05d}.nii.gz")
    write_nifti(case.image, hu.round().astype(np.int16), affine)
    return case


def toy_flags(method: str, corpus: Path, output_dir: Path, **changed: object) -> tuple[str, ...]:
    """main_ddp.py's command line for a toy run."""
    paths = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store"}
    paths |= {"embed_dir": corpus / "embeddings", "output_dir": output_dir}
    return words(**{"method": method} | COMMON | METHOD_FLAGS[method] | paths | changed)
