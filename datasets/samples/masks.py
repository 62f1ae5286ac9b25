"""Block masks for masked image modelling (Alice, ICCV 2023, figure 2: masks u and r).

A mask lives on the grid of `block_vox`-sided cubes of the crop, so that it is aligned to the encoder's tokens: True =
masked = hidden from the student and counted in the reconstruction loss. Exactly `round(ratio * num_blocks)` blocks are
masked. A crop of depth 1 (a slice) has squares in place of cubes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class MaskOptions:
    """How much of a crop the student does not see.

    Attributes:
        mask_ratio: share of blocks hidden from the student, from 0 to below 1; 0 = off
        mask_block: side of a mask block, voxels; blocks of slices are one voxel deep
    """

    mask_ratio: float = 0.75
    mask_block: int = 16

    def check(self, roi: Sequence[int]) -> None:
        """Raise ValueError where masks of this kind do not fit crops of `roi` (D, H, W) voxels."""
        num_masked_blocks(mask_grid(roi, self.mask_block), self.mask_ratio)


def mask_grid(roi: Sequence[int], block_vox: int) -> tuple[int, int, int]:
    """Number of mask blocks along each axis of a crop.

    Args:
        roi: crop size (D, H, W) in voxels.
        block_vox: side of a mask block in voxels.

    Raises:
        ValueError: the block does not divide the crop.
    """
    blocks = (1 if roi[0] == 1 else block_vox, block_vox, block_vox)
    if block_vox < 1 or any(side < 1 or side % block for side, block in zip(roi, blocks)):
        raise ValueError(
            f"mask blocks of {block_vox} voxels do not divide the crop {tuple(roi)} (D, H, W); change --mask_block or "
            "--roi_z, --roi_y, --roi_x"
        )
    return tuple(int(side) // block for side, block in zip(roi, blocks))


def num_masked_blocks(grid: Sequence[int], mask_ratio: float) -> int:
    """How many blocks a mask of this ratio hides.

    Raises:
        ValueError: the ratio lies outside of [0, 1), or rounds to every block, which leaves nothing to see, or is above
            0 and rounds to none.
    """
    num_blocks = int(np.prod(grid))
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"--mask_ratio is {mask_ratio}, expected a share in [0, 1) (0 = no masking)")
    num_masked = round(mask_ratio * num_blocks)
    if num_masked == num_blocks:
        raise ValueError(
            f"--mask_ratio {mask_ratio} hides all {num_blocks} blocks of the grid {tuple(grid)}; lower it, lower "
            "--mask_block, or enlarge --roi_z, --roi_y, --roi_x"
        )
    if mask_ratio > 0 and num_masked == 0:
        raise ValueError(
            f"--mask_ratio {mask_ratio} hides none of the {num_blocks} blocks of the grid {tuple(grid)}; raise it, "
            "lower --mask_block, or give 0 (no masking)"
        )
    return num_masked


def draw_mask(rng: np.random.Generator, grid: Sequence[int], num_masked: int) -> torch.Tensor:
    """A random block mask with exactly `num_masked` True cells, bool [*grid]."""
    mask = np.zeros(int(np.prod(grid)), dtype=bool)
    mask[rng.permutation(mask.size)[:num_masked]] = True
    return torch.from_numpy(mask.reshape(tuple(grid)))
