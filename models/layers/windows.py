"""Swin blocks on windows of any size, for self-attention and for attention to a skip connection (nnFormer).

Swin Transformer: Liu et al., ICCV 2021; skip attention: Zhou et al., "nnFormer", 2021. Three things differ from MONAI's
blocks, none of which its state dicts allow:

- positions: a window that is clipped to a small map keeps its geometry. The bias of two tokens depends on their offset
  alone (MONAI takes the first rows of the full window's index, whatever the clipped window's shape);
- padding: tokens added to fill the last windows are seen by no real token;
- a block may take its keys and values from another map of the same size.

Positions enter through the bias tables only, which are parameters: they train, they are saved, and teacher and student
hold the same ones.

Letters: W windows of the whole batch, w windows of one sample, h heads, n tokens of a window, d channels of a head.
"""

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import window_partition, window_reverse
from timm.layers import Mlp
from torch import Tensor, nn

from models.layers.constants import constant
from models.layers.window_attention import attend

Size3 = tuple[int, int, int]
FORBIDDEN = -100.0  # added to the scores of pairs that must not see each other
MLP_RATIO = 4


def relative_position_index(window: Size3, table_window: int) -> Tensor:
    """Rows of a bias table for all pairs of tokens.

    The offset of two tokens lies in -(T-1)..T-1 along each axis, T = `table_window`; counted from 0 it is a digit of
    base 2T-1, so that offsets and rows of the table correspond one to one.

    Args:
        window: sides (D, H, W) of the window in tokens, none above `table_window`.

    Returns:
        int64 [n, n], n = D*H*W, values below (2T-1)^3.
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in window)).reshape(-1, 3)  # [n, 3] in D, H, W order
    digits = places[:, None] - places[None] + table_window - 1  # [n, n, 3]
    base = 2 * table_window - 1
    return digits @ torch.tensor([base * base, base, 1])


def fit_window(size: Size3, window: int, is_shifted: bool) -> tuple[Size3, Size3]:
    """The window clipped to a map of `size`, and its shift: half a window along axes that hold more than one."""
    clipped = tuple(min(window, side) for side in size)
    return clipped, tuple(window // 2 if is_shifted and side > window else 0 for side in size)


def attention_mask(size: Size3, window: Size3, shift: Size3) -> Tensor | None:
    """Who must not see whom in the windows of a padded and rolled map: parts that the roll brought together, padding.

    Returns:
        float [w, n, n], 0 where two tokens may see each other, else FORBIDDEN; None where all may.
    """
    if not any(shift) and all(side % edge == 0 for side, edge in zip(size, window)):
        return None
    padding = torch.tensor(0)
    region = torch.tensor(0)
    for axis, (side, edge, by) in enumerate(zip(size, window, shift)):
        padded = -(-side // edge) * edge
        rolled = (torch.arange(padded) + by) % padded  # where each token came from
        line = [padded if other == axis else 1 for other in range(3)]
        padding = padding | (rolled >= side).long().view(line)
        # Only the last window along an axis holds both ends of the map.
        region = 2 * region + (rolled < by).long().view(line)
    labels = torch.where(padding > 0, -1, region)  # [D, H, W] of the padded map
    labels = window_partition(labels[None, ..., None], window)[..., 0]  # [w, n]
    return (labels[:, :, None] != labels[:, None]).float() * FORBIDDEN


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learnt bias for every offset between two tokens."""

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.window, self.num_heads = window, num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.empty((2 * window - 1) ** 3, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, tokens: Tensor, source: Tensor, window: Size3, mask: Tensor | None) -> Tensor:
        """Windows of tokens [W, n, C] ask windows of a source [W, n, C].

        Args:
            window: the windows' sides, n = D*H*W of them.
            mask: float [w, n, n] or None, see `attention_mask`.

        Returns:
            [W, n, C].
        """
        q = self.query(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [W, h, n, d]
        k, v = self.key_value(source).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        index = constant(relative_position_index, tokens.device, window, self.window)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1).contiguous()  # [h, n, n]
        return self.proj(attend(q, k, v, bias, mask).transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Window attention and a two-layer perceptron, each behind a layer norm and with a residual."""

    def __init__(self, dim: int, num_heads: int, window: int, is_shifted: bool, has_source: bool = False) -> None:
        """`has_source`: keys and values come from a second map, given to `forward`."""
        super().__init__()
        self.window, self.is_shifted = window, is_shifted
        self.norm1 = nn.LayerNorm(dim)
        self.norm_source = nn.LayerNorm(dim) if has_source else None
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """[B, D, H, W, C] (and a source of the same shape) -> [B, D, H, W, C]."""
        size = tuple(x.shape[1:4])
        window, shift = fit_window(size, self.window, self.is_shifted)
        mask = constant(attention_mask, x.device, size, window, shift)
        tokens = cut_windows(self.norm1(x), window, shift)  # [W, n, C]
        keys = tokens if self.norm_source is None else cut_windows(self.norm_source(source), window, shift)
        attended = self.attn(tokens, keys, window, mask)
        x = x + join_windows(attended, size, window, shift)
        return x + self.mlp(self.norm2(x))


def cut_windows(x: Tensor, window: Size3, shift: Size3) -> Tensor:
    """[B, D, H, W, C] -> windows [W, n, C] of the map after padding it at its ends and rolling it by `-shift`."""
    missing = [-side % edge for side, edge in zip(x.shape[1:4], window)]
    if any(missing):
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
    if any(shift):
        x = x.roll([-by for by in shift], dims=(1, 2, 3))
    return window_partition(x.contiguous(), window)


def join_windows(windows: Tensor, size: Size3, window: Size3, shift: Size3) -> Tensor:
    """Undo `cut_windows`: [W, n, C] -> [B, D, H, W, C] of `size`."""
    padded = [-(-side // edge) * edge for side, edge in zip(size, window)]
    tokens_per_sample = padded[0] * padded[1] * padded[2]
    batch = windows.shape[0] * windows.shape[1] // tokens_per_sample
    x = window_reverse(windows, window, [batch, *padded])
    if any(shift):
        x = x.roll(shift, dims=(1, 2, 3))
    return x[:, : size[0], : size[1], : size[2]]
