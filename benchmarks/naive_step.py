"""Alice's networks as they are put together without a thought for speed: the alternative of `benchmarks.pretrain_step`.

Every view passes through a whole MONAI SwinUNETR by itself: four forward passes a step, the teacher's with a decoder
that nobody reads. The numbers are those of the shared passes, since no layer looks across samples.
"""

import copy

import torch
from torch import Tensor

from models.backbones.interface import Backbone
from models.methods.alice import AliceStudent, AliceTeacher

Maps = dict[int, Tensor]


def take_views_apart(student: AliceStudent, teacher: AliceTeacher) -> None:
    """Change both networks in place; the teacher receives a decoder of its own."""
    teacher.backbone = copy.deepcopy(student.backbone).requires_grad_(False).eval()
    for backbone in (student.backbone, teacher.backbone):
        _one_view_at_a_time(backbone, decodes_always=backbone is teacher.backbone)


def _one_view_at_a_time(backbone: Backbone, decodes_always: bool) -> None:
    encode, decode = backbone.encode, backbone.decode

    def encode_each(volumes: Tensor, masked: Tensor | None = None) -> Maps:
        masks = (None, None) if masked is None else masked.chunk(2)
        features = [encode(view, mask) for view, mask in zip(volumes.chunk(2), masks)]
        if decodes_always:
            for maps in features:
                decode(maps)
        return _joined(*features)

    def decode_each(features: Maps) -> tuple[Tensor, Maps]:
        halves = ({stride: both.chunk(2)[side] for stride, both in features.items()} for side in (0, 1))
        (left, left_maps), (right, right_maps) = (decode(half) for half in halves)
        return torch.cat([left, right]), _joined(left_maps, right_maps)

    backbone.encode, backbone.decode = encode_each, decode_each


def _joined(left: Maps, right: Maps) -> Maps:
    return {stride: torch.cat([left[stride], right[stride]]) for stride in left}
