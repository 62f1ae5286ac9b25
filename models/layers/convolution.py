"""3-D convolution whose weight gradients are right in half precision on CPU.

In bfloat16 the CPU kernel of the weight gradient reads memory that nobody wrote wherever the input has fewer slices
than the kernel is deep (but more than one slice comes out): a 3x3x3 convolution of a map of depth 2, the deepest stage
of a 64-voxel crop. Measured with PyTorch 2.15 on a CPU with bfloat16 units: gradients off by 1 to 100 % where the
memory held zeros or small numbers, NaN where it held large ones, and once a damaged heap; output and input gradient are
right. Such maps are tiny, so that computing them in float32 costs nothing.

One thread on a CPU gives convolutions of one voxel to a kernel that knows no channels-last layout. Here such a
convolution of a channels-last map is the matrix product that it is, and the layout stays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.channels_last import is_channels_last

HALF = (torch.bfloat16, torch.float16)


class SteadyConv3d(nn.Conv3d):
    """`nn.Conv3d`, in float32 where half precision on CPU gives a wrong weight gradient; keeps type and layout."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> as `nn.Conv3d`."""
        if x.device.type != "cpu":
            return super().forward(x)
        if self.is_product and is_channels_last(x):
            step = tuple(slice(None, None, stride) for stride in self.stride)
            return mix_channels(x[(..., *step)], self.weight, self.bias)
        if x.shape[2] >= self.kernel_size[0]:
            return super().forward(x)
        casts = torch.is_autocast_enabled("cpu")
        out_type = torch.get_autocast_dtype("cpu") if casts else x.dtype
        if out_type not in HALF:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(out_type)

    @property
    def is_product(self) -> bool:
        """Whether each output voxel is a product with one input voxel."""
        return self.kernel_size == (1, 1, 1) and self.padding == (0, 0, 0) and self.groups == 1


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of one voxel as a product; keeps channels last. [B, C, ...], [O, C, 1, 1, 1] -> [B, O, ...]."""
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def use_steady_convolutions(network: nn.Module) -> None:
    """Let every 3-D convolution of `network` take the steady path; its state dict does not change."""
    for part in network.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = SteadyConv3d
