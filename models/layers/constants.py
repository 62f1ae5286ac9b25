"""Constants of layers, which depend on sizes alone: made once for each size and device, then shared.

In window attention student and teacher, plain and shifted blocks, and all steps read the same tensors. At 96^3 voxels
the mask of the first stage takes 161 MB and a walk over all windows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MOST_KEPT = 32  # more than the stages of one network at one crop size
KEPT: dict[tuple, Tensor | None] = {}


def constant(make: Callable[..., Tensor | None], device: torch.device, *sizes: object) -> Tensor | None:
    """`make(*sizes)`, which computes on the CPU, on a device. Nobody may change the result in place.

    Args:
        sizes: hashable.
    """
    if torch.compiler.is_compiling():  # the compiler folds it into its graph
        return on_device(make(*sizes), device)
    key = (make, device, sizes)
    if key not in KEPT:
        with torch.inference_mode(False):  # a prediction may be the first to ask, and a training the next
            made = on_device(make(*sizes), device)
        if isinstance(made, FakeTensor):  # has no values for the next one who asks
            return made
        while len(KEPT) >= MOST_KEPT:
            KEPT.pop(next(iter(KEPT)))
        KEPT[key] = made
    return KEPT[key]


def on_device(made: Tensor | None, device: torch.device) -> Tensor | None:
    return None if made is None else made.to(device)
