"""Intensities of CT: the HU of air, and the window that becomes [0, 1]."""

import numpy as np
import torch

AIR_HU = -1024


def window_hu(values: np.ndarray | torch.Tensor, hu_min: float, hu_max: float) -> np.ndarray | torch.Tensor:
    """Map [hu_min, hu_max] linearly to [0, 1] and clip.

    Args:
        values: HU of any shape and real type; left as they are.

    Returns:
        float32 of the same shape and kind, a tensor on the same device.
    """
    if isinstance(values, np.ndarray):
        return window_hu(torch.from_numpy(values.astype(np.float32)), hu_min, hu_max).numpy()
    return values.to(torch.float32, copy=True).sub_(hu_min).mul_(1.0 / (hu_max - hu_min)).clamp_(0.0, 1.0)
