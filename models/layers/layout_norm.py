"""Instance norm, affine part and LeakyReLU of a channels-last map in one function, which keeps its input alone.

    y = LeakyReLU((x - mean) / sqrt(var + eps) * weight + bias)          mean and var over the places of a map

Plain operations in float32; on CUDA devices torch.compile makes few kernels of them, and the backward pass computes
again what it needs. Ulyanov et al., "Instance normalization" (2016).

Letters: B samples, C channels, N places of a map.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers.channels_last import from_rows, make_channels_last, to_rows

logger = logging.getLogger(__name__)


def normalise(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float) -> tuple[Tensor, ...]:
    """y = LeakyReLU((x - mean) / sqrt(var + eps) * weight + bias), in float32 inside.

    Args:
        rows: [B, N, C].
        weight, bias: [C], or None.
        slope: of the LeakyReLU below 0; 1 = none.

    Returns:
        y like `rows`; mean and 1 / sqrt(var + eps) in float32, [B, 1, C].
    """
    x = rows.float()
    var, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    scale = torch.rsqrt(var + eps)
    y = (x - mean) * scale
    if weight is not None:
        y = y * weight.float() + bias.float()
    if slope != 1:
        y = torch.where(y < 0, y * slope, y)
    return y.to(rows.dtype), mean, scale


def normalise_backward(
    grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalise`: of `rows` [B, N, C], weight [C] and bias [C]; what was computed is computed again."""
    unit = (rows.float() - mean) * scale
    grad = grad.float()
    if slope != 1:
        y = unit if weight is None else unit * weight.float() + bias.float()
        grad = torch.where(y < 0, grad * slope, grad)
    along, total = (grad * unit).sum(1, keepdim=True), grad.sum(1, keepdim=True)  # [B, 1, C]
    factor = scale if weight is None else scale * weight.float()
    of_rows = (grad - (total + unit * along) / rows.shape[1]) * factor
    return of_rows.to(rows.dtype), along.sum((0, 1)), total.sum((0, 1))


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
        y, mean, scale = kernel_of(normalise, x.device)(to_rows(x), weight, bias, eps, slope)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return from_rows(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, mean, scale, weight, bias = ctx.saved_tensors
        grad = make_channels_last(grad)
        found = kernel_of(normalise_backward, x.device)(
            *(to_rows(grad), to_rows(x), mean, scale, weight, bias, ctx.slope)
        )
        of_x, of_weight, of_bias = found
        own = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(bias.dtype))
        return from_rows(of_x, x.shape), *own, None, None
