"""Maps whose channels lie beside each other in memory: [B, C, D, H, W] (or [B, C, H, W]) stored as [B, D, H, W, C]."""

import torch
from torch import Tensor

LAYOUT_OF = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


def is_channels_last(x: Tensor) -> bool:
    """Whether a map lies channels last and not in torch's usual order (with one channel or one place it is both)."""
    layout = LAYOUT_OF.get(x.ndim)
    return layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def make_channels_last(x: Tensor) -> Tensor:
    """The same map, copied where it does not lie channels last."""
    return x.contiguous(memory_format=LAYOUT_OF[x.ndim])
