"""A finetuned network opened for use, and labelled cases judged with it on the store's or on the files' own voxels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.ct.file_grid import check_label_grid, read_file_grid, write_label_like
from datasets.ct.geometry import resample
from datasets.ct.nifti import Volume, read_ct, read_label
from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.lists.label_classes import LabelClasses
from datasets.store.volumes import VolumeStore
from engine.checkpoint import CheckpointError, load_checkpoint, load_strictly
from engine.distributed import World
from engine.segmentation.evaluation import Evaluation, EvaluationCase, evaluate
from engine.segmentation.loop import KIND
from engine.segmentation.pictures import save_overlay
from engine.segmentation.report import write_report
from engine.segmentation.setup import Preprocessing
from engine.segmentation.sliding_window import WindowOptions
from models.segmenters import SEGMENTERS

OVERLAY = "worst_and_best.png"
EVALUATION = "evaluation"  # folder of a finetuning run's judgement of its best network


@dataclass(frozen=True)
class Segmenter:
    """A finetuned network, what its channels mean, and how it wants its input."""

    network: nn.Module
    classes: LabelClasses
    preprocessing: Preprocessing

    def window_options(self, overlap: float, batch_size: int, precision: str) -> WindowOptions:
        """How to slide it."""
        known = self.preprocessing
        return WindowOptions(known.roi, known.hu_min, known.hu_max, overlap, batch_size, precision)


def open_segmenter(checkpoint_file: str | Path, device: torch.device) -> Segmenter:
    """Read best.pth or checkpoint.pth of a finetuning run; the network comes in evaluation mode.

    Raises:
        CheckpointError: not such a file.
    """
    state = load_checkpoint(checkpoint_file, KIND)
    backbone, classes = state["backbone"], LabelClasses.from_dict(state["classes"])
    if backbone["name"] not in SEGMENTERS:
        known = ", ".join(SEGMENTERS)
        raise CheckpointError(f"{checkpoint_file}: its network is {backbone['name']!r}; known are {known}")
    kind = SEGMENTERS[backbone["name"]]
    network = kind.build(backbone["in_channels"], len(classes), backbone["feature_size"])
    load_strictly(network, state["model"], "network", checkpoint_file)
    return Segmenter(network.to(device).eval(), classes, Preprocessing.from_dict(state["preprocessing"]))


def on_network_grid(volume: Volume, spacing_mm: tuple[float, float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """HU and affine at the network's spacing, made as the volume store makes them."""
    if spacing_mm is None:
        return volume.array, volume.affine
    return resample(volume.array, volume.affine, spacing_mm)


@dataclass(frozen=True)
class StoreGridCases:
    """Cases judged on the volume store's grid: quick, for validation during training."""

    store: VolumeStore
    classes: LabelClasses

    def __call__(self, name: str) -> EvaluationCase:
        volume, label = self.store.read(name), self.store.read_label(name)
        truth = self.classes.to_classes(label.array)
        return EvaluationCase(name, volume.array, volume.affine, truth, label.affine, label.spacing_mm)


@dataclass(frozen=True)
class FileGridCases:
    """Cases judged on the voxels of their label files; volumes come from the store where it has them.

    Attributes:
        cases: name -> files.
        store: at the network's spacing, or None.
        with_pictures: whether to read the images for pictures.
    """

    cases: dict[str, Case]
    classes: LabelClasses
    spacing_mm: tuple[float, float, float] | None
    store: VolumeStore | None = None
    with_pictures: bool = True

    def __call__(self, name: str) -> EvaluationCase:
        case = self.cases[name]
        label = read_label(case.label)
        in_store = self.store is not None and name in self.store
        image = read_ct(case.image) if self.with_pictures or not in_store else None
        if case.image.exists():  # else the store stands alone
            check_label_grid(label, case.image)
        if in_store:
            stored = self.store.read(name)
            hu, affine = stored.array, stored.affine
        else:
            hu, affine = on_network_grid(image, self.spacing_mm)
        truth = self.classes.to_classes(label.array)
        shown = image.array if self.with_pictures else None
        return EvaluationCase(name, hu, affine, truth, label.affine, label.spacing_mm, shown)


def labelled_cases(json_list: str, data_dir: str, section: str) -> list[Case]:
    """The cases of a section that have labels.

    Raises:
        DataListError: there are none.
    """
    cases = [case for case in load_data_list(json_list, data_dir, section) if case.label is not None]
    if not cases:
        raise DataListError(f"{json_list}: no case of {section!r} has a label (--section)")
    return cases


def usable_store(store_dir: str, spacing_mm: tuple[float, float, float] | None) -> VolumeStore | None:
    """The store of `store_dir` at the network's spacing; None where no folder is named."""
    return VolumeStore(store_dir, expected_spacing_mm=spacing_mm or "native") if store_dir else None


def prediction_writer(folder: Path, cases: dict[str, Case], classes: LabelClasses) -> Callable[[str, np.ndarray], None]:
    """Writes label maps `folder/<case>.nii.gz` on the labels' own grids."""

    def write(name: str, predicted: np.ndarray) -> None:
        write_label_like(folder / f"{name}.nii.gz", classes.to_values(predicted), read_file_grid(cases[name].label))

    return write


def judge_on_files(
    segmenter: Segmenter,
    cases: list[Case],
    store: VolumeStore | None,
    options: WindowOptions,
    world: World,
    nsd_mm: float,
    output_dir: str | Path,
    description: dict,
    with_pictures: bool = True,
    save_predictions: bool = False,
) -> Evaluation:
    """Evaluate on the files' own grids; rank 0 writes cases.csv, results.md, results.json and the overlay picture."""
    output_dir, by_name = Path(output_dir), {case.name: case for case in cases}
    load = FileGridCases(by_name, segmenter.classes, segmenter.preprocessing.spacing_mm, store, with_pictures)
    writer = prediction_writer(output_dir / "predictions", by_name, segmenter.classes) if save_predictions else None
    names = segmenter.classes.names
    judged = evaluate(
        segmenter.network, load, list(by_name), names, options, world, nsd_mm, writer, progress=len(cases) > 1
    )
    if world.is_main:
        write_report(output_dir, judged.scores, description | {"NSD tolerance in mm": nsd_mm})
        views = judged.worst_and_best()
        if views:
            save_overlay(output_dir / OVERLAY, views, names)
    return judged
