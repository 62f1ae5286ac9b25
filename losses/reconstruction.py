"""Reconstruction of crops: squared error over hidden voxels (SimMIM; Alice, ICCV 2023, figure 2) or over all."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_error(reconstruction: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, then the mean over samples, in float32 or more.

    Args:
        reconstruction, target: [R, 1, D, H, W].
        loss_mask: bool [R, d, h, w] on a grid of blocks, True = counts; None = every voxel counts.
    """
    wide = torch.promote_types(reconstruction.dtype, torch.float32)
    squared = (reconstruction.to(wide) - target.to(wide)).square()
    if loss_mask is None:
        return squared.mean()
    weights = loss_mask.to(wide)
    blocks = F.adaptive_avg_pool3d(squared, weights.shape[1:])[:, 0]  # [R, d, h, w]: mean error of each block
    per_sample = (blocks * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1)
    return per_sample.mean()
