"""Window attention of the Swin blocks against the slow obvious version: offsets, shifts, padding, skip attention."""

import itertools

import pytest
import torch

from models.layers.window_attention import attend
from models.layers.windows import SwinBlock, attention_mask, fit_window, relative_position_index

Size3 = tuple[int, int, int]


@pytest.mark.parametrize("window", [(4, 4, 4), (2, 4, 3), (1, 1, 4)])
def test_positions_have_one_row_for_each_offset(window: Size3) -> None:
    """The published index multiplies by 3w-1 where 2w-1 belongs, and different offsets share rows."""
    index = relative_position_index(window, 4)
    places = list(itertools.product(*(range(side) for side in window)))
    rows: dict[tuple, set[int]] = {}
    for i, first in enumerate(places):
        for j, second in enumerate(places):
            offset = tuple(a - b for a, b in zip(first, second))
            rows.setdefault(offset, set()).add(int(index[i, j]))
    assert all(len(found) == 1 for found in rows.values())
    assert len(set.union(*rows.values())) == len(rows)
    assert int(index.min()) >= 0 and int(index.max()) < 7**3


def test_a_clipped_window_reads_the_rows_of_its_own_offsets() -> None:
    """Neighbours along D have the same row in a full and in a clipped window."""
    full, clipped = relative_position_index((4, 4, 4), 4), relative_position_index((2, 2, 2), 4)
    assert full[16, 0] == clipped[4, 0] and full[4, 0] == clipped[2, 0] and full[1, 0] == clipped[1, 0]


def obvious_block(block: SwinBlock, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """One voxel after the other, on a map [D, H, W, C]: which others it sees, and what it takes from them."""
    size = tuple(x.shape[:3])
    window, shift = fit_window(size, block.window, block.is_shifted)
    keys_from = x if block.norm_source is None else source
    norm = block.norm1 if block.norm_source is None else block.norm_source
    tokens, keys = block.norm1(x), norm(keys_from)
    heads, table = block.attn.num_heads, block.attn.relative_position_bias_table
    base = 2 * block.window - 1

    def window_of(place: Size3) -> tuple:
        # Without wrapping: the windows lie at shift, shift + edge, ..., the first is cut off at the map's border.
        return tuple((p - s) // e for p, s, e in zip(place, shift, window))

    places = list(itertools.product(*(range(side) for side in size)))
    out = torch.empty_like(x)
    for place in places:
        seen = [other for other in places if window_of(other) == window_of(place)]
        q = block.attn.query(tokens[place]).view(heads, -1)  # [h, d]
        k, v = block.attn.key_value(torch.stack([keys[o] for o in seen])).chunk(2, dim=1)  # [m, C]
        k, v = (y.view(len(seen), heads, -1) for y in (k, v))
        offsets = torch.tensor([[a - b + block.window - 1 for a, b in zip(place, o)] for o in seen])
        bias = table[offsets @ torch.tensor([base**2, base, 1])]  # [m, h]
        scores = torch.einsum("hd,mhd->mh", q, k) * q.shape[1] ** -0.5 + bias
        out[place] = block.attn.proj(torch.einsum("mh,mhd->hd", scores.softmax(0), v).flatten())
    x = x + out
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("has_source", [False, True])
@pytest.mark.parametrize("size", [(4, 4, 8), (6, 2, 4), (5, 3, 7)])
def test_block_equals_the_obvious_version(size: Size3, has_source: bool, is_shifted: bool) -> None:
    """Also where windows are clipped to the map, and where the map has to be padded."""
    torch.manual_seed(0)
    block = SwinBlock(8, 2, window=4, is_shifted=is_shifted, has_source=has_source)
    with torch.no_grad():
        block.attn.relative_position_bias_table.normal_()
        x, source = torch.randn(2, 2, *size, 8)
        found = block(x, source)
        for row in range(2):
            torch.testing.assert_close(found[row], obvious_block(block, x[row], source[row]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, 0, 0)])
def test_both_ways_to_attend_agree_in_value_and_gradient(shift: Size3) -> None:
    """The path for CPUs against torch's own attention, which other devices take."""
    torch.manual_seed(0)
    mask = attention_mask((8, 4, 4), (4, 4, 4), shift)
    q, k, v = torch.randn(3, 2 * 2, 3, 64, 5, dtype=torch.float64)
    bias = torch.randn(3, 64, 64, dtype=torch.float64)
    results = []
    for way in ("chunked", "fused"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out = attend(*inputs, mask, way)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_shifted", [False, True])
def test_gpu_gives_the_numbers_of_the_cpu(is_shifted: bool) -> None:
    torch.manual_seed(0)
    block = SwinBlock(8, 2, window=4, is_shifted=is_shifted)
    x = torch.randn(2, 6, 8, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(block.cuda()(x.cuda()).cpu(), block.cpu()(x), rtol=1e-3, atol=1e-4)
