"""Intensities: the HU of air, the window that becomes [0, 1], and how to know what is no CT.

Where a name says HU, a radiograph's volume holds its stored grey (`datasets.ct.radiograph`) instead, and an MR its
mapped values (`datasets.ct.mr`).
"""

from collections.abc import Sequence

import numpy as np
import torch

AIR_HU = -1024
CT_WINDOW_HU = (-125.0, 225.0)
MR_RANGE = (-1000, 1000)  # of the values that MR is mapped to; its lowest value is also what lies around a volume
NO_AIR_HU = -200  # a CT whose lowest value lies above shows no air: cropped, or not in HU
MAX_LABEL_VALUES = 64  # a volume of no more different values, none below zero, is no CT


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


def few_whole_values(array: np.ndarray) -> int:
    """How many values a volume has, if none is below zero and they are as few as a label map's; else 0."""
    if array.min() < 0:
        return 0
    seen = np.zeros(int(array.max()) + 1, dtype=bool)
    for plane in array:
        seen[plane] = True
        if np.count_nonzero(seen) > MAX_LABEL_VALUES:  # of an image, mostly within the first plane
            return 0
    return int(np.count_nonzero(seen))
