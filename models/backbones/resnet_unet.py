"""A 2-D U-Net on ResNet-50, the network of CAiD's published weights (Hosseinzadeh Taher et al., MIDL 2022).

The network is segmentation_models_pytorch's `Unet("resnet50")` with the names of its encoder and decoder, so that the
published weights fit it and ours fit that library; its `segmentation_head` is called `out` here, as everywhere. It
starts from random weights. Slices and radiographs are volumes of depth 1. They are grey, and
the network was published for three equal channels: a single channel is repeated. Maps for a picture of side n:

    stride   encoder map   channels   decoder map   channels
    1        -                        block 5       16, then a 3x3 convolution
    2        conv1         64         block 4       32
    4        layer1        256        block 3       64
    8        layer2        512        block 2       128
    16       layer3        1024       block 1       256
    32       layer4        2048       -

It has batch norms, which would count every batch twice under --use_checkpoint. --feature_size does not change its
widths.
"""

import copy

import torch
from torch import Tensor, nn

from models.backbones.interface import Size3, drop_mask_tokens, spatial_dims_of, upsample_mask

CHANNELS = {2: 64, 4: 256, 8: 512, 16: 1024, 32: 2048}
DECODER_CHANNELS = {16: 256, 8: 128, 4: 64, 2: 32, 1: 16}
GREY_CHANNELS = 3


class SliceNetwork(nn.Module):
    """The network on volumes of depth 1; state-dict names start with encoder, decoder and out."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        from segmentation_models_pytorch import Unet  # here, because no other backbone needs the library

        self.is_grey = in_channels == 1
        network = Unet(
            "resnet50",
            encoder_weights=None,
            in_channels=GREY_CHANNELS if self.is_grey else in_channels,
            decoder_channels=tuple(DECODER_CHANNELS.values()),
            classes=out_channels,
        )
        self.encoder, self.decoder = network.encoder, network.decoder
        self.out: nn.Module | None = network.segmentation_head

    def encode(self, volumes: Tensor) -> dict[int, Tensor]:
        """[B, in_channels, 1, H, W] -> {stride: [B, C, 1, H/s, W/s]}, the input among them under stride 1."""
        pictures = volumes.squeeze(2)
        if self.is_grey:
            pictures = pictures.expand(-1, GREY_CHANNELS, -1, -1)
        return {stride: one.unsqueeze(2) for stride, one in zip((1, *CHANNELS), self.encoder(pictures))}

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Encoder maps -> (output [B, out_channels, 1, H, W], or None without its layer; {1: the finest map})."""
        if self.decoder is None:
            return None, {}
        decoded = self.decoder([features[stride].squeeze(2) for stride in (1, *CHANNELS)])
        return self.out(decoded).unsqueeze(2), {1: decoded.unsqueeze(2)}

    def forward(self, volumes: Tensor) -> Tensor:
        """[B, in_channels, 1, H, W] -> [B, out_channels, 1, H, W]."""
        return self.decode(self.encode(volumes))[0]


class ResNetUNetBackbone(nn.Module):
    """The 2-D U-Net as a backbone; its decoder is built whole or not at all."""

    encoder_key_prefixes = ("encoder.",)
    decoder_key_prefixes = ("decoder.",)
    roi_multiple = max(CHANNELS)
    spatial_dims = (2,)
    network_class = SliceNetwork

    def __init__(
        self,
        feature_size: int,
        roi: Size3,
        decoder_stride: int | None = 1,
        use_checkpoint: bool = False,
        with_masks: bool = True,
        with_skips: bool = False,
    ) -> None:
        """Build for crops of `roi` (1, H, W) voxels.

        Args:
            feature_size: has no effect, the widths are ResNet-50's.
            decoder_stride: 1 or None.
            with_skips: whether `skips` will be asked; nothing more is built for it.

        Raises:
            ValueError: a crop or a decoder map that the network does not have, or --use_checkpoint.
        """
        super().__init__()
        multiple = self.roi_multiple
        if roi[0] != 1 or any(side < multiple or side % multiple for side in roi[1:]):
            raise ValueError(
                f"resnet50_unet needs crops of depth 1 whose other sides are multiples of {multiple} voxels, got "
                f"(D, H, W) = {tuple(roi)}: change --roi_x, --roi_y, --roi_z"
            )
        if decoder_stride not in (None, 1):
            raise ValueError(
                f"resnet50_unet has its decoder map at stride 1, not at {decoder_stride}, where CASA asks for one: "
                "expected --lambda2 0 (no CASA), or another --backbone"
            )
        self.channels = self.skip_channels = self.channels_of(feature_size)
        self.network = self.make_network(1, 1, feature_size, use_checkpoint, spatial_dims_of(roi))
        if with_masks:
            self.mask_voxel = nn.Parameter(torch.zeros(1))
        if decoder_stride is None:
            self._drop_decoder()

    @staticmethod
    def channels_of(feature_size: int) -> dict[int, int]:
        """Stride -> channels of the encoder's maps; `feature_size` has no effect."""
        return dict(CHANNELS)

    @staticmethod
    def make_network(
        in_channels: int, out_channels: int, feature_size: int, use_checkpoint: bool, spatial_dims: int = 3
    ) -> SliceNetwork:
        """The whole network, also for other tasks; one input channel is repeated to the published three.

        Raises:
            ValueError: a 3-D network is asked for, or --use_checkpoint.
        """
        if spatial_dims != 2:
            raise ValueError("resnet50_unet takes slices, not volumes: expected --roi_z 1, or another --backbone")
        if use_checkpoint:
            raise ValueError("--use_checkpoint: resnet50_unet has batch norms, which would count every batch twice")
        return SliceNetwork(in_channels, out_channels)

    @property
    def decoder_channels(self) -> dict[int, int]:
        """The finest decoder map, where there is a decoder."""
        return {1: DECODER_CHANNELS[1]} if self.network.decoder is not None else {}

    def _drop_decoder(self) -> None:
        self.network.decoder = self.network.out = None

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        """Maps of volumes [B, 1, 1, H, W] in [0, 1], and the visible voxels under stride 1.

        Under a block mask, bool [B, 1, h, w], True = hidden, masked voxels hold one learnt intensity.
        """
        if masked is not None:
            hidden = upsample_mask(masked, tuple(volumes.shape[2:]))
            volumes = torch.where(hidden, self.mask_voxel.to(volumes.dtype), volumes)
        return self.network.encode(volumes)

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """(reconstruction [B, 1, 1, H, W] or None, {1: decoder map})."""
        return self.network.decode(features)

    def skips(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """The maps to pool: the encoder's own."""
        return {stride: features[stride] for stride in CHANNELS}

    def encoder_twin(self) -> "ResNetUNetBackbone":
        """An independent copy without decoder and mask token."""
        twin = copy.deepcopy(self)
        twin._drop_decoder()
        drop_mask_tokens(twin)
        return twin
