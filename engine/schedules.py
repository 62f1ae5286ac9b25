"""Schedules of the loop: those that methods use too, and the peak of the learning rate."""

from models.methods.schedules import CosineSchedule, LinearSchedule

__all__ = ["CosineSchedule", "LinearSchedule", "peak_lr"]


def peak_lr(lr: float, effective_batch: int, reference_batch: int) -> float:
    """The peak learning rate: `lr` itself, or scaled linearly by `effective_batch / reference_batch` where that is > 0.

    Args:
        lr: `--lr`.
        effective_batch: samples per optimiser step over all ranks and accumulation steps.
        reference_batch: `--lr_reference_batch`; 0 = no scaling, 256 = DINO's rule.
    """
    return lr * effective_batch / reference_batch if reference_batch > 0 else lr
