"""Overlay pictures: image, truth and prediction side by side, of the cases where the network did worst and best.

Arrays are [D, H, W] in the canonical orientation. Only the planes that are shown are kept per case, so that every case
may be a candidate. Axial planes have anterior on top and the patient's left on the right; coronal ones the head on top.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from datasets.ct.intensity import window_hu
from datasets.ct.nifti import Volume
from datasets.ct.planes import PLANES, cut_plane, pixel_aspect

OPACITY = 0.55
PANEL_INCHES = 2.5  # width of each picture
MOST_ROW_INCHES = 6.0
LEGEND_COLUMNS = 7
SHOWN_HU = (-160.0, 240.0)  # black and white


# The planes of a case by title: (grey in [0, 1], truth, prediction, height over width of a voxel).
CaseView = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]


def case_view(
    hu: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: tuple[float, float, float],
    window: tuple[float, float] = SHOWN_HU,
) -> CaseView:
    """Cut the axial and the coronal plane with most organs in the truth (most voxels among those).

    Args:
        hu: int16 [D, H, W]; of depth 1, a picture has no coronal plane.
        truth, predicted: uint8 channels [D, H, W].
        spacing_mm: (D, H, W).
        window: HU that are black and white.
    """
    planes, shown_planes = {}, {"axial": "axial", "coronal": "coronal"} if len(hu) > 1 else {"picture": "axial"}
    for title, plane in shown_planes.items():
        at = richest_plane(truth, PLANES[plane].cut)
        shown, *labels = (cut_plane(array, plane, at).copy() for array in (hu, truth, predicted))
        planes[title] = (window_hu(shown, *window), *labels, pixel_aspect(plane, spacing_mm))
    return planes


def richest_plane(labels: np.ndarray, axis: int) -> int:
    """The index along an axis of the plane that shows most organs, and of those the one with most of their voxels."""
    planes = np.moveaxis(labels, axis, 0)
    num_organs = np.array([np.count_nonzero(np.bincount(plane.ravel(), minlength=2)[1:]) for plane in planes])
    num_voxels = np.array([np.count_nonzero(plane) for plane in planes])
    return int(np.lexsort((num_voxels, num_organs))[-1])


def overlay_figure(views: list[tuple[str, CaseView]], names: tuple[str, ...]) -> Figure:
    """One row per case: image, truth, prediction in the axial plane, then in the coronal one where there is one.

    Args:
        views: (title, view), all with the same planes.
        names: of the channels, background first.
    """
    num_columns = 3 * len(views[0][1])
    heights = [row_height(view) for _, view in views]
    colours = channel_colours(len(names))
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours)][1:31]
    num_lines = math.ceil(len(handles) / LEGEND_COLUMNS)
    figure = Figure(figsize=(num_columns * PANEL_INCHES, sum(heights) + 0.2 * num_lines + 0.3), layout="constrained")
    axes = figure.subplots(len(views), num_columns, squeeze=False, height_ratios=heights)
    for row, (title, view) in zip(axes, views):
        for first, (plane, (grey, truth, predicted, aspect)) in zip((0, 3), view.items()):
            grey = grey[..., None].repeat(3, -1)
            pictures = {"image": grey} | {
                name: painted(grey, labels, colours) for name, labels in (("truth", truth), ("prediction", predicted))
            }
            for axis, (name, picture) in zip(row[first : first + 3], pictures.items()):
                axis.imshow(picture, aspect=aspect, interpolation="nearest")
                axis.set_title(f"{plane}: {name}", fontsize=8, pad=2)
                axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=8)
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    return figure


def row_height(view: CaseView) -> float:
    """Inches that a row of `PANEL_INCHES` wide panels needs, with its titles; long scans are shown smaller."""
    shapes = [(grey.shape, aspect) for grey, _, _, aspect in view.values()]
    tallest = max(height * aspect / width for (height, width), aspect in shapes)
    return min(PANEL_INCHES * tallest, MOST_ROW_INCHES) + 0.3


def channel_colours(num_channels: int) -> np.ndarray:
    """One RGB colour [num_channels, 3] in [0, 1] per channel."""
    table = colormaps["tab20"].colors if num_channels <= 21 else colormaps["hsv"](np.linspace(0, 1, num_channels))
    return np.array([(0, 0, 0), *[colour[:3] for colour in table]])[:num_channels]


def painted(grey: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Labels [h, w] painted over a picture [h, w, 3], half transparent."""
    mixed = (1 - OPACITY) * grey + OPACITY * colours[np.minimum(labels, len(colours) - 1)]
    return np.where(labels[..., None] > 0, mixed, grey)


def save_overlay(path: str | Path, views: list[tuple[str, CaseView]], names: tuple[str, ...]) -> None:
    """Write an overlay figure as PNG; the folder is made."""
    figure = overlay_figure(views, names)
    FigureCanvasAgg(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def save_carried(
    path: str | Path, volume: Volume, labels: np.ndarray, confidence: np.ndarray, names: tuple[str, ...]
) -> None:
    """Write a picture of labels that were carried to a scan: image, labels and confidence in two planes, as PNG.

    Args:
        volume: int16 HU [D, H, W].
        labels: uint8 channels [D, H, W].
        confidence: float32 [D, H, W], 0 (black) to 1.
        names: of the channels, background first.
    """
    view = case_view(volume.array, labels, confidence, volume.spacing_mm)
    colours = channel_colours(len(names))
    figure = Figure(figsize=(3 * len(view) * PANEL_INCHES, row_height(view) + 0.6), layout="constrained")
    panels = iter(figure.subplots(1, 3 * len(view)))
    for plane, (grey, cut, sure, aspect) in view.items():
        grey = grey[..., None].repeat(3, -1)
        for name, picture in (("image", grey), ("labels", painted(grey, cut, colours)), ("confidence", sure)):
            axis = next(panels)
            axis.imshow(picture, aspect=aspect, interpolation="nearest", cmap="inferno", vmin=0, vmax=1)
            axis.set_title(f"{plane}: {name}", fontsize=8, pad=2)
            axis.set(xticks=[], yticks=[])
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours)][1:31]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * LEGEND_COLUMNS, fontsize=7)
    FigureCanvasAgg(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
