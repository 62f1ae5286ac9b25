"""Pictures of what the networks look at: attention and dense features as colours.

Attention (Alice, ICCV 2023, figure 3): the query token at the crop's centre asks every network's view. Side by side one
sees whether all look at the same organ. Colours are multiples of uniform attention on a fixed scale, so that attention
that prefers nothing shows nothing.

Features: the three main components of an encoder map as red, green and blue. All views of a sheet share their
components, so that the same colour means the same features.

Arrays are [D, H, W] in canonical orientation; planes are drawn as in `datasets.ct.planes`, of slices the axial one.
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from datasets.ct.planes import cut_plane, pixel_aspect, planes_of

PLANES = ("axial", "coronal")
MOST_TIMES_UNIFORM = 4.0  # the end of the colour scale of attention
CLIPPED_SHARE = 0.02  # of feature values at either end of the colour scale

Size3 = tuple[int, int, int]


def token_sides(size: Size3, num_tokens: int) -> Size3:
    """The sides (D, H, W) in voxels of a token of a crop that has so many; tokens of a slice are one voxel deep."""
    num_axes = 2 if size[0] == 1 else 3
    stride = round((math.prod(size) / num_tokens) ** (1 / num_axes))
    return (1 if size[0] == 1 else stride), stride, stride


def attention_figure(crops: Tensor, attention: dict[str, Tensor], titles: list[str], voxel_mm: tuple) -> Figure:
    """One row per view: the crop with the asking token, where every network looks, in two planes through it.

    Args:
        crops: [V, 1, D, H, W] in [0, 1].
        attention: by network [V, N, M]: rows of N asking tokens over M asked tokens, which add up to 1.
        titles: one per view.
        voxel_mm: voxel size (D, H, W).
    """
    size = tuple(crops.shape[2:])
    sides = [token_sides(size, num) for num in next(iter(attention.values())).shape[1:]]
    asking, asked = (tuple(whole // side for whole, side in zip(size, one)) for one in sides)
    token = tuple(num // 2 for num in asking)
    row = int(np.ravel_multi_index(token, asking))
    centre = tuple(int((place + 0.5) * side) for place, side in zip(token, sides[0]))
    width, planes = 1 + len(attention), planes_of(size, PLANES)
    figure = Figure(figsize=(0.5 + 2 * width * len(planes), 2.2 * len(titles) + 0.3), layout="constrained")
    axes = figure.subplots(len(titles), width * len(planes), squeeze=False)
    for view, title in enumerate(titles):
        crop = crops[view, 0].float().cpu().numpy()
        for number, plane in enumerate(planes):
            columns = axes[view, width * number : width * (number + 1)]
            draw_plane(columns[0], crop, plane, centre, voxel_mm, f"{plane}: asking token")
            outline_token(columns[0], token, sides[0][2], size, plane)
            for axis, (name, weights) in zip(columns[1:], attention.items()):
                times = weights[view, row].reshape(asked).numpy() * weights.shape[-1]
                label = f"{name} looks (at most {times.max():.2f}x uniform)"
                draw_plane(axis, crop, plane, centre, voxel_mm, label)
                draw_heat(axis, enlarge(times, size), plane, centre, voxel_mm)
        axes[view, 0].set_ylabel(title, fontsize=7)
    return figure


def feature_figure(crops: Tensor, features: Tensor, titles: list[str], voxel_mm: tuple) -> Figure:
    """One row per view: the crop and its features as colours, in two planes through the centre.

    Args:
        crops: [V, 1, D, H, W] in [0, 1].
        features: [V, C, d, h, w].
        titles: one per view.
        voxel_mm: voxel size (D, H, W).
    """
    size = tuple(crops.shape[2:])
    centre = tuple(side // 2 for side in size)
    colours, planes = principal_colours(features), planes_of(size, PLANES)
    figure = Figure(figsize=(0.5 + 4 * len(planes), 2.2 * len(titles) + 0.3), layout="constrained")
    axes = figure.subplots(len(titles), 2 * len(planes), squeeze=False)
    for view, title in enumerate(titles):
        crop, coloured = crops[view, 0].float().cpu().numpy(), enlarge(colours[view], size)
        for number, plane in enumerate(planes):
            left, right = axes[view, 2 * number : 2 * number + 2]
            draw_plane(left, crop, plane, centre, voxel_mm, f"{plane}: crop")
            draw_plane(right, coloured, plane, centre, voxel_mm, f"{plane}: features")
        axes[view, 0].set_ylabel(title, fontsize=7)
    return figure


def principal_colours(features: Tensor) -> np.ndarray:
    """Features [V, C, d, h, w] -> [V, d, h, w, 3] in [0, 1]: their three main components over all views together.

    A component's sign is arbitrary; its largest weight is made positive.
    """
    tokens = features.movedim(1, -1).double()  # [V, d, h, w, C]
    rows = tokens.flatten(0, -2)
    rows = rows - rows.mean(0)
    main = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)  # [C, 3], largest first
    main = main * main.gather(0, main.abs().argmax(0, keepdim=True)).sign()
    values = rows @ main  # [V*d*h*w, 3]
    low, high = (
        torch.quantile(values[:: max(1, len(values) // 2**20)], q, dim=0) for q in (CLIPPED_SHARE, 1 - CLIPPED_SHARE)
    )
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return scaled.reshape(*tokens.shape[:-1], -1).numpy()


def enlarge(tokens: np.ndarray, size: Size3) -> np.ndarray:
    """A map [d, h, w, ...] of tokens spread to voxels [D, H, W, ...]."""
    for axis, voxels in enumerate(size):
        tokens = np.repeat(tokens, voxels // tokens.shape[axis], axis=axis)
    return tokens


def draw_plane(axis, volume: np.ndarray, plane: str, centre: Size3 | None, voxel_mm: tuple, title: str) -> None:
    """One plane of a volume [D, H, W] in grey, or [D, H, W, 3] in its colours; through the middle without `centre`."""
    picture, aspect = cut_plane(volume, plane, centre), pixel_aspect(plane, voxel_mm)
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    axis.set_title(title, fontsize=7, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])


def draw_heat(axis, times: np.ndarray, plane: str, centre: Size3, voxel_mm: tuple) -> None:
    """Attention in multiples of uniform over a plane: nothing up to 1, brighter and denser from there on."""
    picture, aspect = cut_plane(times, plane, centre), pixel_aspect(plane, voxel_mm)
    strength = np.clip((picture - 1) / (MOST_TIMES_UNIFORM - 1), 0, 1)
    axis.imshow(
        strength, cmap="hot", vmin=0, vmax=1, alpha=0.75 * strength**0.5, aspect=aspect, interpolation="nearest"
    )


def outline_token(axis, token: Size3, stride: int, size: Size3, plane: str) -> None:
    """The edge of the asking token in a plane."""
    left = token[2] * stride
    top = token[1] * stride if plane == "axial" else size[0] - (token[0] + 1) * stride
    across, down = np.array([0, 1, 1, 0, 0]) * stride + left - 0.5, np.array([0, 0, 1, 1, 0]) * stride + top - 0.5
    axis.plot(across, down, color="#ffb000", linewidth=1.2)
