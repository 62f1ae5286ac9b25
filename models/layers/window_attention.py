"""Swin's window attention (Liu et al., ICCV 2021) without storing attention: same weights, same numbers.

MONAI's version writes every window's [heads, n, n] matrix (n = 343 tokens) to memory several times, forward and
backward, and keeps two of them per block for the backward pass. Here, on a CPU, a few windows at a time go through
scores, softmax and product while they sit in the processor's cache, and the backward pass computes them again, as flash
attention does (Dao et al., 2022). Other devices take torch's scaled_dot_product_attention. Its backward pass writes the
position bias's gradient for every window before it sums them: 4 GB at stride 2 of 8 pairs of 96³ crops in half
precision. Here it runs for as many windows at a time as fit `BIAS_GRADIENT_BYTES`, and computes each part again.

MONAI's mask of shifted windows adds -100 to forbidden scores. Their weights of about 4e-44 are denormal numbers, which
a CPU handles in microcode: measured, softmax takes 12 times as long and the product behind it 4 times. The mask is
therefore taken ten times here, which makes those weights exactly zero.

Measured, CPU seconds for 90 windows of 3 heads and 16 channels each (MONAI -> here): 0.70 -> 0.51 forward and backward,
1.30 -> 0.47 with the shift's mask; 0.34 -> 0.13 and 0.67 -> 0.14 without gradients. What the fused path brings on a GPU
is measured by `python -m benchmarks.pretrain_step`. MONAI makes the mask anew in every stage of every forward pass;
here it is made once.

Letters: W windows of the whole batch, w windows of one sample, h heads, n tokens of a window, d channels of a head.
"""

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import BasicLayer, WindowAttention, compute_mask, get_window_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.layers.constants import constant

CHUNK_ELEMENTS = 2**20  # of scores at a time: 4 MB in float32, which stays in the cache
MASK_FACTOR = 10.0
# The bias trains, so its gradient is wanted: flash attention takes no bias, cuDNN's gives it no gradient.
FUSED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEAD_BYTES = 16  # fused kernels read the channels of a head in whole steps of so many bytes
BIAS_GRADIENT_BYTES = 2**28  # of all windows' gradients of the position bias that exist at one time
WAYS = ("auto", "chunked", "fused", "monai")


class ChunkedAttention(torch.autograd.Function):
    """softmax(q k^T + bias + mask) v, a few windows at a time."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """q (already scaled), k, v [W, h, n, d]; bias [h, n, n]; mask [w, n, n] or None -> [W, h, n, d]."""
        out = torch.empty_like(q)
        for part in window_chunks(q.shape, mask):
            out[part] = window_weights(q[part], k[part], bias, mask, part).to(v.dtype) @ v[part]
        ctx.save_for_backward(q, k, v, bias, mask, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v and the bias; the weights are computed again."""
        q, k, v, bias, mask, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_bias = torch.zeros_like(bias)
        along = (grad * out).sum(-1, keepdim=True, dtype=torch.float32)  # [W, h, n, 1]
        for part in window_chunks(q.shape, mask):
            weights = window_weights(q[part], k[part], bias, mask, part)  # [c, h, n, n]
            grad_v[part] = weights.to(v.dtype).transpose(-2, -1) @ grad[part]
            grad_scores = (grad[part] @ v[part].transpose(-2, -1)).float().sub_(along[part]).mul_(weights)
            grad_bias += grad_scores.sum(0)
            grad_scores = grad_scores.to(q.dtype)
            grad_q[part] = grad_scores @ k[part]
            grad_k[part] = grad_scores.transpose(-2, -1) @ q[part]
        return grad_q, grad_k, grad_v, grad_bias, None


def window_chunks(shape: torch.Size, mask: Tensor | None) -> list[slice]:
    """Slices over the W windows of [W, h, n, d]; with a mask none crosses from one sample into the next."""
    num_windows, heads, tokens, _ = shape
    chunk = max(1, CHUNK_ELEMENTS // (heads * tokens * tokens))
    sample = num_windows if mask is None else mask.shape[0]
    starts = range(0, num_windows, sample)
    return [slice(i, min(i + chunk, start + sample)) for start in starts for i in range(start, start + sample, chunk)]


def window_weights(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """Attention weights [c, h, n, n] in float32 of the windows in `part`."""
    scores = (q @ k.transpose(-2, -1)).float().add_(bias)
    if mask is not None:
        first = part.start % mask.shape[0]
        scores.add_(mask[first : first + scores.shape[0], None], alpha=MASK_FACTOR)
    return scores.softmax(-1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v through torch's fused attention.

    Fused kernels want four axes. With a mask the windows of a sample therefore stand beside each other as heads, and
    bias and mask are joined once, not once a sample. They also want heads of whole 16 bytes (8 channels in half
    precision): narrower ones, as those of --feature_size 12, are filled with zeros.

    Args:
        q, k, v: [W, h, n, d], not scaled; of one type, which the added term is brought to.
        bias: [h, n, n].
        mask: [w, n, n] or None.

    Returns:
        [W, h, n, d].
    """
    shape = q.shape
    if mask is None:
        added = bias[None]  # [1, h, n, n]
    else:
        added = (bias[None] + mask[:, None]).flatten(0, 1)[None]  # [1, w*h, n, n]
        q, k, v = (x.reshape(-1, added.shape[1], *shape[2:]) for x in (q, k, v))  # [B, w*h, n, d]
    width = shape[-1]
    missing = -width % (HEAD_BYTES // q.element_size())
    if missing:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    with sdpa_kernel(FUSED_KERNELS):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype), scale=width**-0.5)
    return out[..., :width].reshape(shape)


class FusedAttentionByParts(torch.autograd.Function):
    """`fused_attention` whose backward pass goes through a few windows at a time."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, part: int) -> Tensor:
        """As `fused_attention`; `part` windows go through the backward pass at a time."""
        ctx.save_for_backward(q, k, v, bias, mask)
        ctx.part = part
        return fused_attention(q, k, v, bias, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the bias, which is summed in float32 part by part, in order."""
        q, k, v, bias, mask = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (q, k, v)]
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for part in (slice(first, first + ctx.part) for first in range(0, len(q), ctx.part)):
            leaves = [x[part].detach().requires_grad_() for x in (q, k, v)] + [bias.detach().requires_grad_()]
            with torch.enable_grad():
                out = fused_attention(*leaves, mask)
            *of_part, of_bias = torch.autograd.grad(out, leaves, grad[part])
            for whole, one in zip(found, of_part):
                whole[part] = one
            grad_bias += of_bias
        return *found, grad_bias.to(bias.dtype), None, None


def windows_at_a_time(q: Tensor, mask: Tensor | None) -> int:
    """Windows whose gradients of the bias fit `BIAS_GRADIENT_BYTES`, whole samples where there is a mask; 1 or more."""
    _, heads, tokens, _ = q.shape
    unit = 1 if mask is None else len(mask)
    return unit * max(1, BIAS_GRADIENT_BYTES // (unit * heads * tokens * tokens * q.element_size()))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, way: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v for q, k, v [W, h, n, d], bias [h, n, n], mask [w, n, n] or None.

    `way`: chunked, fused, or auto = chunked on a CPU and fused elsewhere.
    """
    if way == "chunked" or (way == "auto" and q.device.type == "cpu"):
        return ChunkedAttention.apply(q * q.shape[-1] ** -0.5, k, v, bias, mask)
    part = windows_at_a_time(q, mask)
    if part < len(q) and torch.is_grad_enabled():
        return FusedAttentionByParts.apply(q, k, v, bias, mask, part)
    return fused_attention(q, k, v, bias, mask)


class FastWindowAttention(WindowAttention):
    """MONAI's window attention through `attend`; adds no weights. `way` "monai" computes as MONAI does."""

    way = "auto"

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens of all windows [W, n, C] and the shift's mask [w, n, n] -> [W, n, C]."""
        if self.way == "monai" or (self.training and self.attn_drop.p > 0):
            return super().forward(x, mask)
        windows, tokens, channels = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [W, h, n, d]
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        bias = self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        attended = attend(q, k, v, bias, mask, self.way)
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(windows, tokens, channels)))


def shift_mask(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
    """MONAI's mask of shifted windows of a padded map: [w, n, n], 0 or -100."""
    return compute_mask(size, window, shift, "cpu")


class FastBasicLayer(BasicLayer):
    """MONAI's stage of window blocks, whose mask is made once for each size; adds no weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, (d,) h, w] -> the same, or merged: twice the channels and half the sides."""
        size = tuple(x.shape[2:])
        window, shift = get_window_size(size, self.window_size, self.shift_size)
        padded = tuple(-(-side // edge) * edge for side, edge in zip(size, window))
        mask = constant(shift_mask, x.device, padded, window, shift)
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x, mask)
        return (x if self.downsample is None else self.downsample(x)).movedim(-1, 1)


def use_fast_window_attention(network: nn.Module, way: str = "auto") -> None:
    """Let every window attention of `network` go one of `WAYS`; its state dict does not change."""
    if way not in WAYS:
        raise ValueError(f"window attention knows the ways {', '.join(WAYS)}, not {way!r}")
    for part in network.modules():
        if type(part) in (WindowAttention, FastWindowAttention):
            part.__class__ = FastWindowAttention
            part.way = way
        elif type(part) is BasicLayer:
            part.__class__ = FastBasicLayer
