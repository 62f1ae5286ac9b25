"""nnU-Net's residual encoder U-Net (ResEnc; Isensee et al., "nnU-Net Revisited", MICCAI 2024) as a backbone.

The layers are those of the library dynamic-network-architectures, so that `extract_backbone_weights.py --format nnunet`
writes weights that nnU-Net loads by itself. Depths are those of its preset ResEncL, widths start at --feature_size and
are capped at 320 (32 gives ResEncL). Maps for a crop of side n and feature size F:

    stride   encoder map             residual blocks   channels        decoder map
    1        stage 0, after a stem   1                 F               yes, then a 1x1x1 convolution
    2        stage 1                 3                 2F, up to 320   yes
    4        stage 2                 4                 4F, "           yes
    8        stage 3                 6                 8F, "           yes (CASA's H)
    16       stage 4                 6                 16F, "          yes (CASA's V reads the encoder map)
    32       stage 5 (cls: pooled)   6                 32F, "          -

There are always six stages, because finetuning and nnU-Net build the network from the feature size alone: sides of a
crop are multiples of 32 voxels, and one of them is at least 64, as the deepest instance norm needs two tokens.

All norms are instance norms, which nnU-Net prescribes. They take most of what a sample's mean over tokens could say,
so pooled features of the deepest stage separate samples less well than those of `unet`, whose deepest stage has a group
norm. Alice can pool all stages instead: `--cls_features multiscale`.
"""

import pydoc

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn

from models.backbones.interface import Size3
from models.backbones.resenc_plan import DECODER_STRIDES, KWARGS_TO_IMPORT, STRIDES, architecture_kwargs
from models.backbones.staged import StagedBackbone, StagedNetwork


def nnunet_network(in_channels: int, out_channels: int, feature_size: int) -> ResidualEncoderUNet:
    """The library's own network, with the random weights that nnU-Net starts from."""
    kwargs = architecture_kwargs(feature_size)
    classes = {name: pydoc.locate(kwargs[name]) for name in KWARGS_TO_IMPORT if kwargs[name] is not None}
    network = ResidualEncoderUNet(input_channels=in_channels, num_classes=out_channels, **(kwargs | classes))
    return network.apply(network.initialize)


def keep_one_name(network: nn.Module) -> None:
    """Drop the second name of every convolution and norm, under which the library registers it again."""
    for part in network.modules():
        if isinstance(part, ConvDropoutNormReLU):
            for name in [name for name, _ in part.named_children() if name != "all_modules"]:
                delattr(part, name)


class DecoderStage(nn.Module):
    """Upsamples the deeper map, joins the encoder's and convolves both."""

    def __init__(self, transpconv: nn.Module, convs: nn.Module) -> None:
        super().__init__()
        self.transpconv, self.convs = transpconv, convs

    def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """[B, C', d, h, w] and [B, C, 2d, 2h, 2w] -> [B, C, 2d, 2h, 2w]."""
        return self.convs(torch.cat([self.transpconv(deeper), skip], dim=1))


class ResEnc(StagedNetwork):
    """The whole network, for volumes whose sides are multiples of 32 voxels."""

    roi_multiple = max(STRIDES)

    def __init__(
        self, in_channels: int = 1, out_channels: int = 1, feature_size: int = 32, use_checkpoint: bool = False
    ) -> None:
        """`feature_size`: channels of the first stage."""
        network = nnunet_network(in_channels, out_channels, feature_size)
        keep_one_name(network)
        encoder, decoder = network.encoder, network.decoder
        super().__init__(
            embed=encoder.stem,
            embed_stride=1,
            encoder=dict(zip(STRIDES, encoder.stages)),
            decoder=dict(zip(DECODER_STRIDES, map(DecoderStage, decoder.transpconvs, decoder.stages))),
            out=decoder.seg_layers[-1],
            use_checkpoint=use_checkpoint,
        )


class ResEncBackbone(StagedBackbone):
    """The network under masks."""

    name = "resenc"
    network_class = ResEnc
    roi_multiple = ResEnc.roi_multiple
    feature_multiple = 1
    decoder_strides = DECODER_STRIDES

    @classmethod
    def channels_of(cls, feature_size: int) -> dict[int, int]:
        """Stride -> channels."""
        return dict(zip(STRIDES, architecture_kwargs(feature_size)["features_per_stage"]))

    def _check_sizes(self, feature_size: int, roi: Size3, decoder_stride: int | None) -> None:
        super()._check_sizes(feature_size, roi, decoder_stride)
        if max(roi) == self.roi_multiple:
            raise ValueError(
                f"resenc: a crop of (D, H, W) = {tuple(roi)} voxels leaves one token at stride {self.roi_multiple}, "
                "and the instance norm there needs two: make one of --roi_x, --roi_y, --roi_z at least 64"
            )
