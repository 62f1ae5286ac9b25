"""Alice's networks as they are put together without a thought for speed: the alternative of `benchmarks.pretrain_step`.

Every view passes through a whole MONAI SwinUNETR by itself: four forward passes a step, the teacher's with a decoder
that nobody reads. The numbers are those of the shared passes, since no layer looks across samples.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from models.backbones.interface import Backbone
from models.methods.alice import Alice

Maps = dict[int, Tensor]
NUM_VIEWS = 2


def take_views_apart(method: Alice) -> None:
    """Change both networks in place; the teacher receives a decoder of its own."""
    student, teacher = method.student.backbone, copy.deepcopy(method.student.backbone)
    method.teacher.backbone = teacher.requires_grad_(False).eval()
    for backbone in (student, teacher):
        _one_view_at_a_time(backbone, decodes_always=backbone is teacher)


def _one_view_at_a_time(backbone: Backbone, decodes_always: bool) -> None:
    encode, decode = backbone.encode, backbone.decode

    def encode_each(volumes: Tensor, masked: Tensor | None = None) -> Maps:
        masks = [None] * NUM_VIEWS if masked is None else _apart(masked)
        features = [encode(view, mask) for view, mask in zip(_apart(volumes), masks)]
        if decodes_always:
            for maps in features:
                decode(maps)
        return _maps_joined(features)

    def decode_each(features: Maps) -> tuple[Tensor, Maps]:
        apart = {stride: _apart(rows) for stride, rows in features.items()}
        views = [{stride: rows[view] for stride, rows in apart.items()} for view in range(NUM_VIEWS)]
        outputs, maps = zip(*(decode(view) for view in views))
        return _joined(outputs), _maps_joined(maps)

    backbone.encode, backbone.decode = encode_each, decode_each


def _apart(rows: Tensor) -> list[Tensor]:
    """Rows of one sample stand together: [B * V, ...] -> V times [B, ...]."""
    return [rows[view::NUM_VIEWS] for view in range(NUM_VIEWS)]


def _joined(views: Sequence[Tensor]) -> Tensor:
    """V times [B, ...] -> [B * V, ...]."""
    return torch.stack(list(views), dim=1).flatten(0, 1)


def _maps_joined(views: Sequence[Maps]) -> Maps:
    return {stride: _joined([maps[stride] for maps in views]) for stride in views[0]}
