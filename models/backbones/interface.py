"""What methods ask of a backbone, so that adding one touches one file and a line of the registry.

Letters used for shapes in `models/` and `losses/`:
    B   volumes in a call; networks see all V crops of all samples in one call, so that B there is samples x V
    D H W   voxels of a crop (canonical axes: Superior, Posterior, Left); D = 1 for axial slices
    s   stride of a feature map in voxels; a map at stride s is [B, C_s, D/s, H/s, W/s],
        or [B, C_s, 1, H/s, W/s] of slices
    N   query tokens of CASA (stride 16 by default)
    M   key and value tokens of CASA (stride 8 by default); all tokens are in D, H, W order
    K   width of the projected space in which distributions are compared (out_dim, 512)
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size3 = tuple[int, int, int]


class Backbone(Protocol):
    """An encoder with an optional decoder. It is an nn.Module; the network that other tasks want hangs under `network`.

    Names of `network`'s state dict start with one of the prefixes, or with `out.`, the layer that belongs to the task.
    """

    network: nn.Module
    network_class: type[nn.Module]  # of `network`, or what that derives from
    channels: dict[int, int]  # stride -> channels of the encoder map; the largest stride is the deepest stage
    decoder_channels: dict[int, int]  # stride -> channels of the decoder map, for the strides that were built
    skip_channels: dict[int, int]  # stride -> channels of the maps that `skips` gives
    encoder_key_prefixes: tuple[str, ...]  # of `network`'s state dict
    decoder_key_prefixes: tuple[str, ...]
    roi_multiple: int  # of every side of a crop; slices are one voxel deep
    spatial_dims: tuple[int, ...]  # 3 where it takes volumes, 2 where it takes slices

    def __init__(
        self,
        feature_size: int,
        roi: Size3,
        decoder_stride: int | None,
        use_checkpoint: bool,
        with_masks: bool = True,
        with_skips: bool = False,
    ) -> None:
        """Build for crops of `roi` (D, H, W) voxels; D = 1 makes a 2-D network.

        `decoder_stride` is the finest decoder map that will be needed: None builds no decoder, 1 builds all of it with
        the reconstruction output. `with_masks` adds the tokens that `encode` puts where a mask hides voxels.
        `with_skips` builds what `skips` needs, whatever the decoder needs."""

    @classmethod
    def channels_of(cls, feature_size: int) -> dict[int, int]:
        """`channels` of a backbone of that size."""

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        """Map volumes [B, 1, D, H, W] in [0, 1] and block masks (True = masked = hidden) to {stride: feature map}."""

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Map `encode`'s answer to (reconstruction [B, 1, D, H, W] or None, {stride: decoder map})."""

    def skips(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """Map `encode`'s answer to the maps that describe a whole crop when pooled: {stride: map}; takes `with_skips`.

        They are what skip connections hand to the decoder: the encoder's maps, or what skip blocks make of them."""

    def encoder_twin(self) -> "Backbone":
        """An independent copy that holds the encoder's weights only."""

    @staticmethod
    def make_network(
        in_channels: int, out_channels: int, feature_size: int, use_checkpoint: bool, spatial_dims: int = 3
    ) -> nn.Module:
        """The whole `network`, for other tasks too: volumes [B, in_channels, D, H, W] -> [B, out_channels, D, H, W].

        Where `spatial_dims` is 2 it is a 2-D network on volumes of depth 1. A backbone that cannot be built like that
        raises ValueError."""


class MakeBackbone(Protocol):
    """How a method gets its backbone; everything else about it is the user's choice."""

    def __call__(self, decoder_stride: int | None, with_masks: bool, with_skips: bool = False) -> Backbone:
        """Arguments as of `Backbone`."""


def spatial_dims_of(roi: Size3) -> int:
    """2 for crops of one axial slice (D = 1), which 2-D networks take; else 3."""
    return 2 if roi[0] == 1 else 3


def upsample_mask(masked: Tensor, size: Size3) -> Tensor:
    """Repeat a block mask up to a finer grid.

    Args:
        masked: bool [B, d, h, w].
        size: the finer grid (D', H', W'); each side a multiple of the mask's.

    Returns:
        bool [B, 1, D', H', W'].

    Raises:
        ValueError: the grids do not fit into one another.
    """
    repeats = [fine // coarse for fine, coarse in zip(size, masked.shape[1:])]
    if any(fine != coarse * repeat for fine, coarse, repeat in zip(size, masked.shape[1:], repeats)):
        raise ValueError(
            f"a block mask of {tuple(masked.shape[1:])} blocks does not divide a grid of {tuple(size)}: "
            "--mask_block must be a multiple of that grid's stride, and every side of the crop (--roi_x, --roi_y, "
            "--roi_z) one of --mask_block"
        )
    fine = masked[:, None, :, None, :, None, :, None]  # [B, 1, d, 1, h, 1, w, 1]
    batch, (depth, height, width) = masked.shape[0], masked.shape[1:]
    fine = fine.expand(batch, 1, depth, repeats[0], height, repeats[1], width, repeats[2])
    return fine.reshape(batch, 1, *size)


def hidden_shares(masked: Tensor, size: Size3) -> Tensor:
    """How much of each token's cell a block mask hides.

    Args:
        masked: bool [B, d, h, w].
        size: the tokens' grid (D', H', W'), coarser or finer than the mask's.

    Returns:
        [B, D' * H' * W'] in [0, 1], in the order of `flatten_tokens`.
    """
    return F.interpolate(masked[:, None].float(), size=size, mode="area").flatten(1)


def flatten_tokens(feature_map: Tensor) -> Tensor:
    """[B, C, d, h, w] -> tokens [B, d*h*w, C]; the same D, H, W order for encoder and decoder maps."""
    return feature_map.flatten(2).transpose(1, 2)


def pool_tokens(features: dict[int, Tensor], strides: tuple[int, ...]) -> Tensor:
    """Means over the tokens of the maps at `strides`, joined: {stride: map} -> [R, sum of C] in float32 or more."""
    maps = [features[stride] for stride in strides]
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in maps]
    return torch.cat([one.mean(dim=(2, 3, 4)) for one in wide], dim=1)


def drop_mask_tokens(backbone: nn.Module) -> None:
    """Delete what only masks need."""
    for name in ("mask_token", "mask_voxel"):
        if hasattr(backbone, name):
            delattr(backbone, name)


def truncated_normal(*shape: int) -> nn.Parameter:
    """A learnt token, drawn with the customary standard deviation of 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
