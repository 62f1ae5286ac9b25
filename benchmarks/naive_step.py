"""Alice's networks as they are put together without a thought for speed: the alternative of `benchmarks.pretrain_step`.

Every view passes through a whole MONAI SwinUNETR by itself: four forward passes a step, the teacher's with a decoder
that nobody reads. The numbers are those of the shared passes, since no layer looks across samples.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from models.methods.alice import Alice

NUM_VIEWS = 2


def take_views_apart(method: Alice) -> None:
    """Change both networks in place; the teacher receives a decoder of its own."""
    student, teacher = method.student.backbone, copy.deepcopy(method.student.backbone)
    method.teacher.backbone = teacher.requires_grad_(False).eval()
    encode, decode = teacher.encode, teacher.decode

    def encode_and_decode(volumes: Tensor) -> dict[int, Tensor]:
        features = encode(volumes)
        decode(features)
        return features

    teacher.encode = view_by_view(encode_and_decode)
    student.encode, student.decode = view_by_view(student.encode), view_by_view(student.decode)


def view_by_view(function: Callable) -> Callable:
    """The same function of the rows of each view by themselves; rows of one sample stand together, [B * V, ...]."""

    def run(*inputs: object) -> object:
        outputs = []
        for view in range(NUM_VIEWS):
            rows = tree_map_only(Tensor, lambda values, first=view: values[first::NUM_VIEWS], inputs)
            outputs.append(function(*rows))
        return tree_map(lambda *views: torch.stack(views, dim=1).flatten(0, 1), *outputs)

    return run
