"""3-D convolution whose weight gradients are right in half precision on CPU.

In bfloat16 the CPU kernel of the weight gradient reads memory that nobody wrote wherever the input has fewer slices
than the kernel is deep (but more than one slice comes out): a 3x3x3 convolution of a map of depth 2, the deepest stage
of a 64-voxel crop. Measured with PyTorch 2.15 on a CPU with bfloat16 units: gradients off by 1 to 100 % where the
memory held zeros or small numbers, NaN where it held large ones, and once a damaged heap; output and input gradient are
right. Such maps are tiny, so that computing them in float32 costs nothing.
"""

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class SteadyConv3d(nn.Conv3d):
    """`nn.Conv3d`, in float32 where half precision on CPU gives a wrong weight gradient; the output's type stays."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] -> as `nn.Conv3d`."""
        if x.device.type != "cpu" or x.shape[2] >= self.kernel_size[0]:
            return super().forward(x)
        casts = torch.is_autocast_enabled("cpu")
        out_type = torch.get_autocast_dtype("cpu") if casts else x.dtype
        if out_type not in HALF:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(out_type)


def use_steady_convolutions(network: nn.Module) -> None:
    """Let every 3-D convolution of `network` take the steady path; its state dict does not change."""
    for part in network.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = SteadyConv3d
