"""Norms over space that stay right on a CPU, whatever the layout and number format of their input.

**Layout.** Torch's instance norm makes its input contiguous, so that the convolution behind it reads the slow layout.
Here a channels-last map stays one: on a CPU by `models.layers.layout_norm_cpu` if it is large and by a copy of what
torch's norm gives if not, elsewhere by `models.layers.layout_norm`. Torch's group norm with one channel a group would
need no copy on a CPU. It takes a channels-last variance as the mean of squares less the square of the mean: measured on
32x32x32 places, outputs are off by 0.005 where the mean is 10 deviations, and by 0.3 where it is 100. So the one group
norm there is, of the U-Net's deepest stage, gets its small map in torch's order.

**One sample.** Torch's backward pass on a CPU is wrong where a single sample's gradient arrives channels last: the
input's gradient is off by as much as it is large. Such gradients are copied first.

**Half precision.** PyTorch's CPU kernel keeps mean and inverse deviation of bfloat16 and float16 input in that same
format. Over the few tokens of a deep stage, or wherever a masked crop makes a channel nearly constant, the rounded mean
is off by a good part of a deviation. Measured on 2 tokens of standard normal input: outputs off by up to 0.3 (the exact
ones are about 1), gradients by up to 4 times the largest exact one, because terms that should cancel no longer do; and
each such norm multiplies what is left by up to 316 (one over the square root of its epsilon). Here the statistics are
float32, as they are on CUDA.
"""

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from torch import Tensor, nn

from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.layout_norm import LayoutNorm
from models.layers.layout_norm_cpu import LayoutNormOnCpu, is_large

HALF = (torch.bfloat16, torch.float16)


class _SteadyInstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """Torch's norm; keeps the input's type, and a channels-last layout."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, type and layout."""
        return self.then(x, 1.0)

    def then(self, x: Tensor, slope: float) -> Tensor:
        """The norm, and a LeakyReLU of this slope behind it; 1 = none. [B, C, ...] -> the same shape, type, layout."""
        if self.track_running_stats or not is_channels_last(x):
            return leaky(self._plain(x), slope)
        if x.device.type == "cpu":
            return leaky(self._on_cpu(x), slope)
        self._check_input_dim(x)
        return LayoutNorm.apply(x, self.weight, self.bias, self.eps, slope)

    def _on_cpu(self, x: Tensor) -> Tensor:
        if not is_large(x) or torch.compiler.is_compiling():
            return make_channels_last(self._plain(x))
        self._check_input_dim(x)
        return LayoutNormOnCpu.apply(wide(x), self.weight, self.bias, self.eps).to(x.dtype)

    def _plain(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        y = super().forward(wide(x))
        if y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(torch.Tensor.contiguous)
        return y.to(x.dtype)


class SteadyGroupNorm(nn.GroupNorm):
    """Torch's norm of maps [B, C, ...]; on a CPU in torch's order, whatever the layout that comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        return super().forward(x.contiguous() if x.device.type == "cpu" else x)


def wide(x: Tensor) -> Tensor:
    """The map in float32 where it is in half precision."""
    return x.float() if x.dtype in HALF else x


def leaky(x: Tensor, slope: float) -> Tensor:
    """LeakyReLU in place; slope 1 leaves `x` as it is."""
    return x if slope == 1 else F.leaky_relu_(x, slope)


class SteadyInstanceNorm2d(_SteadyInstanceNorm, nn.InstanceNorm2d):
    """For maps [B, C, H, W]."""


class SteadyInstanceNorm3d(_SteadyInstanceNorm, nn.InstanceNorm3d):
    """For maps [B, C, D, H, W]."""


# MONAI's blocks, which norm and then activate


def norm_act(norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """A block's norm and activation, together where both allow it."""
    if isinstance(norm, _SteadyInstanceNorm) and type(act) is nn.LeakyReLU:
        return norm.then(x, act.negative_slope)
    return act(norm(x))


class SteadyBasicBlock(UnetBasicBlock):
    """MONAI's block of two convolutions; adds no weights."""

    def forward(self, inp: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C', ...]."""
        return norm_act(self.norm2, self.lrelu, self.conv2(norm_act(self.norm1, self.lrelu, self.conv1(inp))))


class SteadyResBlock(UnetResBlock):
    """MONAI's residual block; adds no weights."""

    def forward(self, inp: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C', ...]."""
        return self.finish(self.conv1(inp), self.conv3(inp) if self.downsample else inp)

    def finish(self, first: Tensor, residual: Tensor) -> Tensor:
        """What follows the first convolution and the residual one: [B, C', ...] twice -> [B, C', ...]."""
        out = self.norm2(self.conv2(norm_act(self.norm1, self.lrelu, first)))
        out += self.norm3(residual) if self.downsample else residual
        return self.lrelu(out)


STEADY = {
    nn.InstanceNorm2d: SteadyInstanceNorm2d,
    nn.InstanceNorm3d: SteadyInstanceNorm3d,
    nn.GroupNorm: SteadyGroupNorm,
    UnetBasicBlock: SteadyBasicBlock,
    UnetResBlock: SteadyResBlock,
}


def use_steady_instance_norm(network: nn.Module) -> None:
    """Let every instance norm of `network`, and MONAI's blocks around them, go these ways; its state dict stays."""
    for part in network.modules():
        part.__class__ = STEADY.get(type(part), type(part))
