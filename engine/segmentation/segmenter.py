"""A finetuned network opened for use."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.ct.formats import EXPECTED
from datasets.ct.images import CT, MR, RADIOGRAPH, kind_of
from datasets.ct.nifti import Volume
from datasets.lists.label_classes import LabelClasses
from engine.checkpoint import CheckpointError, load_checkpoint, load_strictly, require
from engine.device import pick_precision
from engine.segmentation.memory import Recall, RecallOptions, open_recall
from engine.segmentation.prior import Prior, fuse
from engine.segmentation.setup import KIND, Preprocessing
from engine.segmentation.sliding_window import (
    Size3,
    WindowOptions,
    axis_map,
    probability_slices,
    restored_slices,
    segment_volume,
)
from models.segmenters import SEGMENTERS


@dataclass(frozen=True)
class Segmenter:
    """A network in evaluation mode, what its channels mean, and how it is slid over volumes.

    Attributes:
        preprocessing: of its input; `spacing_mm` None = each file's own grid.
        windows: how it is slid; `segment` sets their HU for each volume.
        recall: the labelled cases that help it; None = it has none, or they are not asked.
        in_channels: of the network's input.
    """

    network: nn.Module
    classes: LabelClasses
    preprocessing: Preprocessing
    windows: WindowOptions
    device: torch.device
    recall: Recall | None = None
    in_channels: int = 1

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        return self.preprocessing.spacing_mm

    @property
    def is_2d(self) -> bool:
        """Whether the network sees single slices."""
        return self.preprocessing.spatial_dims == 2

    def check_image(self, path: str | Path) -> None:
        """Raise ValueError where a file is not of the kind of images that the network was finetuned on."""
        if (kind_of(path) == RADIOGRAPH) != (self.preprocessing.images == RADIOGRAPH):
            names = {CT: f"CT ({EXPECTED})", RADIOGRAPH: "radiographs (.png)", MR: f"MR ({EXPECTED})"}
            raise ValueError(f"{path}: the network (--checkpoint_file) segments {names[self.preprocessing.images]}")

    def on_own_grid(self, volume: Volume) -> Volume:
        """HU at the network's spacing, resampled as the volume store does it.

        Raises:
            ValueError: the volume has another number of channels than the network takes.
        """
        if volume.num_channels != self.in_channels:
            raise ValueError(
                f"{volume.path}: holds {volume.num_channels} channels, the network (--checkpoint_file) takes "
                f"{self.in_channels}"
            )
        return self.preprocessing.on_own_grid(volume)

    def segment(
        self, volume: Volume, target: Volume, prior: Prior | None = None, keep_plain: bool = False
    ) -> np.ndarray:
        """Channels on the grid of `target`.

        Args:
            volume: HU, or stored grey, on the network's grid.
            prior: of `recall`, for this volume's grid; None = the network alone.
            keep_plain: also give the channels that the network finds alone.

        Returns:
            uint8 [D, H, W]; with `keep_plain` [2, D, H, W]: with the prior, and without.
        """

        def adjust(slices: Iterator[Tensor]) -> Iterator[Tensor]:
            if prior is not None:
                return fuse(slices, prior, volume.shape, volume.affine, keep_plain)
            return (torch.stack([plain, plain]) for plain in slices) if keep_plain else slices

        return segment_volume(
            self.network,
            volume.array,
            volume.affine,
            target.shape,
            target.affine,
            self.preprocessing.windows_for(volume, self.windows),
            self.device,
            adjust,
        )

    def slices(self, volume: Volume) -> Iterator[Tensor]:
        """The network's class probabilities [C, H, W] of every slice; `volume` as for `segment`."""
        hu = torch.from_numpy(np.ascontiguousarray(volume.array))
        return probability_slices(self.network, hu, self.preprocessing.windows_for(volume, self.windows), self.device)

    @torch.no_grad()
    def probabilities(self, volume: Volume, shape: Size3, affine: np.ndarray) -> Tensor:
        """Class probabilities of a volume [C, *shape] on a grid over the same box, on the CPU.

        Args:
            volume: HU, or stored grey, on any grid.
            shape, affine: of the result; its axes are the volume's.
        """
        own = self.on_own_grid(volume)
        mapping = axis_map(own.affine, affine)
        planes = restored_slices(self.slices(own), own.shape, mapping, tuple(shape))
        return torch.stack([plane.cpu() for plane in planes], dim=1)


def open_segmenter(
    checkpoint_file: str | Path,
    device: torch.device,
    overlap: float = 0.5,
    window_batch: int = 2,
    precision: str = "auto",
    recall: RecallOptions | None = None,
) -> Segmenter:
    """Read best.pth or checkpoint.pth of a finetuning run.

    Args:
        overlap, window_batch: see `WindowOptions`.
        precision: see `engine.device.pick_precision`.
        recall: use its memory, where it has one; None = the network alone.

    Raises:
        CheckpointError: not a checkpoint of a finetuning run.
        ValueError: the memory's SAM is missing or another one, or a SAM is named and there is no memory.
    """
    state = load_checkpoint(checkpoint_file, KIND)
    names = ("backbone", "classes", "model", "preprocessing")
    require(state, names, checkpoint_file, "best.pth or checkpoint.pth of a finetuning run")
    backbone, classes = state["backbone"], LabelClasses.from_dict(state["classes"])
    if backbone["name"] not in SEGMENTERS:
        known = ", ".join(SEGMENTERS)
        raise CheckpointError(f"{checkpoint_file}: its network is {backbone['name']!r}; known are {known}")
    known, precision = Preprocessing.from_dict(state["preprocessing"]), pick_precision(precision, device)
    sizes = backbone["in_channels"], len(classes), backbone["feature_size"]
    # Checkpoints from before there were hypercolumns do not name them.
    further = {"spatial_dims": known.spatial_dims, "hypercolumns": backbone.get("hypercolumns", False)}
    network = SEGMENTERS[backbone["name"]].build(*sizes, **further)
    load_strictly(network, state["model"], "network", checkpoint_file)
    windows = WindowOptions(known.roi, overlap=overlap, window_batch=window_batch, precision=precision)
    recalled = None if recall is None else recall_of(state, checkpoint_file, recall, device)
    in_channels = backbone["in_channels"]
    return Segmenter(network.to(device).eval(), classes, known, windows, device, recalled, in_channels)


def recall_of(state: dict, checkpoint_file: str | Path, options: RecallOptions, device: torch.device) -> Recall | None:
    """The memory of a checkpoint in use; None where it has none, or none is wanted.

    Raises:
        ValueError: as `open_segmenter`.
    """
    if not options.memory:
        return None
    if "memory" in state:
        return open_recall(state["memory"], checkpoint_file, options.sam_checkpoint, device)
    if options.sam_checkpoint:
        raise ValueError(
            f"--sam_checkpoint {options.sam_checkpoint}: {checkpoint_file} remembers no cases; leave the flag away, or "
            "finetune with --memory"
        )
    return None
