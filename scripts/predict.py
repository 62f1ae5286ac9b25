"""Segment one CT with a finetuned network; the label map lies on the image's own voxels.

    python scripts/predict.py IMAGE.nii.gz LABELS.nii.gz --checkpoint_file results/finetune/best.pth
    python scripts/predict.py IMAGE.nii.gz LABELS.nii.gz --checkpoint_file best.pth --device cpu --overlap 0.25

The image may have any size, spacing and orientation. Memory stays bounded: the volume itself (4 bytes a voxel) and a
slab as thick as a window; nothing grows with the number of organs times the volume.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from datasets.file_grid import read_file_grid, write_label_like
from datasets.geometry import resample
from datasets.label_classes import LabelClasses
from datasets.nifti import Volume, read_ct
from engine.checkpoint import CheckpointError, load_checkpoint, load_strictly
from engine.distributed import pick_device
from engine.finetune import KIND
from engine.finetune_setup import Preprocessing
from engine.flags import make_parser, run_main
from engine.precision import pick_precision
from engine.sliding_window import WindowOptions, segment_volume
from models.segmenters import SEGMENTERS


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


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("image", type=str, help="CT to segment, .nii or .nii.gz")
    parser.add_argument("output", type=str, help="label map to write, .nii or .nii.gz")
    parser.add_argument("--checkpoint_file", type=str, required=True, help="best.pth of a finetuning run")
    parser.add_argument("--overlap", type=float, default=0.5, help="overlap of windows, 0 to below 1")
    parser.add_argument("--window_batch", type=int, default=1, help="windows per forward pass")
    parser.add_argument(
        "--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one"
    )
    parser.add_argument(
        "--precision", type=str, choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto = bf16 on CUDA"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if not flags.output.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{flags.output}: expected a name ending in .nii or .nii.gz")
    device = pick_device(flags.device, 0)
    segmenter = open_segmenter(flags.checkpoint_file, device)
    options = segmenter.window_options(flags.overlap, flags.window_batch, pick_precision(flags.precision, device))
    volume, grid = read_ct(flags.image), read_file_grid(flags.image)
    hu, affine = on_network_grid(volume, segmenter.preprocessing.spacing_mm)
    found = segment_volume(segmenter.network, hu, affine, volume.shape, volume.affine, options, device)
    write_label_like(flags.output, segmenter.classes.to_values(found), grid)
    voxel_ml = float(np.prod(volume.spacing_mm)) / 1000
    counts = np.bincount(found.ravel(), minlength=len(segmenter.classes))
    for name, value, count in zip(segmenter.classes.names[1:], segmenter.classes.values[1:], counts[1:]):
        print(f"{value:4d} {name}: {count * voxel_ml:.1f} ml")
    print(f"wrote {flags.output}: {' x '.join(map(str, grid.shape))} voxels, as {flags.image}")


if __name__ == "__main__":
    run_main(main)
