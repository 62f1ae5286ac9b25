"""A network of stages, and the one way to make a Backbone of it: what nnFormer, the U-Net and ResEnc share.

A new backbone of this kind writes its blocks and fills in a `StagedNetwork`; masking, the EMA teacher's copy and
leaving out unused modules come from `StagedBackbone`.

Masking. Convolutions look beyond a block, so masked voxels become one learnt intensity before any layer reads them;
and as SimMIM does for patch embeddings, every masked place of the embedded map becomes one learnt token. No masked
intensity reaches any output.

Shape letters: `models.backbones.interface`.
"""

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.interface import Size3, drop_mask_tokens, spatial_dims_of, truncated_normal, upsample_mask
from models.layers.convolution import use_steady_convolutions
from models.layers.instance_norm import use_steady_instance_norm


class StagedNetwork(nn.Module):
    """An encoder and decoder of stages, usable alone for segmentation: `forward` maps volumes to logits.

    State-dict names start with `embed.`, `encoder.STRIDE.`, `decoder.STRIDE.` and `out.` (the task's layer).
    """

    roi_multiple: ClassVar[int]  # sides of a volume must be multiples of the deepest stride

    def __init__(
        self, embed: nn.Module, embed_stride: int, encoder: dict[int, nn.Module], decoder: dict[int, nn.Module],
        out: nn.Module, use_checkpoint: bool,
    ) -> None:  # fmt: skip
        """Compose the parts.

        Args:
            embed: volumes -> map at `embed_stride`.
            encoder: stride -> stage that takes the map of the stage before, in order of rising strides.
            decoder: stride -> stage that takes (deeper map, encoder map of this stride), in order of falling strides.
            out: finest decoder map -> output at stride 1.
            use_checkpoint: recompute a stage's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.embed, self.embed_stride = embed, embed_stride
        self.encoder = nn.ModuleDict({str(stride): stage for stride, stage in encoder.items()})
        self.decoder = nn.ModuleDict({str(stride): stage for stride, stage in decoder.items()})
        self.out: nn.Module | None = out
        self.use_checkpoint = use_checkpoint
        use_steady_convolutions(self)
        use_steady_instance_norm(self)

    def encode(self, embedded: Tensor) -> dict[int, Tensor]:
        """The embedded map [B, C, ...] -> {stride: map}, each passed through `tidy`."""
        current, features = embedded, {}
        if str(self.embed_stride) not in self.encoder:
            features[self.embed_stride] = self.tidy(current)
        for stride, stage in self.encoder.items():
            current = self._run(stage, current)
            features[int(stride)] = self.tidy(current)
        return features

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Encoder maps -> (output at stride 1, or None without `out`; {stride: decoder map})."""
        current, decoded = features[max(features)], {}
        for stride, stage in self.decoder.items():
            current = decoded[int(stride)] = self._run(stage, current, features[int(stride)])
        return (self.out(current) if self.out is not None else None), decoded

    def tidy(self, feature_map: Tensor) -> Tensor:
        """What is done to a stage's map before others than the next stage see it: nothing."""
        return feature_map

    def forward(self, volumes: Tensor) -> Tensor:
        """[B, in_channels, D, H, W] -> [B, out_channels, D, H, W].

        Raises:
            ValueError: a side is no multiple of `roi_multiple`.
        """
        if any(side % self.roi_multiple for side in volumes.shape[2:]):
            raise ValueError(
                f"{type(self).__name__} takes volumes whose sides are multiples of {self.roi_multiple} voxels, got "
                f"(D, H, W) = {tuple(volumes.shape[2:])}: change --roi_x, --roi_y, --roi_z"
            )
        return self.decode(self.encode(self.embed(volumes)))[0]

    def _run(self, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


class StagedBackbone(nn.Module):
    """A `StagedNetwork` under masks, holding no module that its user does not need. Subclasses name the network."""

    encoder_key_prefixes = ("embed.", "encoder.")
    decoder_key_prefixes = ("decoder.",)
    spatial_dims = (3,)
    name: ClassVar[str]
    network_class: ClassVar[Callable[[int, int, int, bool], StagedNetwork]]
    roi_multiple: ClassVar[int]
    feature_multiple: ClassVar[int]  # --feature_size must be a multiple of it
    stage_widths: ClassVar[dict[int, float]]  # stride -> channels, in units of --feature_size; see `channels_of`
    decoder_strides: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        feature_size: int,
        roi: Size3,
        decoder_stride: int | None = 1,
        use_checkpoint: bool = False,
        with_masks: bool = True,
        with_skips: bool = False,
    ) -> None:
        """Build the network for crops of `roi` (D, H, W) voxels.

        Args:
            feature_size: channels of one stage, the network says which.
            decoder_stride: finest decoder map that is needed, or None for no decoder; 1 adds the output.
            use_checkpoint: recompute activations in the backward pass instead of keeping them.
            with_masks: whether `encode` will be given masks.
            with_skips: whether `skips` will be asked; nothing more is built for it.

        Raises:
            ValueError: a size that the network cannot take.
        """
        super().__init__()
        self._check_sizes(feature_size, roi, decoder_stride)
        self.channels = self.channels_of(feature_size)
        self.network = self.make_network(1, 1, feature_size, use_checkpoint)
        if with_masks:
            self.mask_voxel = nn.Parameter(torch.zeros(1))
            self.mask_token = truncated_normal(1, self.channels[self.network.embed_stride], 1, 1, 1)
        self._drop_decoder_below(decoder_stride)

    @classmethod
    def make_network(
        cls, in_channels: int, out_channels: int, feature_size: int, use_checkpoint: bool, spatial_dims: int = 3
    ) -> StagedNetwork:
        """The whole network, also for other tasks: any number of input channels and output classes.

        Raises:
            ValueError: a 2-D network is asked for.
        """
        cls._check_spatial_dims(spatial_dims)
        return cls.network_class(in_channels, out_channels, feature_size, use_checkpoint)

    @classmethod
    def channels_of(cls, feature_size: int) -> dict[int, int]:
        """Stride -> channels of the encoder's maps."""
        return {stride: int(feature_size * width) for stride, width in cls.stage_widths.items()}

    @property
    def decoder_channels(self) -> dict[int, int]:
        """Stride -> channels of the decoder maps that were built."""
        return {int(stride): self.channels[int(stride)] for stride in self.network.decoder}

    @property
    def skip_channels(self) -> dict[int, int]:
        """Stride -> channels of the maps that `skips` gives."""
        return self.channels

    @classmethod
    def _check_spatial_dims(cls, spatial_dims: int) -> None:
        if spatial_dims not in cls.spatial_dims:
            raise ValueError(
                f"--roi_z 1: {cls.name} takes volumes, not slices; expected --roi_z {cls.roi_multiple} or more, or "
                "--backbone swin_unetr, swin_unetr_v2 or resnet50_unet"
            )

    def _check_sizes(self, feature_size: int, roi: Size3, decoder_stride: int | None) -> None:
        self._check_spatial_dims(spatial_dims_of(roi))
        if feature_size < 1 or feature_size % self.feature_multiple:
            raise ValueError(
                f"--feature_size must be a positive multiple of {self.feature_multiple} for {self.name}, "
                f"got {feature_size}"
            )
        if len(roi) != 3 or any(side < self.roi_multiple or side % self.roi_multiple for side in roi):
            raise ValueError(
                f"{self.name} needs crops whose sides are multiples of {self.roi_multiple} voxels, got (D, H, W) = "
                f"{tuple(roi)}: change --roi_x, --roi_y, --roi_z"
            )
        if decoder_stride not in (None, 1, *self.decoder_strides):
            raise ValueError(f"{self.name} has decoder maps at strides {self.decoder_strides}, not at {decoder_stride}")

    def _drop_decoder_below(self, decoder_stride: int | None) -> None:
        """Delete what gets no gradient: DDP then runs without searching for unused parameters."""
        for stride in list(self.network.decoder):
            if decoder_stride is None or int(stride) < decoder_stride:
                del self.network.decoder[stride]
        if decoder_stride != 1:
            self.network.out = None

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        """The encoder's maps.

        Args:
            volumes: [B, 1, D, H, W], intensities in [0, 1].
            masked: bool [B, d, h, w] block mask, True = hidden; None hides nothing.

        Returns:
            {stride: [B, C_stride, D/stride, H/stride, W/stride]} for the strides in `channels`.
        """
        if masked is None:
            return self.network.encode(self.network.embed(volumes))
        voxel_mask = upsample_mask(masked, tuple(volumes.shape[2:]))
        embedded = self.network.embed(torch.where(voxel_mask, self.mask_voxel.to(volumes.dtype), volumes))
        token_mask = upsample_mask(masked, tuple(embedded.shape[2:]))
        return self.network.encode(torch.where(token_mask, self.mask_token.to(embedded.dtype), embedded))

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The decoder, as far as it was built: (reconstruction [B, 1, D, H, W] or None, {stride: decoder map})."""
        return self.network.decode(features)

    def skips(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """The maps to pool: the encoder's own."""
        return features

    def encoder_twin(self) -> "StagedBackbone":
        """An independent copy without decoder and mask tokens: the EMA teacher."""
        twin = copy.deepcopy(self)
        twin._drop_decoder_below(None)
        drop_mask_tokens(twin)
        return twin
