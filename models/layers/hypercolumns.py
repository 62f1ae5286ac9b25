"""A short path from an encoder to the classes: a per-voxel MLP on its joined maps, beside the decoder.

Hypercolumns (Hariharan et al., CVPR 2015) read all of an encoder's maps at one voxel. A new decoder learns slowly:
beside this head a small U-Net reaches in 300 steps what it needs 1,200 for alone. The network's logits are the sum of
both, so the decoder adds what the head lacks. For maps f_s at strides s of 2 and more, s0 the finest of them:

    logits = decoder(f) + up_1( W gelu( sum_s up_s0( W_s norm(f_s) ) ) )

norm: batch norm without scale and shift; W_s, W: 1x1x1 convolutions; up_n: to the grid of stride n, linear.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.layers.constants import constant

Size3 = tuple[int, int, int]
HIDDEN_DIM = 64


class HypercolumnHead(nn.Module):
    """Encoder maps to logits; `join` adds it to a whole network."""

    def __init__(self, channels: Mapping[int, int], num_classes: int) -> None:
        """`channels`: stride -> channels of the maps, 2 strides or more."""
        super().__init__()
        strides = sorted(channels)
        self.norms = nn.ModuleList(nn.BatchNorm3d(channels[stride], affine=False) for stride in strides)
        self.projections = nn.ModuleList(
            nn.Conv3d(channels[stride], HIDDEN_DIM, 1, bias=stride == strides[0]) for stride in strides
        )
        self.classes = nn.Conv3d(HIDDEN_DIM, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], shape: Size3) -> Tensor:
        """Maps [B, C_s, d, h, w] from the finest to the deepest -> logits [B, num_classes, *shape]."""
        projected = [project(norm(one)) for project, norm, one in zip(self.projections, self.norms, maps, strict=True)]
        finest = tuple(projected[0].shape[2:])
        joined = sum(enlarged(one, finest) for one in projected)
        return enlarged(self.classes(nn.functional.gelu(joined)), shape)


def join(network: nn.Module, head: HypercolumnHead, map_modules: Sequence[str]) -> None:
    """Add the head's logits to a network's from now on; its weights are the network's, under `hypercolumns.`.

    Args:
        network: volumes [B, C, D, H, W] -> logits [B, num_classes, D, H, W].
        map_modules: names of the modules that give the encoder's maps, from the finest to the deepest: one map each, or
            one module with a list of them. Maps of 2-D networks have no axis D. A map of the input's size is left out.
    """
    network.hypercolumns = head
    maps: list[Tensor] = []

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps.clear()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | Sequence[Tensor]) -> None:
        maps.extend([output] if isinstance(output, Tensor) else output)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        shape = tuple(logits.shape[2:])
        volumes = [one.unsqueeze(2) if one.ndim == 4 else one for one in maps]
        maps.clear()
        return logits + head([one for one in volumes if one.shape[-1] < shape[-1]], shape)

    network.register_forward_pre_hook(begin)
    for name in map_modules:
        network.get_submodule(name).register_forward_hook(keep)
    network.register_forward_hook(add)


def enlarged(values: Tensor, shape: Size3) -> Tensor:
    """Linear interpolation of [B, C, d, h, w] to [B, C, *shape], cells' centres spread evenly.

    The same as `interpolate(mode="trilinear")`, as products with matrices: its gradient is repeatable on GPUs.
    """
    for axis, size in enumerate(shape, start=2):
        if values.shape[axis] != size:
            weights = constant(interpolation_weights, values.device, values.shape[axis], size).to(values.dtype)
            values = torch.movedim(torch.movedim(values, axis, -1) @ weights, -1, axis)
    return values


def interpolation_weights(num_cells: int, size: int) -> Tensor:
    """Weights, float64 [num_cells, size], of cells at places along an axis; the outermost cells continue."""
    places = ((torch.arange(size, dtype=torch.float64) + 0.5) * num_cells / size - 0.5).clamp(0, num_cells - 1)
    return (1 - (torch.arange(num_cells)[:, None] - places).abs()).clamp(min=0)
