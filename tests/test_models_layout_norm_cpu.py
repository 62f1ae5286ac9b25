"""Instance norm of large channels-last maps on a CPU: torch's numbers, without a copy into its order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import layout_norm_cpu
from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.instance_norm import SteadyInstanceNorm2d, SteadyInstanceNorm3d
from models.layers.layout_norm_cpu import LayoutNormOnCpu, is_large, statistics
from tests.test_models_instance_norm import random_map

SIZES = [(2, 6, 5, 4, 3), (1, 3, 2, 2, 2), (3, 6, 7, 4)]  # the last one of a 2-D network


@pytest.fixture(autouse=True)
def every_map_is_large(monkeypatch):
    """Small maps go the way of large ones, in several pieces of which the last is shorter."""
    monkeypatch.setattr(layout_norm_cpu, "LARGE", 0)
    monkeypatch.setattr(layout_norm_cpu, "PIECE_PLACES", 24)


def make_norm(num_axes: int, num_channels: int, affine: bool = True) -> nn.Module:
    norm = (SteadyInstanceNorm2d if num_axes == 4 else SteadyInstanceNorm3d)(num_channels, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return norm


def exact(x: Tensor, norm: nn.Module, along: Tensor) -> list[Tensor]:
    """Torch's norm in float64 and in torch's order, and the gradients of input, weight and bias."""
    inputs = [one.detach().double().contiguous().requires_grad_() for one in (x, *norm.parameters())]
    y = F.instance_norm(inputs[0], None, None, *inputs[1:], eps=norm.eps)
    return [y, *torch.autograd.grad(y, inputs, along.double().contiguous())]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_are_torchs(size, affine, monkeypatch) -> None:
    x, along = random_map(*size).requires_grad_(), random_map(*size).flip(1)
    norm = make_norm(len(size), size[1], affine)
    with monkeypatch.context() as patched:  # the way that copies is not taken
        patched.setattr(type(norm), "_plain", None)
        y = norm(x)
    found = [y, *torch.autograd.grad(y, [x, *norm.parameters()], along)]
    for ours, expected in zip(found, exact(x, norm, along), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)
    assert is_channels_last(y) and is_channels_last(found[1])


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_gradient_may_arrive_in_torchs_order(num_samples) -> None:
    x, along = random_map(num_samples, 6, 5, 4, 3).requires_grad_(), random_map(num_samples, 6, 5, 4, 3).contiguous()
    norm = make_norm(5, 6, affine=False)
    (found,) = torch.autograd.grad(norm(x), x, along)
    torch.testing.assert_close(found.double(), exact(x, norm, along)[1], rtol=2e-5, atol=2e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    x = random_map(2, 3, 4, 3, 2, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.rand(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: LayoutNormOnCpu.apply(*given, 1e-5), (x, weight, bias))


def test_statistics_do_not_drift_with_the_number_of_places(monkeypatch) -> None:
    """A sum in float32 over all places would be off by 1e-4 of itself."""
    monkeypatch.setattr(layout_norm_cpu, "PIECE_PLACES", 8192)
    x = make_channels_last(torch.rand(1, 2, 96, 96, 96, generator=torch.Generator().manual_seed(0)) + 3)
    for found, expected in zip(statistics(x), (x.double().mean((2, 3, 4)), x.double().var((2, 3, 4), correction=0))):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_half_precision_has_float32_inside() -> None:
    x = random_map(2, 6, 5, 4, 3, dtype=torch.bfloat16)
    norm = make_norm(5, 6, affine=False)
    y = norm(x)
    assert y.dtype == torch.bfloat16 and is_channels_last(y)
    torch.testing.assert_close(y, norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_the_backward_pass_keeps_the_input_alone() -> None:
    kept = []
    x = random_map(2, 6, 5, 4, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        make_norm(5, 6, affine=False)(x)
    assert [one.data_ptr() for one in kept if one.numel() > 2 * 6] == [x.data_ptr()]


def test_one_place_has_no_deviation() -> None:
    """A map of one place lies both ways, and torch refuses it."""
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        make_norm(5, 6)(random_map(2, 6, 1, 1, 1))


def test_small_maps_are_copied(monkeypatch) -> None:
    monkeypatch.setattr(layout_norm_cpu, "LARGE", 1 << 19)
    assert is_large(torch.empty(1, 48, 32, 32, 32, device="meta"))
    assert not is_large(torch.empty(16, 8, 32, 32, 32, device="meta"))
    monkeypatch.setattr(LayoutNormOnCpu, "apply", None)
    x = random_map(2, 6, 5, 4, 3)
    torch.testing.assert_close(make_norm(5, 6, affine=False)(x), F.instance_norm(x.contiguous()), rtol=0, atol=1e-6)
