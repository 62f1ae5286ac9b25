"""A corpus of phantoms to measure on: files, data list, store and matches, and main_ddp.py's flags for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import main_ddp
from datasets.ct.geometry import index_to_world
from datasets.lists.data_list import Case, write_data_list
from datasets.phantom.cases import PhantomCase, case_files, render, write_case
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.dataset import CropDataset
from datasets.store.volumes import VolumeStore, build_store
from engine.distributed import World
from engine.pretrain_data import open_data
from models.methods import Alice


def write_phantoms(
    folder: Path, num_cases: int, range_name: str, coarsen: float = 1.0, full_size: bool = False
) -> list[Case]:
    """Unlabelled phantoms as a user would have them: gzipped, in the orientation and storage that their scanner chose.

    Args:
        range_name, coarsen, full_size: of `PhantomCase`.
    """
    cases = []
    for number in range(1, num_cases + 1):
        phantom = PhantomCase(f"Case_{number:05d}", 0, number, False, full_size, range_name, coarsen)
        write_case(folder, phantom)
        cases.append(Case(phantom.name, case_files(folder, phantom)["image"]))
    return cases


def phantom_hu(shape: Sequence[int]) -> np.ndarray:
    """HU, int16 [D, H, W], of a phantom, mirrored where it is too small."""
    return fit(render(PhantomCase("torso", 0, 0, False)).hu.transpose(2, 1, 0), shape).astype(np.int16)


def fit(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The middle of a volume, mirrored at its ends as far as it is too small."""
    mirrored = np.pad(array, [(0, max(0, side - size)) for side, size in zip(shape, array.shape)], mode="symmetric")
    first = [(size - side) // 2 for size, side in zip(mirrored.shape, shape)]
    return np.ascontiguousarray(mirrored[tuple(slice(start, start + side) for start, side in zip(first, shape))])


def make_store(cases: Sequence[Case], folder: Path, **options) -> VolumeStore:
    """The volume store of some cases; `options` are those of `build_store`.

    Raises:
        RuntimeError: some case could not be stored.
    """
    report = build_store(cases, folder, progress=False, **options)
    if report.failed:
        raise RuntimeError(f"the store is incomplete: {report.failed}")
    return VolumeStore(folder)


def make_corpus(cases: Sequence[Case], folder: Path, rows_per_case: int, **options) -> None:
    """Data list, store (with `options` of `build_store`) and a table of matches: all that `corpus_flags` names."""
    write_data_list(folder / "list.json", folder, cases)
    store = make_store(cases, folder / "store", **options)
    CorrespondenceTable.write(folder / "embeddings", store.names, make_rows(store, rows_per_case), {})


def make_rows(store: VolumeStore, num_per_case: int) -> np.ndarray:
    """Matches of each case with random others: the same relative place of the two bodies."""
    rng = np.random.default_rng(0)
    rows = np.zeros(num_per_case * len(store), ROW_DTYPE)
    for query, name in enumerate(store.names):
        part = rows[query * num_per_case : (query + 1) * num_per_case]
        others = (query + rng.integers(1, len(store), num_per_case)) % len(store)
        places = rng.uniform(0.1, 0.9, (num_per_case, 3))
        part["query_case"], part["key_case"] = query, others
        part["query_mm"] = world_places(store.record(name), places)
        part["key_mm"] = [world_places(store.record(store.names[key]), place) for key, place in zip(others, places)]
    rows["score"], rows["cycle_mm"] = 0.9, 3.0
    return rows


def world_places(record, places: np.ndarray) -> np.ndarray:
    """World mm of relative places ([..., 3], 0 to 1) of the body's box."""
    return index_to_world(record.affine, record.body_start + places * (record.body_stop - 1 - record.body_start))


def corpus_flags(folder: Path, roi: int) -> dict[str, object]:
    """main_ddp.py's flags for a corpus, its output beside it, and cubic crops."""
    paths = {"data_dir": folder, "json_list": folder / "list.json", "store_dir": folder / "store"}
    paths |= {"embed_dir": folder / "embeddings", "output_dir": folder / "run"}
    return paths | {f"roi_{axis}": roi for axis in "xyz"}


def open_training(words: Sequence[str]) -> CropDataset:
    """The dataset that main_ddp.py trains Alice with, by its command line."""
    return open_data(main_ddp.make_flags().parse_args(list(words)), Alice, World()).training
