"""A corpus and a network small enough to pretrain in a second: for tests of main_ddp.py and of what it writes."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.store.volumes import VolumeStore, build_store

SPACING_MM = (2.0, 2.0, 2.0)
# SwinUNETR's deepest stage needs more than one token, hence the 64.
TINY = {
    **{"roi_z": 64, "roi_y": 32, "roi_x": 32, "feature_size": 12, "out_dim": 16, "casa_heads": 2, "casa_head_dim": 8},
    **{"casa_hidden_dim": 16, "head_hidden_dim": 256, "head_bottleneck_dim": 32, "batch_size": 2, "epochs": 1},
    **{"steps_per_epoch": 3, "warmup_epochs": 0.67, "warmup_teacher_temp_epochs": 1, "freeze_last_layer": 0.34},
    **{
        "lr": 1e-3,
        "num_workers": 0,
        "log_freq": 1,
        "picture_freq": 0,
        "val_freq": 0,
        "device": "cpu",
        "precision": "fp32",
    },
}


def make_corpus(folder: Path, num_training: int = 3, num_validation: int = 2) -> Path:
    """NIfTI files of smooth blobs, a data list, a volume store and a correspondence table of random points."""
    rng = np.random.default_rng(0)
    names = [f"case{index}" for index in range(num_training + num_validation)]
    for name in names:
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in (40, 40, 72)), indexing="ij"))
        body = (grid**2).sum(0) < 1.2
        texture = sum(np.sin(grid[axis] * rng.uniform(3, 9) + rng.uniform(0, 6)) for axis in range(3))
        hu = np.where(body, 40 + 60 * texture + rng.normal(0, 10, body.shape), -1000).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([*SPACING_MM[::-1], 1.0])), folder / f"{name}.nii.gz")
    sections = {"training": names[:num_training], "validation": names[num_training:]}
    content = {key: [{"image": f"{name}.nii.gz", "name": name} for name in part] for key, part in sections.items()}
    (folder / "list.json").write_text(json.dumps(content))
    return folder


def add_store_and_table(folder: Path) -> Path:
    """The volume store, and a table whose matches are points of the same place of the grid."""
    from datasets.lists.data_list import load_data_list

    cases = [c for section in ("training", "validation") for c in load_data_list(folder / "list.json", folder, section)]
    build_store(cases, folder / "store", SPACING_MM, progress=False)
    store = VolumeStore(folder / "store")
    rng = np.random.default_rng(1)
    rows = np.zeros(60 * len(store), dtype=ROW_DTYPE)
    for row in rows:
        row["query_case"], row["key_case"] = rng.choice(len(store), 2, replace=False)
        centre = (store.record(store.names[row["query_case"]]).affine @ [36, 20, 20, 1])[:3]
        row["query_mm"] = row["key_mm"] = centre + rng.uniform(-10, 10, 3)
        row["score"], row["cycle_mm"] = rng.uniform(0.6, 1.0), rng.uniform(0, 10)
    CorrespondenceTable.write(folder / "embeddings", store.names, rows, {"spacing_mm": list(SPACING_MM)})
    return folder


def arguments(corpus: Path, output_dir: Path, **changed) -> list[str]:
    """The command line of a tiny run."""
    paths = {"data_dir": ".", "json_list": "list.json", "store_dir": "store", "embed_dir": "embeddings"}
    flags = TINY | {name: corpus / path for name, path in paths.items()} | {"output_dir": output_dir} | changed
    return [f"--{name}={value}" for name, value in flags.items()]


def log_of(output_dir: Path, kind: str = "train") -> list[dict]:
    """The lines of one kind in log.txt."""
    lines = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
