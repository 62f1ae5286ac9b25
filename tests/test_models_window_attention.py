"""Chunked and fused window attention against MONAI's own: outputs and gradients, with and without the shift's mask."""

import copy

import pytest
import torch
from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging, WindowAttention, compute_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.layers import constants, window_attention
from models.layers.window_attention import FastBasicLayer, FastWindowAttention, use_fast_window_attention

CPU = torch.device("cpu")
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


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            self.largest = max(self.largest, one.numel() if isinstance(one, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_windows, num_parts", [(1, {False: 24, True: 2}), (5, {False: 5, True: 2})])
def test_the_gradient_of_the_bias_is_summed_part_by_part(masked, num_windows, num_parts, monkeypatch) -> None:
    """The largest tensor of the backward pass is a part's; two samples of 12 windows, with a mask whole samples."""
    scores = 3 * 36 * 36  # of a window
    monkeypatch.setattr(window_attention, "BIAS_GRADIENT_BYTES", num_windows * scores * 4)
    mask = compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu") if masked else None
    calls, plain = [], window_attention.fused_attention
    monkeypatch.setattr(window_attention, "fused_attention", lambda *args: calls.append(len(args[0])) or plain(*args))
    reference, fast = make_pair("fused")
    x = torch.randn(24, 36, 12)
    for ours, expected in zip(run(fast, x, mask), run(reference, x, mask)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    assert calls[0] == sum(calls[1:]) == 24 and len(calls) == 1 + num_parts[masked]
    loss = fast(x, mask).square().sum()
    with LargestTensor() as watched:
        loss.backward()
    queries_keys_values = 3 * x.numel()
    assert watched.largest == max(max(calls[-num_parts[masked] :]) * scores, queries_keys_values) < 24 * scores


def test_parts_equal_the_whole_in_half_precision_and_repeat_bit_by_bit(monkeypatch) -> None:
    found = []
    for part_bytes in (2**28, 5 * 3 * 36 * 36 * 2, 5 * 3 * 36 * 36 * 2):
        monkeypatch.setattr(window_attention, "BIAS_GRADIENT_BYTES", part_bytes)
        fast = make_pair("fused")[1]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(fast, torch.randn(24, 36, 12), None))
    for whole, part, again in zip(*found):
        assert torch.equal(part, again) and part.dtype == whole.dtype
        torch.testing.assert_close(part, whole, rtol=2e-2, atol=2e-2 * whole.abs().max().item())


def test_without_gradients_nothing_is_cut(monkeypatch) -> None:
    monkeypatch.setattr(window_attention, "BIAS_GRADIENT_BYTES", 1)
    monkeypatch.setattr(window_attention.FusedAttentionByParts, "apply", lambda *args: pytest.fail("cut into parts"))
    with torch.no_grad():
        make_pair("fused")[1](torch.randn(24, 36, 12), None)


def test_fused_attention_asks_for_four_axes_and_one_type(monkeypatch) -> None:
    """What the fused kernels of GPUs require: otherwise torch stores every window's matrix, or refuses."""
    asked, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask, scale):
        asked.append((q, k, v, attn_mask))
        return plain(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(window_attention.F, "scaled_dot_product_attention", watched)
    fast = make_pair("fused")[1]
    with torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(24, 36, 12), compute_mask((8, 6, 9), WINDOW, (2, 1, 1), "cpu"))
        fast(torch.randn(24, 36, 12), None)
    assert [x.ndim for call in asked for x in call] == [4] * 8
    assert {x.dtype for call in asked for x in call} == {torch.bfloat16}
    assert [tuple(call[3].shape) for call in asked] == [(1, 12 * 3, 36, 36), (1, 3, 36, 36)]
    assert all(call[3].requires_grad for call in asked)
    assert {x.shape[-1] for call in asked for x in call[:3]} == {8}, "16 bytes: heads of 4 channels are filled up"


def test_heads_that_are_filled_up_change_nothing() -> None:
    """Heads of 2 channels, 8 bytes: outputs and gradients as before."""
    torch.manual_seed(0)
    inputs = [torch.randn(6, 3, 36, 2, requires_grad=True) for _ in range(3)] + [torch.randn(3, 36, 36)]
    found = [window_attention.attend(*inputs, None, way) for way in ("fused", "chunked")]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(one.square().sum(), inputs[:3]) for one in found]
    torch.testing.assert_close(*gradients)


# The mask of shifted windows


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(constants, "KEPT", {})


def make_layers(size: tuple[int, ...]) -> tuple[BasicLayer, BasicLayer]:
    """MONAI's stage with merging, and ours with the same weights."""
    torch.manual_seed(0)
    window = (4,) * len(size)
    reference = BasicLayer(12, 2, 3, window, [0.0, 0.0], downsample=PatchMerging)
    fast = copy.deepcopy(reference)
    use_fast_window_attention(fast)
    assert type(fast) is FastBasicLayer and list(fast.state_dict()) == list(reference.state_dict())
    return reference, fast


@pytest.mark.parametrize("size", [(6, 8, 10), (2, 10, 6), (6, 10)])
def test_a_stage_equals_monais_and_makes_its_mask_once(size: tuple[int, ...], nothing_kept, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(window_attention, "compute_mask", lambda *sizes: made.append(sizes) or compute_mask(*sizes))
    reference, fast = make_layers(size)
    for batch in (1, 2):
        x = torch.randn(batch, 12, *size)
        torch.testing.assert_close(fast(x), reference(x), rtol=1e-4, atol=1e-5)
    assert len(made) == 1


def test_a_mask_that_a_prediction_made_serves_a_training(nothing_kept) -> None:
    _, fast = make_layers((6, 8, 10))
    x = torch.randn(1, 12, 6, 8, 10)
    with torch.inference_mode():
        fast(x)
    fast(x).sum().backward()


def test_a_mask_without_values_is_not_kept(nothing_kept) -> None:
    with FakeTensorMode():
        assert constants.constant(window_attention.shift_mask, CPU, (4, 4), (2, 2), (1, 1)).shape == (4, 4, 4)
    kept = constants.constant(window_attention.shift_mask, CPU, (4, 4), (2, 2), (1, 1))
    assert kept.any() and kept is constants.constant(window_attention.shift_mask, CPU, (4, 4), (2, 2), (1, 1))


def test_constants_of_many_sizes_do_not_pile_up(nothing_kept) -> None:
    for size in range(2 * constants.MOST_KEPT):
        constants.constant(torch.zeros, CPU, size)
    assert len(constants.KEPT) == constants.MOST_KEPT and (torch.zeros, CPU, (size,)) in constants.KEPT


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
