"""A picture of paired crops: does the key show the same place as the query, and do the masks lie where they should?

Each row is one pair: the query in three planes through its centre (`datasets.ct.planes`), then the key. Masked blocks
are tinted, a cross marks the matched point.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.ct.planes import PLANES, cut_plane, pixel_aspect
from datasets.samples.masks import upsample_mask
from datasets.samples.pairings import PAIR_KINDS


def samples_of(batch: Mapping[str, torch.Tensor], num: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The first `num` samples of a collated batch as single samples (None = all)."""
    size = len(batch["score"])
    return [{key: value[i] for key, value in batch.items()} for i in range(size if num is None else min(num, size))]


def draw_pair_sheet(
    samples: Sequence[Mapping[str, torch.Tensor]], path: str | Path, store=None, view: str = "target"
) -> None:
    """Write the sheet of `pair_figure` as a picture file (suffix of `path`: .png, .pdf, ...); folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pair_figure(samples, store, view).savefig(path, dpi=80)


def pair_figure(samples: Sequence[Mapping[str, torch.Tensor]], store=None, view: str = "target") -> Figure:
    """Draw samples of `PairedCropDataset` as rows of query and key planes.

    Args:
        samples: single samples (see `samples_of` for a batch).
        store: the volume store, for case names and voxel spacing; without it cases are numbered and voxels cubes.
        view: "target" (not augmented), "student" or "teacher".

    Returns:
        a figure (no window is opened); `SummaryWriter.add_figure` takes it too.
    """
    if not samples:
        raise ValueError("a pair sheet needs at least one sample")
    suffix = "" if view == "target" else f"_{view}"
    figure = Figure(figsize=(13, 2.6 * len(samples)))
    axes = figure.subplots(len(samples), 6, squeeze=False)
    figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.4 / (2.6 * len(samples)), wspace=0.03, hspace=0.28)
    for row, sample in zip(axes, samples):
        row[0].text(0, 1.14, _title(sample, store), transform=row[0].transAxes, fontsize=9)
        for side, columns in (("query", row[:3]), ("key", row[3:])):
            image = sample[side + suffix][0].float().cpu().numpy()
            block_vox = image.shape[0] // sample[f"{side}_mask"].shape[0]
            mask = upsample_mask(sample[f"{side}_mask"].cpu(), block_vox).numpy()
            spacing = _case(store, sample[f"{side}_case"])[1]
            for axis, plane in zip(columns, PLANES):
                pictures = (cut_plane(array, plane) for array in (image, mask))
                _draw_plane(axis, f"{side} {plane}", *pictures, pixel_aspect(plane, spacing))
    return figure


def _draw_plane(axis, label: str, image: np.ndarray, mask: np.ndarray, aspect: float) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    tint = np.zeros((*mask.shape, 4), dtype=np.float32)
    tint[mask] = (0.1, 0.5, 1.0, 0.2)
    axis.imshow(tint, aspect=aspect, interpolation="nearest")
    axis.plot((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2, "+", color="yellow", markersize=9, markeredgewidth=1)
    axis.set_title(label, fontsize=7, pad=2)
    axis.set_axis_off()


def _title(sample: Mapping[str, torch.Tensor], store) -> str:
    """Cases, kind, score, and where both crops are centred (mm)."""

    def place(side: str) -> str:
        x, y, z = sample[f"{side}_mm"].tolist()
        return f"{_case(store, sample[f'{side}_case'])[0]} ({x:.0f}, {y:.0f}, {z:.0f}) mm"

    kind = PAIR_KINDS[int(sample["pair_kind"])] + (", fallback" if bool(sample["is_fallback"]) else "")
    return f"{place('query')}  |  {place('key')}     {kind}, score {float(sample['score']):.2f}"


def _case(store, index: torch.Tensor) -> tuple[str, tuple[float, float, float]]:
    """Name and voxel spacing (mm) of a case."""
    if store is None:
        return f"case {int(index)}", (1.0, 1.0, 1.0)
    record = store.record(store.names[int(index)])
    return record.name, tuple(record.spacing_mm)
