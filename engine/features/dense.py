"""Feature maps of a whole volume: the maps of overlapping windows, put together on one regular grid.

Windows are slid as for the probes and for segmentation. Their corners are multiples of the deepest stride, so that the
cells of all windows lie on one grid. A cell is taken from the window that it is most central in, as the probes read
voxels: it is the encoder's own output, not a blend.

Letters: D H W voxels of the network's grid, d h w cells of a map, s stride in voxels.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from engine.device import autocast
from engine.segmentation.sliding_window import Size3, WindowOptions, cut_windows, pad_to, window_starts


@torch.no_grad()
def dense_maps(
    encode: Callable[[Tensor], dict[int, Tensor]],
    hu: Tensor,
    strides: Sequence[int],
    deepest: int,
    options: WindowOptions,
    device: torch.device,
) -> dict[int, tuple[Tensor, np.ndarray]]:
    """The encoder's maps of a volume of any size.

    Args:
        encode: windows [B, 1, *roi] in [0, 1] -> {stride: map [B, C_s, D/s, H/s, W/s]}; in evaluation mode.
        hu: int16 [D, H, W]; one smaller than a window gets air around it.
        strides: the maps to keep.
        deepest: the encoder's largest stride; sides of windows are multiples of it.
        options: how windows are cut; D = 1 makes slices, whose maps are [B, C_s, 1, H/s, W/s].
        device: where the encoder is.

    Returns:
        {stride: (float32 [C_s, d, h, w] on the CPU, matrix [4, 4] from a cell's index to its centre's voxel index)}.
        Cells that hold nothing of the volume are left out.
    """
    shape, unit = tuple(hu.shape), cell_sides(deepest, options.roi)
    wanted = [max(side, -(-size // step) * step) for size, side, step in zip(shape, options.roi, unit)]
    padded, before = pad_to(hu, wanted, options.outside)
    starts = [
        [step * place for place in window_starts(size // step, side // step, options.overlap)]
        for size, side, step in zip(padded.shape, options.roi, unit)
    ]
    cells = {stride: cell_sides(stride, options.roi) for stride in strides}
    parts = {
        stride: [owned_cells(size, side, places, cell) for size, side, places, cell in zip(
            padded.shape, options.roi, starts, cells[stride])]
        for stride in strides
    }  # fmt: skip
    windows = list(product(*(range(len(places)) for places in starts)))
    found: dict[int, Tensor] = {}
    for first in range(0, len(windows), options.window_batch):
        batch = windows[first : first + options.window_batch]
        corners = [tuple(places[index] for places, index in zip(starts, window)) for window in batch]
        with autocast(options.precision, device):
            maps = encode(cut_windows(padded, corners, options, device))
        for stride in strides:
            cell = cells[stride]
            if stride not in found:
                size = [side // step for side, step in zip(padded.shape, cell)]
                found[stride] = torch.empty(maps[stride].shape[1], *size)
            for one, window, corner in zip(maps[stride].float().cpu(), batch, corners):
                owned = [part[index] for part, index in zip(parts[stride], window)]
                inside = [
                    slice(own.start - place // step, own.stop - place // step)
                    for own, place, step in zip(owned, corner, cell)
                ]
                found[stride][(slice(None), *owned)] = one[(slice(None), *inside)]
    return {stride: without_padding(found[stride], cells[stride], shape, before) for stride in strides}


def cell_sides(stride: int, roi: Size3) -> Size3:
    """Voxels (D, H, W) of a cell of the map at a stride; those of slices are one voxel deep."""
    return (1 if roi[0] == 1 else stride, stride, stride)


def owned_cells(size: int, side: int, starts: Sequence[int], cell: int) -> list[slice]:
    """For every window along an axis the cells that lie nearest to its middle; together they are all cells once.

    Args:
        size, side, starts, cell: voxels of the axis, of a window, windows' first voxels (rising), voxels of a cell.
    """
    centres = (torch.arange(size // cell) + 0.5) * cell
    middles = torch.tensor(starts) + side / 2
    owner = (centres[:, None] - middles).abs().argmin(1)  # rising
    bounds = torch.searchsorted(owner, torch.arange(len(starts) + 1)).tolist()
    return [slice(first, last) for first, last in zip(bounds, bounds[1:])]


def without_padding(values: Tensor, cell: Size3, shape: Size3, before: Sequence[int]) -> tuple[Tensor, np.ndarray]:
    """The cells [C, d, h, w] that hold voxels of the volume, and the matrix from their index to voxel indices.

    Args:
        values: of the padded volume.
        shape: (D, H, W) of the volume itself.
        before: voxels that padding put before each axis.
    """
    first = [count // step for count, step in zip(before, cell)]
    last = [-(-(count + size) // step) for count, size, step in zip(before, shape, cell)]
    to_voxels = np.diag([*map(float, cell), 1.0])
    to_voxels[:3, 3] = [(place + 0.5) * step - 0.5 - count for place, step, count in zip(first, cell, before)]
    return values[(slice(None), *(slice(*ends) for ends in zip(first, last)))].clone(), to_voxels
