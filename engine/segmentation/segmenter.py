"""A finetuned network opened for use."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets.ct.geometry import resample
from datasets.ct.nifti import Volume
from datasets.lists.label_classes import LabelClasses
from engine.checkpoint import CheckpointError, load_checkpoint, load_strictly, require
from engine.device import pick_precision
from engine.segmentation.setup import KIND, Preprocessing
from engine.segmentation.sliding_window import WindowOptions, segment_volume
from models.segmenters import SEGMENTERS


@dataclass(frozen=True)
class Segmenter:
    """A network in evaluation mode, what its channels mean, and how it is slid over volumes.

    Attributes:
        spacing_mm: (D, H, W) of its grid; None = each file's own.
    """

    network: nn.Module
    classes: LabelClasses
    spacing_mm: tuple[float, float, float] | None
    windows: WindowOptions
    device: torch.device

    @property
    def is_2d(self) -> bool:
        """Whether the network sees single slices."""
        return self.windows.roi[0] == 1

    def on_own_grid(self, volume: Volume) -> Volume:
        """HU at the network's spacing, resampled as the volume store does it."""
        if self.spacing_mm is None:
            return volume
        return Volume(*resample(volume.array, volume.affine, self.spacing_mm), volume.path)

    def segment(self, volume: Volume, target: Volume) -> np.ndarray:
        """uint8 channels on the grid of `target`; `volume` is HU on the network's grid."""
        return segment_volume(
            self.network, volume.array, volume.affine, target.shape, target.affine, self.windows, self.device
        )


def open_segmenter(
    checkpoint_file: str | Path,
    device: torch.device,
    overlap: float = 0.5,
    window_batch: int = 2,
    precision: str = "auto",
) -> Segmenter:
    """Read best.pth or checkpoint.pth of a finetuning run.

    Args:
        overlap, window_batch: see `WindowOptions`.
        precision: see `engine.device.pick_precision`.

    Raises:
        CheckpointError: not a checkpoint of a finetuning run.
    """
    state = load_checkpoint(checkpoint_file, KIND)
    names = ("backbone", "classes", "model", "preprocessing")
    require(state, names, checkpoint_file, "best.pth or checkpoint.pth of a finetuning run")
    backbone, classes = state["backbone"], LabelClasses.from_dict(state["classes"])
    if backbone["name"] not in SEGMENTERS:
        known = ", ".join(SEGMENTERS)
        raise CheckpointError(f"{checkpoint_file}: its network is {backbone['name']!r}; known are {known}")
    known, precision = Preprocessing.from_dict(state["preprocessing"]), pick_precision(precision, device)
    network = SEGMENTERS[backbone["name"]].build(
        backbone["in_channels"], len(classes), backbone["feature_size"], spatial_dims=known.spatial_dims
    )
    load_strictly(network, state["model"], "network", checkpoint_file)
    windows = WindowOptions(known.roi, known.hu_min, known.hu_max, overlap, window_batch, precision)
    return Segmenter(network.to(device).eval(), classes, known.spacing_mm, windows, device)
