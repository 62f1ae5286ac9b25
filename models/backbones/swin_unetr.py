"""MONAI's SwinUNETR as Alice's backbone: method section "Networks" (Jiang et al., ICCV 2023, figure 2).

MONAI's own modules are called in MONAI's own order, so that without a mask `decode(encode(x))` equals the network's
forward to rounding (on CPU, window attention takes the path of `models.layers.window_attention`) and every exported
weight fits MONAI's `SwinUNETR`. Maps for a crop of side n and feature size F:

    stride   encoder map (token-wise normalised)       channels   decoder map          channels
    2        patch embedding                           F          decoder2             F
    4        after layers1 and its merging             2F         decoder3             2F
    8        after layers2                             4F         decoder4             4F   (CASA's H)
    16       after layers3 (CASA's V)                  8F         decoder5             8F
    32       after layers4 (cls: pooled)               16F        -
    1        the voxels that encoder1 may see          1          decoder1, then out   F

Masking. A hierarchical window transformer cannot drop tokens, so every masked patch embedding (2 voxels a side) is
replaced by one learnt token right after patch embedding, as SimMIM does. encoder1 reads raw voxels for the finest skip
connection: it sees one learnt intensity wherever a voxel is masked, so no masked intensity reaches any output.

`swin_unetr_v2` is MONAI's `use_v2=True`: a residual convolution block before each stage of windows (He et al.,
"SwinUNETR-V2", MICCAI 2023). VoCo's published weights are of this network.

Slices. Crops of depth 1 make MONAI's 2-D network, whose weights fit `SwinUNETR(spatial_dims=2)`. Its maps are
[B, C, 1, H/s, W/s] outside of the modules and [B, C, H/s, W/s] inside.

Pooling. Without a decoder the blocks encoder1 to encoder4 and encoder10 can be had too (`with_skips`); their outputs at
strides 1, 2, 4, 8 and 32 are the maps that VoCo pools: F, F, 2F, 4F and 16F channels. Stride 16 has no block.
"""

import copy

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.interface import Size3, drop_mask_tokens, spatial_dims_of, truncated_normal, upsample_mask
from models.layers.composed_upsampling import use_composed_upsampling
from models.layers.convolution import use_steady_convolutions
from models.layers.instance_norm import use_steady_instance_norm
from models.layers.window_attention import use_fast_window_attention

STAGE_STRIDES = (2, 4, 8, 16, 32)
# Stride of a decoder map -> the decoder that makes it and the encoder block on its skip connection.
DECODER_LEVELS = {
    16: ("decoder5", None),
    8: ("decoder4", "encoder4"),
    4: ("decoder3", "encoder3"),
    2: ("decoder2", "encoder2"),
    1: ("decoder1", "encoder1"),
}
# Stride of a map that is pooled -> the encoder block that makes it.
SKIP_BLOCKS = {1: "encoder1", 2: "encoder2", 4: "encoder3", 8: "encoder4", 32: "encoder10"}


class SliceSwinUNETR(SwinUNETR):
    """MONAI's 2-D network, with its names, on volumes of depth 1."""

    def forward(self, volumes: Tensor) -> Tensor:
        """[B, in_channels, 1, H, W] -> [B, out_channels, 1, H, W]."""
        return super().forward(volumes.squeeze(2)).unsqueeze(2)


class SwinUNETRBackbone(nn.Module):
    """SwinUNETR split into `encode` and `decode`, with a mask token, holding no module that its user does not need."""

    encoder_key_prefixes = ("swinViT.", "encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10.")
    decoder_key_prefixes = ("decoder5.", "decoder4.", "decoder3.", "decoder2.", "decoder1.")
    roi_multiple = STAGE_STRIDES[-1]
    spatial_dims = (2, 3)
    use_v2 = False
    network_class = SwinUNETR

    def __init__(
        self,
        feature_size: int = 48,
        roi: Size3 = (96, 96, 96),
        decoder_stride: int | None = 1,
        use_checkpoint: bool = False,
        with_masks: bool = True,
        with_skips: bool = False,
    ) -> None:
        """Build the network for crops of `roi` (D, H, W) voxels, a 2-D one where D = 1.

        Args:
            feature_size: channels F at stride 2, a multiple of 12.
            decoder_stride: finest decoder map that is needed (16, 8, 4, 2, 1), or None for no decoder; 1 adds the
                output.
            use_checkpoint: recompute activations in the backward pass instead of keeping them.
            with_masks: whether `encode` will be given masks.
            with_skips: build all encoder blocks, which `skips` needs.

        Raises:
            ValueError: a size that the network cannot take.
        """
        super().__init__()
        check_sizes(feature_size, roi, decoder_stride, with_skips)
        self.decoder_stride = decoder_stride
        self.with_skips = with_skips
        self.use_checkpoint = use_checkpoint
        self.channels = self.channels_of(feature_size)
        self.is_flat = spatial_dims_of(roi) == 2
        self.network = self.make_network(1, 1, feature_size, use_checkpoint, spatial_dims_of(roi))
        if with_masks:
            self.mask_token = truncated_normal(1, feature_size, 1, 1, 1)
            if self._reads_voxels:
                self.mask_voxel = nn.Parameter(torch.zeros(1))
        self._drop_unused_modules()

    @staticmethod
    def channels_of(feature_size: int) -> dict[int, int]:
        """Stride -> channels of the encoder's maps."""
        return {stride: feature_size * stride // 2 for stride in STAGE_STRIDES}

    @classmethod
    def make_network(
        cls, in_channels: int, out_channels: int, feature_size: int, use_checkpoint: bool, spatial_dims: int = 3
    ) -> SwinUNETR:
        """MONAI's network with faster window attention and upsampling, and with norms and convolutions right on CPU."""
        network_class = cls.network_class if spatial_dims == 3 else SliceSwinUNETR
        network = network_class(
            in_channels=in_channels,
            out_channels=out_channels,
            feature_size=feature_size,
            use_checkpoint=use_checkpoint,
            use_v2=cls.use_v2,
            spatial_dims=spatial_dims,
        )
        use_fast_window_attention(network)
        use_steady_instance_norm(network)
        use_steady_convolutions(network)
        use_composed_upsampling(network)
        return network

    @property
    def decoder_channels(self) -> dict[int, int]:
        """Stride -> channels of the decoder maps that were built."""
        return {s: self.channels[max(s, 2)] for s in DECODER_LEVELS if self.decoder_stride and s >= self.decoder_stride}

    @property
    def skip_channels(self) -> dict[int, int]:
        """Stride -> channels of the maps that `skips` gives."""
        return {stride: self.channels[max(stride, 2)] for stride in SKIP_BLOCKS}

    @property
    def _reads_voxels(self) -> bool:
        """Whether there is a block encoder1."""
        return self.decoder_stride == 1 or self.with_skips

    def _drop_unused_modules(self) -> None:
        """Delete what gets no gradient: DDP then runs without searching for unused parameters."""
        dropped = [names for stride, names in DECODER_LEVELS.items() if stride not in self.decoder_channels]
        unused = [decoder for decoder, _ in dropped]
        if not self.with_skips:
            unused += [encoder for _, encoder in dropped if encoder]
            unused += ["encoder10"] if self.decoder_stride is None else []
        if self.decoder_stride != 1:
            unused.append("out")
        for name in unused:
            delattr(self.network, name)

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        """The five encoder maps, and under key 1 the voxels that the finest skip connection may see.

        Args:
            volumes: [B, 1, D, H, W], intensities in [0, 1]; sides multiples of 32, but for slices D = 1.
            masked: bool [B, d, h, w] block mask, True = hidden; blocks at least 2 voxels a side. None hides nothing.

        Returns:
            {stride: [B, C_stride, D/stride, H/stride, W/stride]} for strides 2 to 32, and 1 where encoder1 is built.
        """
        vit = self.network.swinViT
        tokens = self._outside(vit.pos_drop(vit.patch_embed(self._inside(volumes))))  # [B, F, D/2, H/2, W/2]
        if masked is not None:
            token_mask = upsample_mask(masked, tuple(tokens.shape[2:]))
            tokens = torch.where(token_mask, self.mask_token.to(tokens.dtype), tokens)
        tokens = self._inside(tokens)
        features = {2: self._outside(vit.proj_out(tokens, self.network.normalize))}
        for number, stride in enumerate(STAGE_STRIDES[1:], start=1):
            if self.use_v2:
                tokens = self._run_block(getattr(vit, f"layers{number}c")[0], tokens.contiguous())
            layers = getattr(vit, f"layers{number}")
            tokens = layers[0](tokens)  # [B, F*stride/2, D/stride, H/stride, W/stride]
            features[stride] = self._outside(vit.proj_out(tokens, self.network.normalize))
        if self._reads_voxels:
            features[1] = self._visible_voxels(volumes, masked)
        return features

    def _visible_voxels(self, volumes: Tensor, masked: Tensor | None) -> Tensor:
        if masked is None:
            return volumes
        return torch.where(upsample_mask(masked, tuple(volumes.shape[2:])), self.mask_voxel.to(volumes.dtype), volumes)

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Run the decoder as far as it was built.

        Returns:
            reconstruction [B, 1, D, H, W], or None unless the decoder reaches stride 1; {stride: decoder map}.
        """
        decoded: dict[int, Tensor] = {}
        if self.decoder_stride is None:
            return None, decoded
        current = self._run("encoder10", features[32])
        for stride in self.decoder_channels:
            decoder, skip_encoder = DECODER_LEVELS[stride]
            skip = self._run(skip_encoder, features[stride]) if skip_encoder else features[stride]
            current = decoded[stride] = self._run(decoder, current, skip)
        output = self._outside(self.network.out(self._inside(current))) if self.decoder_stride == 1 else None
        return output, decoded

    def skips(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """The maps to pool: outputs of the encoder blocks at strides 1, 2, 4, 8 and 32 (needs `with_skips`)."""
        return {stride: self._run(block, features[stride]) for stride, block in SKIP_BLOCKS.items()}

    def _run(self, name: str, *inputs: Tensor) -> Tensor:
        return self._outside(self._run_block(getattr(self.network, name), *map(self._inside, inputs)))

    def _inside(self, one: Tensor) -> Tensor:
        """A map as MONAI's modules take it: without the axis D where the network is 2-D."""
        return one.squeeze(2) if self.is_flat else one

    def _outside(self, one: Tensor) -> Tensor:
        """A module's map as everybody else takes it: with the axis D."""
        return one.unsqueeze(2) if self.is_flat else one

    def _run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encoder_twin(self) -> "SwinUNETRBackbone":
        """An independent copy without decoder and mask token: the EMA teacher.

        It keeps encoder1 to encoder10 wherever the student has them, although only swinViT runs: they belong to the
        weights that the teacher exports.
        """
        twin = copy.deepcopy(self)
        twin.decoder_stride = None
        for name in [prefix.rstrip(".") for prefix in self.decoder_key_prefixes] + ["out"]:
            if hasattr(twin.network, name):
                delattr(twin.network, name)
        drop_mask_tokens(twin)
        return twin


class SwinUNETRV2Backbone(SwinUNETRBackbone):
    """SwinUNETR with a residual convolution block before each stage of windows."""

    use_v2 = True


def check_sizes(feature_size: int, roi: Size3, decoder_stride: int | None, with_skips: bool = False) -> None:
    """Raise ValueError, naming the flag, for sizes that SwinUNETR cannot take."""
    if feature_size < 12 or feature_size % 12:
        raise ValueError(f"--feature_size must be a positive multiple of 12 for swin_unetr, got {feature_size}")
    multiple = SwinUNETRBackbone.roi_multiple
    sides = roi[1:] if roi[0] == 1 else roi
    if len(roi) != 3 or any(side < multiple or side % multiple for side in sides):
        raise ValueError(
            f"swin_unetr needs crops whose sides are multiples of {multiple} voxels (slices: --roi_z 1), got "
            f"(D, H, W) = {tuple(roi)}: change --roi_x, --roi_y, --roi_z"
        )
    if decoder_stride is not None and decoder_stride not in DECODER_LEVELS:
        raise ValueError(f"swin_unetr has decoder maps at strides {tuple(DECODER_LEVELS)}, not at {decoder_stride}")
    if (decoder_stride is not None or with_skips) and max(roi) == multiple:
        alone = "" if with_skips else ", or train cls alone (--lambda2 0 --lambda3 0)"
        raise ValueError(
            f"a crop of {tuple(roi)} voxels leaves one token at stride {multiple}, and the instance norm after it "
            f"needs two: make one of --roi_x, --roi_y, --roi_z at least 64{alone}"
        )
