"""Joining the masks of single organs, a file each, into one label map."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.ct.file_grid import FileGrid
from datasets.ct.nifti import CTReadError, check_same_grid, read_label


@dataclass(frozen=True)
class JoinedMasks:
    """One label map of several masks.

    Attributes:
        array: [D, H, W]; uint8 where the values fit, else int16.
        overlaps: (value kept, value lost) -> voxels that two masks claim.
    """

    array: np.ndarray
    overlaps: Counter[tuple[int, int]]


def join_masks(value_of: Mapping[Path, int], grid: FileGrid, image_path: str | Path) -> JoinedMasks:
    """Join masks into one label map; a voxel that several masks claim goes to the smallest of them.

    Args:
        value_of: mask file -> label value, from 1; two files may share a value.
        grid: of the image that the masks belong to.
        image_path: that image, for messages.

    Raises:
        CTReadError: a mask that cannot be read, lies on another grid, or holds other values than 0 and one more.
    """
    shape, affine = grid.canonical()
    voxels_of = {}
    for path in value_of:
        mask = read_label(path)
        check_same_grid(mask, shape, affine, image_path)
        voxels_of[path] = np.flatnonzero(mask.array)
        if len(values := np.unique(mask.array.ravel()[voxels_of[path]])) > 1:
            raise CTReadError(f"{path}: holds the values {values[:5].tolist()}, expected the mask of one organ")
    joined = np.zeros(shape, np.uint8 if max(value_of.values()) <= 255 else np.int16)
    flat, overlaps = joined.reshape(-1), Counter()
    for path in sorted(voxels_of, key=lambda path: -len(voxels_of[path])):
        value, voxels = value_of[path], voxels_of[path]
        for lost, count in zip(*np.unique(flat[voxels], return_counts=True)):
            if lost not in (0, value):
                overlaps[value, int(lost)] += int(count)
        flat[voxels] = value
    return JoinedMasks(joined, overlaps)
