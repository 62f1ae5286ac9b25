"""A picture of samples: do the crops of one sample show what the pairing rule promises, and do masks lie right?

Each row is one sample: every crop in three planes through its centre, slices in their own. Masked blocks are tinted, a
cross marks the crop's centre.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.ct.planes import cut_plane, pixel_aspect, planes_of
from models.backbones.interface import upsample_mask

MOST_CROPS = 4  # of a sample that are drawn


def samples_of(batch: Mapping[str, torch.Tensor], num: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The first `num` samples of a collated batch as single samples (None = all)."""
    size = len(batch["score"])
    return [{key: value[i] for key, value in batch.items()} for i in range(size if num is None else min(num, size))]


def draw_sample_sheet(
    samples: Sequence[Mapping[str, torch.Tensor]], path: str | Path, store=None, view: str = "crop"
) -> None:
    """Write the sheet of `sample_figure` as a picture file (suffix of `path`: .png, .pdf, ...); folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_figure(samples, store, view).savefig(path, dpi=80)


def sample_figure(samples: Sequence[Mapping[str, torch.Tensor]], store=None, view: str = "crop") -> Figure:
    """Draw samples of `CropDataset` as rows, three planes for each crop, one for each slice.

    Args:
        samples: single samples (see `samples_of` for a batch).
        store: the volume store, for case names and voxel spacing; without it cases are numbered and voxels cubes.
        view: "crop" (not augmented), or the name of a view that is a picture.

    Returns:
        a figure (no window is opened).
    """
    if not samples:
        raise ValueError("a sample sheet needs at least one sample")
    num_crops = min(MOST_CROPS, len(samples[0]["case"]))
    planes = planes_of(samples[0][view].shape[2:])
    side = 2.1 if len(planes) > 1 else 3.0  # of a picture, inches
    height = (side + 0.5) * len(samples)
    figure = Figure(figsize=((0.2 + side * len(planes)) * num_crops, height))
    axes = figure.subplots(len(samples), len(planes) * num_crops, squeeze=False)
    figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.4 / height, wspace=0.03, hspace=0.6 / side)
    for row, sample in zip(axes, samples):
        row[0].text(0, 1 + 0.3 / side, _title(sample, store, num_crops), transform=row[0].transAxes, fontsize=9)
        for crop in range(num_crops):
            image = sample[view][crop, 0].float().cpu().numpy()
            mask = _voxel_mask(sample, crop, image.shape)
            spacing = _case(store, sample["case"][crop])[1]
            for axis, plane in zip(row[len(planes) * crop :], planes):
                pictures = (cut_plane(array, plane) for array in (image, mask))
                _draw_plane(axis, f"crop {crop + 1} {plane}", *pictures, pixel_aspect(plane, spacing))
    return figure


def _voxel_mask(sample: Mapping[str, torch.Tensor], crop: int, shape: tuple[int, ...]) -> np.ndarray:
    """The crop's block mask spread to voxels; nothing is masked where the sample has none."""
    if "mask" not in sample:
        return np.zeros(shape, dtype=bool)
    return upsample_mask(sample["mask"][crop][None].cpu(), shape)[0, 0].numpy()


def _draw_plane(axis, label: str, image: np.ndarray, mask: np.ndarray, aspect: float) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    tint = np.zeros((*mask.shape, 4), dtype=np.float32)
    tint[mask] = (0.1, 0.5, 1.0, 0.2)
    axis.imshow(tint, aspect=aspect, interpolation="nearest")
    axis.plot((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2, "+", color="yellow", markersize=9, markeredgewidth=1)
    axis.set_title(label, fontsize=7, pad=2)
    axis.set_axis_off()


def _title(sample: Mapping[str, torch.Tensor], store, num_crops: int) -> str:
    """Cases, where the crops are centred (mm), score, and whether the rule fell back."""
    places = []
    for case, point in zip(sample["case"][:num_crops], sample["centre_mm"].tolist()):
        x, y, z = point
        places.append(f"{_case(store, case)[0]} ({x:.0f}, {y:.0f}, {z:.0f}) mm")
    fallback = ", fallback" if bool(sample["is_fallback"]) else ""
    return "  |  ".join(places) + f"     score {float(sample['score']):.2f}{fallback}"


def _case(store, index: torch.Tensor) -> tuple[str, tuple[float, float, float]]:
    """Name and voxel spacing (mm) of a case."""
    if store is None:
        return f"case {int(index)}", (1.0, 1.0, 1.0)
    record = store.record(store.names[int(index)])
    return record.name, tuple(record.spacing_mm)
