"""The finetuning loss: Dice plus cross-entropy, MONAI's."""

from monai.losses import DiceCELoss


def make_dice_ce() -> DiceCELoss:
    """Loss of logits [B, C, D, H, W] and class maps [B, 1, D, H, W]; background counts in the cross-entropy only.

    Dice is taken over the whole batch, because a crop misses most organs: of an organ that is in no crop, Dice is then
    constant (no smoothing in the numerator) and gives no gradient, and cross-entropy alone punishes inventing it.
    """
    return DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=0.0, smooth_dr=1e-5
    )
