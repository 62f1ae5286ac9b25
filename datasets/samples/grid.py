"""A region of base crops side by side, and random crops inside it: where they lie, and how much they share (VoCo).

The grid lies in the axial plane, one layer deep. Base crop k = i * rows + j is number i along W (towards the patient's
left) and j along H (posterior). Random crops take the whole depth of the region.

Legend: `bases` = (along W, along H); `roi` = crop size (D, H, W) in voxels; starts are a crop's first voxel (D, H, W).
"""

from collections.abc import Sequence

import numpy as np


def region_size(bases: Sequence[int], roi: Sequence[int]) -> tuple[int, int, int]:
    """Size (D, H, W) in voxels of the region that the base crops tile."""
    return int(roi[0]), int(bases[1] * roi[1]), int(bases[0] * roi[2])


def base_starts(bases: Sequence[int], roi: Sequence[int]) -> np.ndarray:
    """Starts of the base crops from the region's first voxel, int64 [N, 3]."""
    along_w, along_h = np.divmod(np.arange(bases[0] * bases[1]), bases[1])
    return np.stack([np.zeros_like(along_h), along_h * roi[1], along_w * roi[2]], axis=1).astype(np.int64)


def draw_inner_starts(rng: np.random.Generator, bases: Sequence[int], roi: Sequence[int], num: int) -> np.ndarray:
    """Starts of `num` random crops from the region's first voxel, uniform over all that lie inside, int64 [num, 3]."""
    last = np.asarray(region_size(bases, roi)) - np.asarray(roi)
    return rng.integers(0, last, size=(num, 3), endpoint=True)


def overlap_shares(starts: np.ndarray, bases: np.ndarray, roi: Sequence[int]) -> np.ndarray:
    """Share of each crop that lies on each base crop of the same size and grid of voxels.

    Args:
        starts: int64 [R, 3]; bases: int64 [N, 3].

    Returns:
        float32 [R, N] in [0, 1]; a row sums to 1 where the bases tile all of the crop.
    """
    size = np.asarray(roi)
    common = np.clip(size - np.abs(starts[:, None] - bases[None]), 0, None).prod(axis=-1)
    return (common / size.prod()).astype(np.float32)
