"""The pictures of a run; drawn here: what the student saw, what it made of the hidden blocks, and the truth.

What the networks look at is drawn in `engine.watch.feature_pictures`, the pairs by whom the caller names.

Arrays are [D, H, W] in the canonical orientation; planes are those of `datasets.ct.planes`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from datasets.ct.planes import cut_plane, pixel_aspect
from engine.device import autocast
from engine.logging import RunLog
from engine.loop import evaluating
from engine.run import RunState
from engine.watch.feature_pictures import attention_figure, feature_figure, look
from models.methods.alice import AliceStudent, AliceTeacher

NUM_PICTURED = 2
PLANES = ("axial", "coronal")
COLUMNS = ("crop", "seen by the student", "reconstruction", "hidden blocks filled")


def draw_pictures(
    run: RunState,
    batch: dict,
    step: int,
    store,
    precision: str,
    output_dir: Path,
    log: RunLog,
    draw_pairs: Callable[[dict], Figure],
) -> None:
    """The sheets of a batch's first pairs, to TensorBoard and (the latest of each) as PNG into the run's folder."""
    batch = {name: value[:NUM_PICTURED] for name, value in batch.items()}
    log.image("pairs", figure_pixels(draw_pairs(batch)), step)
    for name, figure in sheets(run.student, run.teacher, batch, store, precision).items():
        log.image(name, figure_pixels(figure), step)
        try:
            save_figure(figure, output_dir / f"{name}.png")
        except OSError as error:  # a full disk does not end the training
            log.warn_once(f"pictures cannot be written to {output_dir}", error)


def sheets(student: AliceStudent, teacher: AliceTeacher, batch: dict, store, precision: str = "fp32") -> dict:
    """What the networks make of the pairs of a batch: {name: figure}, without those that switched-off objectives lack.

    Args:
        student, teacher: on one device; in evaluation mode while they are used, their modes come back.
        batch: of `PairedCropDataset`, on the CPU.
        store: the volume store, for names and voxel sizes.
        precision: fp32, bf16 or fp16.
    """
    order, titles, voxel_mm = describe_views(batch, store)
    looks = look(student, teacher, batch, precision)
    crops = torch.cat([batch["query_teacher"], batch["key_teacher"]])[order]
    found = {"features": feature_figure(crops, looks.features[order], titles, voxel_mm)}
    if looks.student is not None:
        attention, strides = (looks.student[order], looks.teacher[order]), (student.query_stride, student.key_stride)
        found["attention"] = attention_figure(crops, attention, strides, titles, voxel_mm)
    reconstructions = reconstruction_sheet(student, batch, store, precision)
    return found if reconstructions is None else found | {"reconstruction": reconstructions}


def describe_views(batch: dict, store) -> tuple[list[int], list[str], tuple[float, float, float]]:
    """The rows of joined queries and keys in the order Q1 K1 Q2 K2 ..., their titles, and the voxel size in mm."""
    num_pairs = len(batch["query"])
    order = [row for pair in range(num_pairs) for row in (pair, num_pairs + pair)]
    cases = [store.names[int(index)] for index in torch.cat([batch["query_case"], batch["key_case"]])[order]]
    titles = [f"{side} {case}" for side, case in zip(("query", "key") * num_pairs, cases)]
    return order, titles, store.record(cases[0]).spacing_mm


@torch.no_grad()
def reconstruction_sheet(student: nn.Module, batch: dict, store, precision: str = "fp32") -> Figure | None:
    """What the student makes of the pairs of a batch, query and key of each.

    Args:
        student: called as in training, in evaluation mode; its own mode comes back afterwards.
        batch: of `PairedCropDataset`, on the CPU.
        store: the volume store, for names and voxel sizes.
        precision: fp32, bf16 or fp16.

    Returns:
        The figure, or None when the student reconstructs nothing (--lambda3 0).
    """
    device = next(student.parameters()).device
    views = [batch[name].to(device) for name in ("query_student", "query_mask", "key_student", "key_mask")]
    with evaluating(student), autocast(precision, device):
        made = student.forward(*views).reconstruction  # never compiled for this one batch size
    if made is None:
        return None
    order, titles, voxel_mm = describe_views(batch, store)
    crops, seen, masks = (torch.cat([batch["query" + s], batch["key" + s]])[order] for s in ("", "_student", "_mask"))
    return reconstruction_figure(crops, seen, masks, made.cpu()[order], titles, voxel_mm)


def reconstruction_figure(
    crops: torch.Tensor,
    views: torch.Tensor,
    masks: torch.Tensor,
    reconstructions: torch.Tensor,
    titles: list[str],
    voxel_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Figure:
    """One row per view: the four columns of `COLUMNS` in the axial plane, then in the coronal one.

    Args:
        crops: [N, 1, D, H, W] in [0, 1], un-augmented.
        views: [N, 1, D, H, W] in [0, 1], the student's augmented views, not yet masked.
        masks: bool [N, d, h, w] block masks, True = hidden from the student.
        reconstructions: [N, 1, D, H, W], the student's output.
        titles: one per view.
        voxel_mm: voxel size (D, H, W), for the pictures' proportions.
    """
    figure = Figure(figsize=(16, 2.3 * len(titles) + 0.3), layout="constrained")
    axes = figure.subplots(len(titles), 2 * len(COLUMNS), squeeze=False)
    for index, title in enumerate(titles):
        crop, view, made = (tensor[index, 0].float().cpu().numpy() for tensor in (crops, views, reconstructions))
        hidden = spread_mask(masks[index].cpu().numpy(), crop.shape)
        volumes = (crop, np.where(hidden, np.nan, view), made, np.where(hidden, made, crop))
        pictures = [(plane, name, volume) for plane in PLANES for name, volume in zip(COLUMNS, volumes)]
        for axis, (plane, name, volume) in zip(axes[index], pictures):
            show(axis, cut_plane(volume, plane), pixel_aspect(plane, voxel_mm))
            axis.set_title(f"{plane}: {name}", fontsize=7, pad=2)
        axes[index, 0].set_ylabel(title, fontsize=7)
    return figure


def spread_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A block mask bool [d, h, w] spread to voxels bool [D, H, W]."""
    for axis, (blocks, voxels) in enumerate(zip(mask.shape, shape)):
        mask = np.repeat(mask, voxels // blocks, axis=axis)
    return mask


def show(axis, picture: np.ndarray, aspect: float) -> None:
    """Draw one plane in grey; hidden voxels (NaN) in blue."""
    axis.set_facecolor("#3a6ea5")
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
