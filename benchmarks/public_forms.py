"""Pretraining steps as the public code of each method composes them, from MONAI's and other libraries' plain modules.

    alice     MONAI's SwinUNETR, once for every view of student and teacher, the teacher's with a decoder
    caid      both networks are whole U-Nets; nobody reads what the keys' decoder makes
    dino      MONAI's encoder in student and teacher, both views in one pass
    simsiam   MONAI's encoder, each view in a pass of its own
    voco      MONAI's SwinUNETR (use_v2) without its decoder, all crops of all volumes in one pass: once in the second
              version, in student and teacher in the first

Heads, losses, moving averages and the optimiser are ours on both sides: next to the networks they cost nothing. So both
sides compute the same loss, which `benchmarks.method_steps` checks. What public code does beyond that, and what would
slow it down, is left out (amsgrad, buffers that DDP broadcasts, a copy of the queue in each step).
"""

import copy

from monai.networks.nets import SwinUNETR

from benchmarks.naive_step import take_views_apart
from models.backbones.swin_unetr import SwinUNETRBackbone
from models.methods.alice import Alice
from models.methods.caid import CAiD
from models.methods.method import Method


def public_form(ours: Method) -> Method:
    """A copy of a method with the same weights whose networks are composed as in its public code."""
    method = copy.deepcopy(ours)
    if isinstance(method, CAiD):
        method.teacher.backbone = copy.deepcopy(method.student.backbone).requires_grad_(False)
    for network in method.networks().values():
        if isinstance(getattr(network, "backbone", None), SwinUNETRBackbone):
            use_plain_monai(network.backbone)
    if isinstance(method, Alice):
        take_views_apart(method)
    return method


def use_plain_monai(backbone: SwinUNETRBackbone) -> None:
    """Put MONAI's network as it comes in the place of ours, with the same weights."""
    ours = backbone.network
    plain = SwinUNETR(
        in_channels=1,
        out_channels=1,
        feature_size=backbone.channels[2],
        use_checkpoint=backbone.use_checkpoint,
        use_v2=backbone.use_v2,
    )
    for name, _ in list(plain.named_children()):
        if not hasattr(ours, name):
            delattr(plain, name)
    plain.load_state_dict(ours.state_dict())
    requires_grad = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    backbone.network = plain.train(ours.training)
