"""Chunked and fused window attention against MONAI's own: outputs and gradients, with and without the shift's mask."""

import copy

import pytest
import torch
from monai.networks.nets.swin_unetr import WindowAttention, compute_mask

from models.layers import window_attention
from models.layers.window_attention import FastWindowAttention, use_fast_window_attention

WINDOW = (4, 3, 3)


def make_pair(way: str = "auto") -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    reference = WindowAttention(12, num_heads=3, window_size=WINDOW, qkv_bias=True)
    with torch.no_grad():
        reference.relative_position_bias_table.normal_()
    fast = copy.deepcopy(reference)
    use_fast_window_attention(fast, way)
    assert type(fast) is FastWindowAttention and type(reference) is WindowAttention
    assert list(fast.state_dict()) == list(reference.state_dict())
    return reference, fast


def run(attention: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = attention(x, mask)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [out, x.grad, *(p.grad for p in attention.parameters())]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_windows", [1, 5, 1000])
def test_equals_monai_in_output_and_gradients(masked: bool, chunk_windows: int, monkeypatch) -> None:
    """12 windows in each of two samples: chunks of 5 must not run from one sample's masks into the next's."""
    monkeypatch.setattr(window_attention, "CHUNK_ELEMENTS", chunk_windows * 3 * 36 * 36)
    reference, fast = make_pair()
    mask = compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu") if masked else None
    x = torch.randn(24, 36, 12)
    for ours, expected in zip(run(fast, x, mask), run(reference, x, mask)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["fused", "monai"])
def test_other_ways_equal_monai_too(masked: bool, way: str) -> None:
    """What GPUs take, computed on the CPU; the bias table's gradient included."""
    reference, fast = make_pair(way)
    mask = compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu") if masked else None
    x = torch.randn(24, 36, 12)
    for ours, expected in zip(run(fast, x, mask), run(reference, x, mask)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_fused_attention_asks_for_four_axes_and_one_type(monkeypatch) -> None:
    """What the fused kernels of GPUs require: otherwise torch stores every window's matrix, or refuses."""
    asked, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask):
        asked.append((q, k, v, attn_mask))
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(window_attention.F, "scaled_dot_product_attention", watched)
    fast = make_pair("fused")[1]
    with torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(24, 36, 12), compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu"))
        fast(torch.randn(24, 36, 12), None)
    assert [x.ndim for call in asked for x in call] == [4] * 8
    assert {x.dtype for call in asked for x in call} == {torch.bfloat16}
    assert [tuple(call[3].shape) for call in asked] == [(1, 12 * 3, 36, 36), (1, 3, 36, 36)]
    assert all(call[3].requires_grad for call in asked)


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="flash"):
        use_fast_window_attention(make_pair()[1], "flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_equals_monai_on_the_cpu(masked: bool) -> None:
    reference, fast = make_pair()
    mask = compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu") if masked else None
    x = torch.randn(24, 36, 12)
    found = run(fast.cuda(), x.cuda(), None if mask is None else mask.cuda())
    for ours, expected in zip(found, run(reference, x, mask)):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_windows_smaller_than_the_table_use_its_corner() -> None:
    reference, fast = make_pair()
    x = torch.randn(5, 8, 12)
    for ours, expected in zip(run(fast, x, None), run(reference, x, None)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_as_near_to_float32_as_monai() -> None:
    reference, fast = make_pair()
    x = torch.randn(6, 36, 12)
    exact = reference(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(attention(x, None).float() - exact).abs().mean().item() for attention in (fast, reference)]
    assert errors[0] < 1.2 * errors[1]
