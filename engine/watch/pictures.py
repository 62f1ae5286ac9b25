"""The pictures of a run: the samples, the networks' features, and what the method shows of itself.

A method's `look` gives what can be drawn: what the student saw and reconstructed, and where networks attend. Attention
and features are drawn in `engine.watch.feature_pictures`, samples in `engine.watch.sample_sheet`.

Arrays are [D, H, W] in the canonical orientation (indices grow to Superior, Posterior, Left).
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from datasets.ct.planes import planes_of
from datasets.samples.dataset import CropDataset
from engine.device import autocast
from engine.logging import RunLog
from engine.loop import evaluating, on_device
from engine.watch.feature_pictures import PLANES, attention_figure, draw_plane, feature_figure
from engine.watch.sample_sheet import sample_figure, samples_of
from models.methods.method import Method, rows_of

NUM_PICTURED = 2
FEATURE_STRIDE = 8  # of the encoder map that is drawn, voxels
HIDDEN_COLOUR = "#3a6ea5"
COLUMNS = ("crop", "seen by the student", "reconstruction", "hidden blocks filled")


def draw_pictures(
    method: Method, dataset: CropDataset, batch: dict, step: int, precision: str, output_dir: Path, log: RunLog
) -> None:
    """The sheets of a batch's first samples, to TensorBoard and (the latest of each) as PNG into the run's folder."""
    batch = {name: value[:NUM_PICTURED].cpu() for name, value in batch.items()}
    log.image("samples", figure_pixels(sample_figure(samples_of(batch), dataset.store, first_view(dataset))), step)
    for name, figure in sheets(method, dataset, batch, precision).items():
        pixels = figure_pixels(figure)  # once: what takes long is the layout
        log.image(name, pixels, step)
        try:
            Image.fromarray(pixels).save(output_dir / f"{name}.png")
        except OSError as error:  # a full disk does not end the training
            log.warn_once(f"pictures cannot be written to {output_dir}", error)


def first_view(dataset: CropDataset) -> str:
    """The first view that is a picture."""
    return next((name for name, kind in dataset.views.items() if kind != "blocks"), "crop")


def sheets(method: Method, dataset: CropDataset, batch: dict, precision: str = "fp32") -> dict[str, Figure]:
    """What the networks make of the samples of a batch: {name: figure}, without those that the method lacks.

    Args:
        method: in evaluation mode while it is used; its modes come back.
        dataset: where the batch comes from, for names and voxel sizes.
        batch: on the CPU.
        precision: fp32, bf16 or fp16.
    """
    cases = dataset.case_names(batch)
    voxel_mm = dataset.store.record(cases[0]).spacing_mm
    num_crops = batch["case"].shape[1]
    titles = [f"crop {index % num_crops + 1} {case}" for index, case in enumerate(cases)]
    crops = rows_of(batch["crop"])
    features, looks = look(method, batch, precision)
    found = {"features": feature_figure(crops, features, titles, voxel_mm)}
    attention = {name.removeprefix("attention_"): rows for name, rows in looks.items() if name.startswith("attention_")}
    if attention:
        found["attention"] = attention_figure(crops, attention, titles, voxel_mm)
    if "reconstruction" in looks:
        made = (looks["seen"], looks["reconstruction"])
        found["reconstruction"] = reconstruction_figure(looks.get("target", crops), *made, titles, voxel_mm)
    return found


@torch.no_grad()
def look(method: Method, batch: dict, precision: str = "fp32") -> tuple[Tensor, dict[str, Tensor]]:
    """An encoder map of the un-augmented crops [B * V, C, d, h, w], and the method's `look`; float32 on the CPU."""
    device = next(method.parameters()).device
    batch = on_device(batch, device)
    *_, network = (network for network in method.networks().values() if hasattr(network, "backbone"))
    with evaluating(method), autocast(precision, device):
        maps = network.backbone.encode(rows_of(batch["crop"]))
        looks = method.look(batch)
    features = maps[min((stride for stride in maps if stride > 1), key=lambda stride: abs(stride - FEATURE_STRIDE))]
    return features.float().cpu(), {name: value.float().cpu() for name, value in looks.items()}


def reconstruction_figure(
    crops: torch.Tensor,
    seen: torch.Tensor,
    reconstructions: torch.Tensor,
    titles: list[str],
    voxel_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Figure:
    """One row per view: the four columns of `COLUMNS` in the axial plane, then (but not of slices) in the coronal one.

    Args:
        crops: [N, 1, D, H, W] in [0, 1], un-augmented.
        seen: [N, 1, D, H, W] in [0, 1], what the student saw; NaN = hidden from it.
        reconstructions: [N, 1, D, H, W], the student's output.
        titles: one per view.
        voxel_mm: voxel size (D, H, W), for the pictures' proportions.
    """
    planes = planes_of(crops.shape[2:], PLANES)
    figure = Figure(figsize=(8 * len(planes), 2.3 * len(titles) + 0.3), layout="constrained")
    axes = figure.subplots(len(titles), len(planes) * len(COLUMNS), squeeze=False)
    for index, title in enumerate(titles):
        crop, view, made = (tensor[index, 0].float().cpu().numpy() for tensor in (crops, seen, reconstructions))
        volumes = (crop, view, made, np.where(np.isnan(view), made, crop))
        pictures = [(plane, name, volume) for plane in planes for name, volume in zip(COLUMNS, volumes)]
        for axis, (plane, name, volume) in zip(axes[index], pictures):
            axis.set_facecolor(HIDDEN_COLOUR)  # seen through NaN
            draw_plane(axis, volume, plane, None, voxel_mm, f"{plane}: {name}")
        axes[index, 0].set_ylabel(title, fontsize=7)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
