"""Instance norm, affine part and LeakyReLU of a channels-last map in one function, which keeps its input alone.

    y = LeakyReLU((x - mean) / sqrt(var + eps) * weight + bias)          mean and var over the places of a map

Plain operations in float32; on CUDA devices torch.compile makes few kernels of them, and the backward pass computes
again what it needs. Ulyanov et al., "Instance normalization" (2016).

Elementwise operations keep the layout of their input, so the output lies as the input does. Letters: B samples, C
channels.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers.channels_last import make_channels_last

logger = logging.getLogger(__name__)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float) -> tuple[Tensor, ...]:
    """y = LeakyReLU((x - mean) / sqrt(var + eps) * weight + bias), in float32 inside.

    Args:
        x: [B, C, ...].
        weight, bias: [C], or None.
        slope: of the LeakyReLU below 0; 1 = none.

    Returns:
        y like `x`; mean and 1 / sqrt(var + eps) in float32, [B, C, 1 ...].
    """
    wide = x.float()
    var, mean = torch.var_mean(wide, places_of(x), correction=0, keepdim=True)
    scale = torch.rsqrt(var + eps)
    y = (wide - mean) * scale
    if weight is not None:
        y = y * beside(weight, x) + beside(bias, x)
    if slope != 1:
        y = torch.where(y < 0, y * slope, y)
    return y.to(x.dtype), mean, scale


def normalise_backward(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalise`: of `x` [B, C, ...], weight [C] and bias [C]; what was computed is computed again."""
    unit = (x.float() - mean) * scale
    grad = grad.float()
    if slope != 1:
        y = unit if weight is None else unit * beside(weight, x) + beside(bias, x)
        # At 0 the slope, as torch's LeakyReLU: a crop of air is 0 everywhere, and the norm multiplies by 316 there
        grad = torch.where(y > 0, grad, grad * slope)
    along, total = (one.sum(places_of(x), keepdim=True) for one in (grad * unit, grad))  # [B, C, 1 ...]
    factor = scale if weight is None else scale * beside(weight, x)
    of_x = (grad - (total + unit * along) / x[0, 0].numel()) * factor
    return of_x.to(x.dtype), along.sum(0).flatten(), total.sum(0).flatten()


def places_of(x: Tensor) -> tuple[int, ...]:
    """The axes of a map behind samples and channels."""
    return tuple(range(2, x.ndim))


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Values [C] in float32, to be multiplied with a map [B, C, ...]."""
    return values.float().view(1, -1, *[1] * (x.ndim - 2))


@functools.cache
def compiled(function: Callable) -> Callable:
    """The plain operations as few kernels, for maps of any size; plain where this machine cannot compile.

    A machine without a compiler is slower by it and no less right, so it is warned and goes on.
    """
    made = torch.compile(function, dynamic=True)

    def call(*arguments):
        nonlocal made
        try:
            return made(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if made is function:
                raise
            logger.warning("instance norms run uncompiled, which is slower: %s", str(error).splitlines()[0])
            made = function
            return function(*arguments)

    return call


def kernel_of(function: Callable, device: torch.device) -> Callable:
    """`function`, compiled on CUDA devices; a network that is itself being compiled takes the plain one."""
    return compiled(function) if device.type == "cuda" and not torch.compiler.is_compiling() else function


class LayoutNorm(torch.autograd.Function):
    """Norm and LeakyReLU of a channels-last map; keeps the input alone for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float) -> Tensor:
        """[B, C, ...] channels last -> the same shape, type and layout."""
        ctx.slope = slope
        y, mean, scale = kernel_of(normalise, x.device)(x, weight, bias, eps, slope)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, mean, scale, weight, bias = ctx.saved_tensors
        grad = make_channels_last(grad)
        found = kernel_of(normalise_backward, x.device)(grad, x, mean, scale, weight, bias, ctx.slope)
        of_x, of_weight, of_bias = found
        own = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(bias.dtype))
        return of_x, *own, None, None
