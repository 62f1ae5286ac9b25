"""nnFormer, the published code's own backbone: Zhou et al., "nnFormer: Interleaved Transformer for Volumetric
Segmentation", 2021, in the sizes of method section "Networks": patch 2, depths 2, heads 6 to 48, windows 4, 4, 8, 4.

Convolutions embed and merge, window attention works in between, and the decoder asks the encoder through attention
instead of joining channels. Maps for a crop of side n and feature size F (48: 9.7 M parameters):

    stride   encoder map (token-wise normalised)   channels   heads   window   decoder map
    2        2 blocks                              F          6       4        yes
    4        2 blocks                              2F         12      4        yes
    8        2 blocks                              4F         24      8        yes (CASA's H)
    16       2 blocks (cls: pooled; CASA's V)      8F         48      4        -
    1        -                                     -                           output, by transposed convolution

A decoder stage doubles the grid, lets the result ask the encoder's map of the same stride (skip attention), then
attends to itself in shifted windows.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.staged import StagedBackbone, StagedNetwork
from models.layers.windows import SwinBlock

NUM_HEADS = {2: 6, 4: 12, 8: 24, 16: 48}
WINDOWS = {2: 4, 4: 4, 8: 8, 16: 4}
WIDTHS = {2: 1, 4: 2, 8: 4, 16: 8}
DECODER_STRIDES = (8, 4, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, D, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> [B, C, D, H, W]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbedding(nn.Sequential):
    """Four convolutions, the first of which halves the grid: [B, in, D, H, W] -> [B, F, D/2, H/2, W/2]."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            *conv_unit(in_channels, width // 2, stride=2),
            *conv_unit(width // 2, width // 2),
            *conv_unit(width // 2, width),
            nn.Conv3d(width, width, 3, padding=1),
            ChannelNorm(width),
        )


def conv_unit(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """Convolution, GELU, channel norm."""
    convolution = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
    return convolution, nn.GELU(), ChannelNorm(out_channels)


class EncoderStage(nn.Module):
    """Merging by a strided convolution (but at the first stage), then a plain and a shifted block."""

    def __init__(self, stride: int, feature_size: int) -> None:
        super().__init__()
        dim = WIDTHS[stride] * feature_size
        is_first = stride == min(WIDTHS)
        self.merge = (
            None if is_first else nn.Sequential(ChannelNorm(dim // 2), nn.Conv3d(dim // 2, dim, 3, stride=2, padding=1))
        )
        self.blocks = nn.ModuleList(
            SwinBlock(dim, NUM_HEADS[stride], WINDOWS[stride], is_shifted) for is_shifted in (False, True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C/2, 2d, 2h, 2w] (the first stage: [B, C, d, h, w]) -> [B, C, d, h, w]."""
        x = x if self.merge is None else self.merge(x)
        x = x.movedim(1, -1)  # [B, d, h, w, C]
        for block in self.blocks:
            x = block(x)
        return x.movedim(-1, 1).contiguous()


class DecoderStage(nn.Module):
    """A grid twice as fine, then skip attention and self-attention."""

    def __init__(self, stride: int, feature_size: int) -> None:
        super().__init__()
        dim = WIDTHS[stride] * feature_size
        self.expand = nn.Sequential(ChannelNorm(2 * dim), nn.ConvTranspose3d(2 * dim, dim, 2, stride=2))
        heads, window = NUM_HEADS[stride], WINDOWS[stride]
        self.skip_block = SwinBlock(dim, heads, window, is_shifted=False, has_source=True)
        self.block = SwinBlock(dim, heads, window, is_shifted=True)

    def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """[B, 2C, d/2, h/2, w/2] and the encoder's [B, C, d, h, w] -> [B, C, d, h, w]."""
        x = self.expand(deeper).movedim(1, -1)  # [B, d, h, w, C]
        x = self.block(self.skip_block(x, skip.movedim(1, -1)))
        return x.movedim(-1, 1).contiguous()


class NNFormer(StagedNetwork):
    """The whole network, for volumes whose sides are multiples of 16 voxels."""

    roi_multiple = max(WIDTHS)

    def __init__(
        self, in_channels: int = 1, out_channels: int = 1, feature_size: int = 48, use_checkpoint: bool = False
    ) -> None:
        """`feature_size`: channels at stride 2, a multiple of 6."""
        super().__init__(
            embed=PatchEmbedding(in_channels, feature_size),
            embed_stride=2,
            encoder={stride: EncoderStage(stride, feature_size) for stride in WIDTHS},
            decoder={stride: DecoderStage(stride, feature_size) for stride in DECODER_STRIDES},
            out=nn.ConvTranspose3d(feature_size, out_channels, 2, stride=2),
            use_checkpoint=use_checkpoint,
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def tidy(self, feature_map: Tensor) -> Tensor:
        """Normalise every token over its channels, without weights, as SwinUNETR does."""
        tokens = feature_map.movedim(1, -1)
        return F.layer_norm(tokens, tokens.shape[-1:]).movedim(-1, 1).contiguous()


class NNFormerBackbone(StagedBackbone):
    """nnFormer as Alice's backbone."""

    name = "nnformer"
    network_class = NNFormer
    roi_multiple = NNFormer.roi_multiple
    feature_multiple = min(NUM_HEADS.values())
    stage_widths = WIDTHS
    decoder_strides = DECODER_STRIDES
