"""SAM's network: a 3-D ResNet-18 with feature pyramids that gives every voxel a fine and a coarse embedding.

Yan et al., "SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in Radiological Images", IEEE TMI 2022,
Fig. 3; with `semantic=True` the third head of its successor UAE-S (arXiv 2311.15111). At the default options the state
dict has the published names and shapes, so that `load_state_dict(strict=True)` takes the authors' weights directly.
Every option that changes strides or widths keeps the names.

Shapes: B batch, C embedding channels, (D, H, W) input voxels, (d, h, w) voxels of one output.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]

# The published stem keeps the full resolution and the first stage halves H and W (which is why that stage has a
# projecting shortcut); the other way round gives the same sizes but not the published outputs.
PUBLISHED_STAGE_STRIDES = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
NORMS = ("batch", "instance", "group")
GROUP_NORM_GROUPS = 8


class OutputGrid(NamedTuple):
    """Where an output's voxels lie: output index i is centred at input index `i * stride + offset`, per axis.

    The published pipeline puts fine voxel i at 2 i + 0.5 along every axis, which balances the floor by which it finds a
    query's voxel. Receptive fields say 2 i along H and W, 2 i + 0.5 along D (the pool). Matching is the same: an offset
    common to query and key cancels.
    """

    stride: tuple[float, float, float]
    offset: tuple[float, float, float]


@dataclass(frozen=True)
class NetworkOptions:
    """What a network is built of; the defaults are the published ones. A checkpoint stores these, and they are flags.

    Attributes:
        width: channels of the stem; the stages have 1, 2, 4 and 8 times as many
        embed_dim: channels of every embedding
        stem_kernel: of the first convolution (D, H, W)
        stem_stride: likewise; with stage 1 and the pool the fine output's stride
        pool_stride: of the max pool after the first stage (D, H, W); 1 1 1 pools nothing
        stage_strides: one (D, H, W) stride per stage; the coarse output has the stride of everything
        stage_kernel_depths: kernel size along D per stage; along H and W it is 3
        norm: normalisation layers; batch is published, the others suit batches too small for statistics
        semantic: add the third head of UAE-S, on the fine grid; `forward` then returns (fine, coarse, semantic)
    """

    width: int = 64
    embed_dim: int = 128
    stem_kernel: Triple = (3, 7, 7)
    stem_stride: Triple = (1, 1, 1)
    pool_stride: Triple = (2, 1, 1)
    stage_strides: tuple[Triple, ...] = field(default=PUBLISHED_STAGE_STRIDES, metadata={"flag": False})
    stage_kernel_depths: tuple[int, int, int, int] = (1, 1, 3, 3)
    norm: str = field(default="batch", metadata={"choices": NORMS})
    semantic: bool = field(default=False, metadata={"flag": False})

    def __post_init__(self) -> None:
        """Turn lists, which YAML and older checkpoints have, into tuples."""
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                value = tuple(tuple(part) if isinstance(part, list) else part for part in value)
                object.__setattr__(self, name, value)


def make_norm(kind: str, num_channels: int) -> nn.Module:
    """A normalisation layer with `weight` and `bias`; only `batch` has the published buffers."""
    if kind == "batch":
        return nn.BatchNorm3d(num_channels, eps=1e-5)
    if kind == "instance":
        return nn.InstanceNorm3d(num_channels, eps=1e-5, affine=True)
    if kind == "group":
        if num_channels % GROUP_NORM_GROUPS:
            raise ValueError(f"norm='group' needs widths divisible by {GROUP_NORM_GROUPS}, got {num_channels}")
        return nn.GroupNorm(GROUP_NORM_GROUPS, num_channels, eps=1e-5)
    raise ValueError(f"norm is {kind!r}; choose one of {', '.join(NORMS)}")


class ConvNorm(nn.Module):
    """A bias-free convolution (`conv`) and its norm (`bn`), padded so that only the stride changes the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple, norm: str) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def plain_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """A pyramid convolution: bias, no norm, no activation; the wrapper gives it its published name `conv`."""
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2)))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; the first block of a stage projects its shortcut even where sizes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple, project: bool, norm: str
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, kernel, stride, norm)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel, (1, 1, 1), norm)
        self.downsample = ConvNorm(in_channels, out_channels, (1, 1, 1), stride, norm) if project else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


class Backbone(nn.Module):
    """Stem and four stages; returns the four stage outputs, the first one after the pool."""

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        self.pool_stride = options.pool_stride
        self.conv1 = ConvNorm(1, options.width, options.stem_kernel, options.stem_stride, options.norm)
        in_channels = options.width
        for stage in range(4):
            out_channels = options.width * 2**stage
            kernel = (options.stage_kernel_depths[stage], 3, 3)
            first = BasicBlock(in_channels, out_channels, kernel, options.stage_strides[stage], True, options.norm)
            second = BasicBlock(out_channels, out_channels, kernel, (1, 1, 1), False, options.norm)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, second))
            in_channels = out_channels

    def first_stage(self, volume: Tensor) -> Tensor:
        """Stem, first stage and pool: everything that works at full resolution."""
        features = self.layer1(F.relu(self.conv1(volume)))
        if self.pool_stride == (1, 1, 1):
            return features  # such a pool changes nothing, but costs as much as a convolution
        return F.max_pool3d(features, self.pool_stride, self.pool_stride)

    def forward(self, volume: Tensor) -> list[Tensor]:
        outputs = [self.first_stage(volume)]
        for stage in (self.layer2, self.layer3, self.layer4):
            outputs.append(stage(outputs[-1]))
        return outputs


class Pyramid(nn.Module):
    """A feature pyramid of which only the finest output is computed; the top-down path copies the nearest voxel."""

    def __init__(self, in_channels: list[int], embed_dim: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(plain_conv(channels, embed_dim, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList([plain_conv(embed_dim, embed_dim, 3)])

    def forward(self, features: list[Tensor]) -> Tensor:
        laterals = [conv(feature) for conv, feature in zip(self.lateral_convs, features)]
        merged = laterals[-1]
        for lateral in reversed(laterals[:-1]):
            merged = lateral + F.interpolate(merged, size=lateral.shape[2:], mode="nearest")
        return self.fpn_convs[0](merged)


class AnatomicalEmbedder(nn.Module):
    """Fine and coarse anatomical embeddings of a CT volume, L2-normalised over channels.

    Args:
        options: fields of `NetworkOptions` that are not the published ones.
    """

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = NetworkOptions(**options)
        self.backbone = Backbone(self.options)
        stage_widths = [self.options.width * 2**stage for stage in range(4)]
        self.neck = Pyramid(stage_widths[:3], self.options.embed_dim)
        self.read_out_head = Pyramid(stage_widths[3:], self.options.embed_dim)
        self.semantic_head = Pyramid(stage_widths[:3], self.options.embed_dim) if self.options.semantic else None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, volume: Tensor) -> tuple[Tensor, ...]:
        """Embed volumes.

        Args:
            volume: [B, 1, D, H, W], SPL axes, scaled as `sam_embed.preprocess` does.

        Returns:
            (fine [B, C, d, h, w], coarse [B, C, d', h', w']) and, with `semantic`, a third one on the fine grid. At the
            published options fine has stride (2, 2, 2) and coarse (4, 16, 16).
        """
        features = self.backbone(volume)
        outputs = [self.neck(features[:3]), self.read_out_head(features[3:])]
        if self.semantic_head is not None:
            outputs.append(self.semantic_head(features[:3]))
        return tuple(F.normalize(output, dim=1) for output in outputs)

    def fine_grid(self) -> OutputGrid:
        """Where the fine (and semantic) output's voxels lie in the input."""
        return self._grid(num_stages=1)

    def coarse_grid(self) -> OutputGrid:
        """Where the coarse output's voxels lie in the input."""
        return self._grid(num_stages=4)

    def _grid(self, num_stages: int) -> OutputGrid:
        """Of stride s, a padded convolution centres output i at input s * i, a pool at s * i + (s - 1) / 2."""
        strides, offsets = [], []
        for axis in range(3):
            before_pool = self.options.stem_stride[axis] * self.options.stage_strides[0][axis]
            pool = self.options.pool_stride[axis]
            stride = before_pool * pool
            for stage_stride in self.options.stage_strides[1:num_stages]:
                stride *= stage_stride[axis]
            strides.append(float(stride))
            offsets.append(before_pool * (pool - 1) / 2)
        return OutputGrid(tuple(strides), tuple(offsets))
