"""Intensities: the HU of air, and the window that becomes [0, 1].

Where a name says HU, a radiograph's volume holds its stored grey (`datasets.ct.radiograph`) instead.
"""

from collections.abc import Sequence

import numpy as np
import torch

AIR_HU = -1024
CT_WINDOW_HU = (-125.0, 225.0)


def fill_ends(given: Sequence[float | None], default: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The two given ends of a window; where one is None, that of `default`."""
    low, high = (other if end is None else end for end, other in zip(given, default))
    return low, high


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
