"""Sliding-window segmentation of a volume of any size in bounded memory, restored to any other grid on the way.

Windows overlap and are blended with a Gaussian, as in MONAI and nnU-Net. They are visited from bottom to top, and
slices that no later window touches leave as soon as they are finished, so that only as many slices as a window has are
held: a whole-body CT takes no more memory than its own voxels and a slab. Slices are then interpolated to the original
grid as probabilities, not as labels, which keeps the outlines smooth. Windows of depth 1 are slices for a 2-D network:
windows of several slices then share a forward pass.

Letters: C classes, D H W voxels of the network's grid.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from datasets.ct.intensity import AIR_HU, window_hu
from engine.device import autocast
from engine.flags import FlagChecks

Size3 = tuple[int, int, int]
GPU_SHARE = 0.5  # of the free GPU memory that a slab may take before it moves to the CPU


@dataclass(frozen=True)
class WindowOptions:
    """How a network is slid over a volume.

    Attributes:
        roi: (D, H, W) of a window, voxels; D = 1 segments slice by slice.
        hu_min, hu_max: HU that become 0 and 1.
        outside: HU around a volume that is smaller than a window.
        overlap: overlap of windows, 0 to below 1
        window_batch: windows per forward pass; a 2-D network is fastest with 32 or more
        precision: fp32, bf16 or fp16.
    """

    roi: Size3 = field(metadata={"flag": False})
    hu_min: float = field(default=-125.0, metadata={"flag": False})
    hu_max: float = field(default=225.0, metadata={"flag": False})
    outside: int = field(default=AIR_HU, metadata={"flag": False})
    overlap: float = 0.5
    window_batch: int = 2
    precision: str = field(default="fp32", metadata={"flag": False})

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect(0 <= self.overlap < 1, "overlap", "a share from 0 to below 1")
        checks.expect(self.window_batch >= 1, "window_batch", "1 or more")
        checks.finish()


@torch.no_grad()
def segment_volume(
    network: Callable[[Tensor], Tensor],
    hu: np.ndarray,
    affine: np.ndarray,
    out_shape: Sequence[int],
    out_affine: np.ndarray,
    options: WindowOptions,
    device: torch.device,
    adjust: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter,
) -> np.ndarray:
    """Classes of a volume on the grid (`out_shape`, `out_affine`).

    Args:
        network: windows [B, channels, *roi] in [0, 1] -> logits [B, C, *roi]; in evaluation mode.
        hu: int16 [D, H, W] on the network's grid, or [channels, D, H, W].
        affine, out_affine: [4, 4], index -> world mm, of both grids, whose axes must be parallel.
        device: where the network is.
        adjust: slices of probabilities [C, H, W] on the network's grid -> [C, H, W], or [V, C, H, W] for V versions.

    Returns:
        uint8 [out_shape], the most probable class of every voxel; of V versions [V, *out_shape].
    """
    slices = adjust(probability_slices(network, torch.from_numpy(np.ascontiguousarray(hu)), options, device))
    return restored_labels(slices, hu.shape[-3:], axis_map(affine, out_affine), tuple(out_shape))


def window_starts(size: int, side: int, overlap: float) -> list[int]:
    """First voxels of windows of `side` that cover an axis of `size` evenly, the last one ending with it."""
    if size <= side:
        return [0]
    step = max(1, int(side * (1 - overlap)))
    num_windows = -(-(size - side) // step) + 1
    return [round(place) for place in np.linspace(0, size - side, num_windows)]


def blend_weights(side: int) -> Tensor:
    """Weights [side] of a window's voxels along an axis: a Gaussian of an eighth of the side, at least 0.01."""
    place = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    return torch.exp(-0.5 * (place / (side / 8)) ** 2).clamp_(min=0.01)


def probability_slices(
    network: Callable[[Tensor], Tensor], hu: Tensor, options: WindowOptions, device: torch.device
) -> Iterator[Tensor]:
    """The class probabilities [C, H, W] of every slice, from the first to the last.

    Args:
        hu: int16 [D, H, W] or [channels, D, H, W]; smaller than a window is fine (voxels around it are added and taken
            away again).
    """
    shape, roi = tuple(hu.shape[-3:]), options.roi
    hu, before = pad_to(hu, roi, options.outside)
    padded = tuple(hu.shape[-3:])
    starts = [window_starts(size, side, options.overlap) for size, side in zip(padded, roi)]
    weights = [blend_weights(side) for side in roi]
    totals = [total_weights(size, begin, w) for size, begin, w in zip(padded, starts, weights)]
    window_weight = weights[0][:, None, None] * weights[1][:, None] * weights[2]
    plane_total = totals[1][:, None] * totals[2]
    groups = window_groups(starts, options)
    depth = groups[0][-1][0] + roi[0]
    sums = None  # [C, depth, H, W]: the slab of slices that windows still add to
    kept = slice(before[1], before[1] + shape[1]), slice(before[2], before[2] + shape[2])
    for group, following in zip(groups, [*(later[0][0] for later in groups[1:]), padded[0]]):
        begin = group[0][0]
        for first in range(0, len(group), options.window_batch):
            corners = group[first : first + options.window_batch]
            windows = cut_windows(hu, corners, options, device)
            with autocast(options.precision, device):
                logits = network(windows)
            made = logits.float().softmax(1)  # [b, C, *roi]
            if sums is None:
                place = slab_device(device, made.shape[1] * depth * padded[1] * padded[2] * 4)
                sums = torch.zeros(made.shape[1], depth, *padded[1:], device=place)
                window_weight, plane_total = window_weight.to(device), plane_total.to(place)
            for part, (d, h, w) in zip(made.mul_(window_weight).to(sums.device), corners):
                sums[:, d - begin : d - begin + roi[0], h : h + roi[1], w : w + roi[2]] += part
        finished = min(following - begin, depth)
        for offset in range(finished):
            if before[0] <= begin + offset < before[0] + shape[0]:
                yield (sums[:, offset] / (plane_total * totals[0][begin + offset].item()))[:, kept[0], kept[1]]
        sums[:, : depth - finished] = sums[:, finished:].clone()
        sums[:, depth - finished :] = 0


def window_groups(starts: list[list[int]], options: WindowOptions) -> list[list[Size3]]:
    """Corners (d, h, w) of all windows from bottom to top, grouped by what is summed up together.

    A group holds the windows of one start along D. Slices do not overlap along D: a group then holds the windows of as
    many slices as one forward pass takes, so that the slab stays as small as what the network itself needs.
    """
    in_plane = [(h, w) for h in starts[1] for w in starts[2]]
    num_starts = max(1, options.window_batch // len(in_plane)) if options.roi[0] == 1 else 1
    parts = [starts[0][first : first + num_starts] for first in range(0, len(starts[0]), num_starts)]
    return [[(d, h, w) for d in part for h, w in in_plane] for part in parts]


def pad_to(hu: Tensor, roi: Size3, outside: int) -> tuple[Tensor, list[int]]:
    """A volume that is at least as large as a window, filled up with `outside`, and how much came before each axis."""
    missing = [max(0, side - size) for size, side in zip(hu.shape[-3:], roi)]
    before = [count // 2 for count in missing]
    if any(missing):
        widths = [width for axis in (2, 1, 0) for width in (before[axis], missing[axis] - before[axis])]
        hu = torch.nn.functional.pad(hu, widths, value=outside)
    return hu, before


def total_weights(size: int, starts: list[int], weights: Tensor) -> Tensor:
    """The sum of all windows' weights [size] along an axis; the weights of a volume are its outer product."""
    total = torch.zeros(size)
    for start in starts:
        total[start : start + len(weights)] += weights
    return total


def cut_windows(hu: Tensor, corners: Sequence[Size3], options: WindowOptions, device: torch.device) -> Tensor:
    """The windows [b, channels, *roi] at `corners` (d, h, w), float32 in [0, 1], on the network's device."""
    depth, height, width = options.roi
    windows = torch.stack([hu[..., d : d + depth, h : h + height, w : w + width] for d, h, w in corners])
    shown = window_hu(windows.to(device), options.hu_min, options.hu_max)
    return shown.unsqueeze(1) if hu.ndim == 3 else shown


def slab_device(device: torch.device, num_bytes: int) -> torch.device:
    """Where a slab of that size is summed up: beside the network if half of the free memory holds it, else the CPU."""
    if device.type != "cuda" or num_bytes > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def axis_map(affine: np.ndarray, out_affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset) [3] each: index on the first grid = scale * index on the second + offset.

    Raises:
        ValueError: the grids' axes are not parallel.
    """
    both = np.linalg.inv(np.asarray(affine, dtype=np.float64)) @ np.asarray(out_affine, dtype=np.float64)
    scale = np.diag(both)[:3]
    if not np.allclose(both[:3, :3], np.diag(scale), atol=1e-3 * np.abs(scale).max()) or (scale <= 0).any():
        raise ValueError(f"the two grids are not parallel: {both[:3, :3].round(4).tolist()}")
    return scale, both[:3, 3]


def restored_labels(
    slices: Iterator[Tensor], shape: Size3, mapping: tuple[np.ndarray, np.ndarray], out_shape: Size3
) -> np.ndarray:
    """The most probable class on another grid, by linear interpolation of probabilities.

    Args:
        as for `restored_slices`.

    Returns:
        uint8 [out_shape], of V versions [V, *out_shape].
    """
    out = None
    for index, plane in enumerate(restored_slices(slices, shape, mapping, out_shape)):
        labels = (
            plane.max(-3).indices.to(torch.uint8).cpu().numpy()
        )  # [(V,) H, W]; on CPUs argmax takes 6 times as long
        if out is None:
            out = np.empty((*labels.shape[:-2], *out_shape), dtype=np.uint8)
        out[..., index, :, :] = labels
    return out


def restored_slices(
    slices: Iterator[Tensor], shape: Size3, mapping: tuple[np.ndarray, np.ndarray], out_shape: Size3
) -> Iterator[Tensor]:
    """Slices of values on another grid, interpolated linearly.

    Args:
        slices: D tensors [C, H, W], or [V, C, H, W] of V versions.
        shape: (D, H, W).
        mapping: of `axis_map`.
        out_shape: of the result; beyond the first grid its border continues.

    Yields:
        As many tensors [(V,) C, *out_shape[1:]] as `out_shape` has slices.
    """
    scale, offset = mapping
    places = [np.clip(scale[a] * np.arange(out_shape[a]) + offset[a], 0, shape[a] - 1) for a in range(3)]
    held: dict[int, Tensor] = {}
    incoming = enumerate(slices)
    for place in places[0]:
        low, share = int(place), float(place - int(place))
        high = low + (share > 1e-6)
        while high not in held:
            number, newest = next(incoming)
            held = {key: value for key, value in held.items() if key >= low} | {number: newest}
        blended = held[low] if high == low else torch.lerp(held[low], held[high], share)
        yield resized(resized(blended, places[2], -1), places[1], -2)  # rows are copied faster than columns


def resized(plane: Tensor, places: np.ndarray, axis: int) -> Tensor:
    """Linear interpolation of a tensor along one axis at fractional indices; the tensor itself where they are its own.

    Args:
        plane: [..., H, W].
        places: in [0, size - 1], rising.
        axis: -2 or -1.
    """
    if len(places) == plane.shape[axis] and np.allclose(places, np.arange(len(places)), atol=1e-6):
        return plane
    low = torch.from_numpy(np.floor(places).astype(np.int64)).to(plane.device)
    share = torch.from_numpy((places - np.floor(places)).astype(np.float32)).to(plane.device)
    high = (low + 1).clamp(max=plane.shape[axis] - 1)
    share = share.view((-1, 1) if axis == -2 else (-1,))
    return torch.lerp(plane.index_select(axis, low), plane.index_select(axis, high), share)
