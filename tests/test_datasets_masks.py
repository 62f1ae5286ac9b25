"""Block masks: exact ratio, aligned to the block grid, three-dimensional or flat, and upsampled block by block."""

import numpy as np
import pytest
import torch

from datasets.samples.masks import draw_mask, mask_grid, num_masked_blocks
from models.backbones.interface import upsample_mask


@pytest.mark.parametrize("roi", [(96, 96, 96), (32, 64, 48)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_ratio_is_exact_on_the_grid(roi, ratio):
    grid = mask_grid(roi, 16)
    assert grid == tuple(side // 16 for side in roi)
    mask = draw_mask(np.random.default_rng(0), grid, num_masked_blocks(grid, ratio))
    assert mask.dtype == torch.bool and tuple(mask.shape) == grid
    assert int(mask.sum()) == round(ratio * np.prod(grid))


def test_masks_vary_along_every_axis_and_hit_every_block_alike():
    rng = np.random.default_rng(0)
    masks = torch.stack([draw_mask(rng, (4, 4, 4), 32) for _ in range(400)])
    for axis in (1, 2, 3):  # the published masks were columns along one axis
        assert (masks != masks.select(axis, 0).unsqueeze(axis)).flatten(1).any(1).all()
    share = masks.float().mean(0)
    assert share.min() > 0.38 and share.max() < 0.62  # 400 draws: 0.5 +- 0.025 standard deviations


def test_upsampling_equals_the_obvious_loop():
    mask = draw_mask(np.random.default_rng(1), (2, 3, 4), 10)
    voxels = upsample_mask(mask[None], (10, 15, 20))[0, 0]
    assert voxels.dtype == torch.bool and tuple(voxels.shape) == (10, 15, 20)
    for d, h, w in np.ndindex(10, 15, 20):
        assert voxels[d, h, w] == mask[d // 5, h // 5, w // 5]


def test_blocks_of_a_slice_are_one_voxel_deep():
    grid = mask_grid((1, 64, 32), 16)
    assert grid == (1, 4, 2)
    mask = draw_mask(np.random.default_rng(1), grid, num_masked_blocks(grid, 0.75))
    assert int(mask.sum()) == 6
    voxels = upsample_mask(mask[None], (1, 64, 32))
    assert voxels.shape == (1, 1, 1, 64, 32) and int(voxels.sum()) == 6 * 16 * 16
    with pytest.raises(ValueError, match="--mask_block"):
        mask_grid((1, 60, 32), 16)


@pytest.mark.parametrize(("roi", "block"), [((96, 96, 90), 16), ((96, 96, 96), 0), ((0, 16, 16), 16)])
def test_blocks_that_do_not_fit_name_the_flags(roi, block):
    with pytest.raises(ValueError, match="--mask_block or --roi_z, --roi_y, --roi_x"):
        mask_grid(roi, block)


def test_ratios_that_leave_nothing_to_see_are_refused():
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match="--mask_ratio"):
            num_masked_blocks((4, 4, 4), ratio)
    with pytest.raises(ValueError, match="hides none of the 64 blocks"):
        num_masked_blocks((4, 4, 4), 0.002)
    with pytest.raises(ValueError, match="hides all 1 blocks"):
        num_masked_blocks((1, 1, 1), 0.75)
