"""The finetuning loss: Dice plus cross-entropy, MONAI's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def make_dice_ce(class_weights: Tensor | None = None) -> nn.Module:
    """Loss of logits [B, C, D, H, W] and class maps [B, 1, D, H, W]; background counts in the cross-entropy only.

    Dice is taken over the whole batch, because a crop misses most organs: of an organ that is in no crop, Dice is then
    constant (no smoothing in the numerator) and gives no gradient, and cross-entropy alone punishes inventing it.

    Args:
        class_weights: [C], of the cross-entropy's voxels by their class; None = all alike.
    """
    from monai.losses import DiceCELoss  # here: MONAI takes seconds, which `--help` need not wait for

    loss = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=0.0, smooth_dr=1e-5
    )
    if class_weights is not None:  # MONAI would weigh Dice, which knows no frequent classes, with them too
        loss.cross_entropy = nn.CrossEntropyLoss(weight=class_weights)
    return loss


def rare_class_weights(voxel_counts: Sequence[int]) -> Tensor:
    """Weights [C] that fall with the root of a class's share of voxels, mean 1; classes without voxels get 0.

    Against the plateau at the start of training, where background teaches the network that small organs do not exist.
    With weights that fall with the share itself, organs would be drawn far too large.
    """
    counts = torch.as_tensor(voxel_counts, dtype=torch.float64)
    weights = torch.where(counts > 0, (counts.sum() / counts.clamp(min=1)).sqrt(), 0.0)
    return (weights / weights[counts > 0].mean()).float()
