"""Backbones by name. A new one is a file that fits `models.backbones.interface.Backbone`, and a line here."""

from torch import nn

from models.backbones.nnformer import NNFormerBackbone
from models.backbones.resenc import ResEncBackbone
from models.backbones.resnet_unet import ResNetUNetBackbone
from models.backbones.swin_unetr import SwinUNETRBackbone, SwinUNETRV2Backbone
from models.backbones.unet import UNetBackbone

BACKBONES = {
    "nnformer": NNFormerBackbone,
    "resenc": ResEncBackbone,
    "resnet50_unet": ResNetUNetBackbone,
    "swin_unetr": SwinUNETRBackbone,
    "swin_unetr_v2": SwinUNETRV2Backbone,
    "unet": UNetBackbone,
}


def segmentation_network(
    name: str,
    in_channels: int,
    out_channels: int,
    feature_size: int,
    use_checkpoint: bool = False,
    spatial_dims: int = 3,
) -> nn.Module:
    """The whole network that a backbone pretrains, with an output for another task.

    Extracted weights carry its names (all but those of the output, `out.`), so `load_state_dict(weights, strict=False)`
    fits.

    Args:
        name: of `BACKBONES`.
        out_channels: number of classes, background included.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
        spatial_dims: 3, or 2 for slices (see `models.backbones.interface.spatial_dims_of`).

    Returns:
        A module that maps [B, in_channels, D, H, W] to logits [B, out_channels, D, H, W]; D = 1 in 2-D.

    Raises:
        ValueError: unknown name, or a network that does not exist in so many dimensions, naming the flag.
    """
    if name not in BACKBONES:
        raise ValueError(f"--backbone must be one of {sorted(BACKBONES)}, got {name!r}")
    return BACKBONES[name].make_network(in_channels, out_channels, feature_size, use_checkpoint, spatial_dims)
