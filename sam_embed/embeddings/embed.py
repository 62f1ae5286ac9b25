"""Embedding a whole volume within a memory limit, exactly: every stage of the network runs slab by slab along D.

A slab carries as many extra slices of a stage's input as its kernels reach, so that its result equals the one on the
whole volume (but for rounding); only the first stage works at full resolution, and that is where the memory goes: 64
channels at 2 mm are 2.5 GB for a trunk, and several such maps live at once. The published layout needs one or two extra
slices there (its first two stages have kernels of depth 1), so thin slabs cost next to nothing.

Networks whose norms look at the whole map (`norm="instance"` or `"group"`) cannot be cut and run in one piece.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.ct.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.network import AnatomicalEmbedder, ConvNorm, OutputGrid, Pyramid
from sam_embed.preprocess import prepare

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Maps of a stage's width that live at once while it runs (input, two convolutions, shortcut, workspace), measured.
LIVE_MAPS = 5


def embed_volume(
    network: AnatomicalEmbedder, volume: Volume, info: EmbedderInfo, memory_mb: float = 2048, name: str = ""
) -> Embedding:
    """Embed one volume with a network in evaluation mode, on the network's device and in its precision.

    Args:
        network: from `load_embedder`, perhaps through `for_inference`.
        volume: int16 HU [D, H, W], canonical orientation.
        info: of the checkpoint.
        memory_mb: working memory beyond the volume, the feature maps at the fine grid and the result.
        name: of the case.

    Returns:
        The embedding, half precision, on the CPU.
    """
    tensor, affine, body = prepare(volume, info)
    weight = next(network.parameters())
    fine, coarse, *semantic = embed_tensor(network, tensor.to(weight.device, weight.dtype), memory_mb)
    return Embedding(
        name=name,
        fine=fine,
        coarse=coarse,
        fine_affine=output_affine(affine, network.fine_grid()),
        coarse_affine=output_affine(affine, network.coarse_grid()),
        semantic=semantic[0] if semantic else None,
        body=torch.from_numpy(_at_outputs(body, network.fine_grid(), tuple(fine.shape[1:]))),
        fingerprint=info.fingerprint,
    )


def output_affine(input_affine: np.ndarray, grid: OutputGrid) -> np.ndarray:
    """The affine [4, 4] of an output's voxels, from that of the input's."""
    output_to_input = np.diag([*grid.stride, 1.0])
    output_to_input[:3, 3] = grid.offset
    return np.asarray(input_affine, dtype=np.float64) @ output_to_input


def _at_outputs(mask: np.ndarray, grid: OutputGrid, shape: tuple[int, int, int]) -> np.ndarray:
    """The input mask's value nearest to each of an output's voxels."""
    nearest = [
        np.minimum(np.rint(np.arange(size) * stride + offset).astype(int), length - 1)
        for size, stride, offset, length in zip(shape, grid.stride, grid.offset, mask.shape)
    ]
    return mask[np.ix_(*nearest)]


@torch.no_grad()
def embed_tensor(network: AnatomicalEmbedder, volume: Tensor, memory_mb: float = 2048) -> tuple[Tensor, ...]:
    """The outputs of `network(volume)` for one volume [1, 1, D, H, W], as float16 [C, d, h, w] on the CPU.

    Raises:
        ValueError: `memory_mb` is no size, or a network that cannot be cut needs more.
    """
    if not 0 < memory_mb < math.inf:
        raise ValueError(f"--memory_mb {memory_mb:g}: expected a size in MB, more than 0")
    if network.training:
        raise ValueError("embedding needs the network in evaluation mode: call network.eval() first")
    if network.options.norm != "batch":
        return _embed_in_one_piece(network, volume, memory_mb)
    backbone = network.backbone
    # Stem, first stage and pool in one: nothing between them is kept at full resolution.
    stages = [
        _stage(backbone.first_stage, [backbone.conv1, *_convolutions(backbone.layer1)], backbone.pool_stride[0]),
        *(_stage(layer, _convolutions(layer)) for layer in (backbone.layer2, backbone.layer3, backbone.layer4)),
    ]
    features = []
    for stage in stages:
        features.append(_run_stage(stage, features[-1] if features else volume, memory_mb))
    outputs = [_run_pyramid(network.neck, features[:3]), _run_pyramid(network.read_out_head, features[3:])]
    if network.semantic_head is not None:
        outputs.append(_run_pyramid(network.semantic_head, features[:3]))
    return tuple(outputs)


def _embed_in_one_piece(network: AnatomicalEmbedder, volume: Tensor, memory_mb: float) -> tuple[Tensor, ...]:
    needed_mb = LIVE_MAPS * network.options.width * volume.numel() * volume.element_size() / 2**20
    needed_mb /= math.prod(network.options.stem_stride)
    if needed_mb > memory_mb:
        raise ValueError(
            f"a network with norm={network.options.norm!r} embeds a volume in one piece: {tuple(volume.shape[2:])} "
            f"voxels need about {needed_mb:.0f} MB, the limit is {memory_mb:.0f} MB (--memory_mb)"
        )
    return tuple(output[0].half().cpu() for output in network(volume))


class _Stage(NamedTuple):
    """A part of the network, with its stride along D and the input slices that a slab must carry on either side."""

    run: Callable[[Tensor], Tensor]
    depth_stride: int
    halo: int
    width: int


def _stage(run: Callable[[Tensor], Tensor], units: Sequence[ConvNorm], pool_stride: int = 1) -> _Stage:
    """The stage that `run` computes: convolutions one after the other, perhaps a pool; shortcuts reach less far."""
    stride, reach = 1, 0
    for unit in units:
        reach += unit.conv.kernel_size[0] // 2 * stride
        stride *= unit.conv.stride[0]
    stride *= pool_stride
    # The halo is whole strides, so that slabs stay aligned.
    return _Stage(run, stride, math.ceil(reach / stride) * stride, units[0].conv.out_channels)


def _convolutions(layer: nn.Sequential) -> list[ConvNorm]:
    return [unit for block in layer for unit in (block.conv1, block.conv2)]


def _run_stage(stage: _Stage, x: Tensor, memory_mb: float) -> Tensor:
    """Run a stage [1, C, D, H, W] -> [1, C', D', H', W'] slab by slab."""
    depth = x.shape[2]
    bytes_per_slice = LIVE_MAPS * max(stage.width, x.shape[1]) * x[0, 0, 0].numel() * x.element_size()
    num_slices = int(memory_mb * 2**20 / bytes_per_slice) - 2 * stage.halo
    num_slices = max(stage.depth_stride, num_slices // stage.depth_stride * stage.depth_stride)
    if num_slices >= depth:
        return stage.run(x)
    slabs = []
    for first in range(0, depth, num_slices):
        begin, end = max(0, first - stage.halo), min(depth, first + num_slices + stage.halo)
        # A rest thinner than one stride may give no slice of its own (the pool floors): then nothing is left to do.
        if end - begin < stage.depth_stride:
            break
        out = stage.run(x[:, :, begin:end])
        skipped = (first - begin) // stage.depth_stride
        slabs.append(out[:, :, skipped : skipped + num_slices // stage.depth_stride].clone())
    return torch.cat(slabs, dim=2)


def _run_pyramid(pyramid: Pyramid, features: list[Tensor], num_slices: int = 8) -> Tensor:
    """`pyramid(features)`, L2-normalised, float16 [C, d, h, w] on the CPU; its finest level slab by slab."""
    laterals = [conv(feature) for conv, feature in zip(list(pyramid.lateral_convs)[1:], features[1:])]
    above = None
    for lateral in reversed(laterals):
        above = lateral if above is None else lateral + F.interpolate(above, size=lateral.shape[2:], mode="nearest")
    finest, lateral_conv = features[0], pyramid.lateral_convs[0]
    depth, in_slice = finest.shape[2], finest.shape[3:]
    if above is not None:  # which of its slices upsampling copies to each finest one
        number = torch.arange(above.shape[2], dtype=torch.float32)[None, None]
        copied = F.interpolate(number, size=depth, mode="nearest")[0, 0].long().to(above.device)
    embed_dim = lateral_conv.conv.out_channels
    result = torch.empty(embed_dim, depth, *in_slice, dtype=torch.float16)
    for first in range(0, depth, num_slices):
        last = min(depth, first + num_slices)
        begin, end = max(0, first - 1), min(depth, last + 1)
        merged = lateral_conv(finest[:, :, begin:end])
        if above is not None:
            merged += F.interpolate(above[:, :, copied[begin:end]], size=merged.shape[2:], mode="nearest")
        out = pyramid.fpn_convs[0](merged)[:, :, first - begin : last - begin]
        result[:, first:last] = F.normalize(out.float(), dim=1)[0].half().cpu()
    return result


def for_inference(network: AnatomicalEmbedder, precision: str = "fp32") -> AnatomicalEmbedder:
    """A faster copy for embedding: batch norms folded into the convolutions, channels last, perhaps in bfloat16.

    Args:
        network: in evaluation mode; left as it is.
        precision: "fp32" or "bf16" (cosine to fp32 above 0.999; pays on processors with bfloat16 units, and on GPUs).
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)} (--precision)")
    fast = copy.deepcopy(network).eval()
    for module in fast.modules():
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm3d):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return fast.to(PRECISIONS[precision], memory_format=torch.channels_last_3d).requires_grad_(False)
