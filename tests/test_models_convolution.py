"""Convolutions in bfloat16 on CPU against float32, where the CPU kernel's weight gradient reads unwritten memory."""

import pytest
import torch
from torch import nn

from models.backbones import BACKBONES
from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.convolution import SteadyConv3d, use_steady_convolutions


def fill_freed_memory() -> None:
    """Leave large numbers where the allocator will hand out memory next."""
    blocks = [torch.full((size,), 1e30) for size in [1 << 18] * 4 + [1 << 14] * 32 + [1 << 10] * 64]
    del blocks


def gradients(convolution: nn.Conv3d, x: torch.Tensor, along: torch.Tensor, casts: bool) -> list[torch.Tensor]:
    """Output, and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    convolution.zero_grad()
    fill_freed_memory()
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        y = convolution(x)
    assert y.dtype == (torch.bfloat16 if casts else torch.float32)
    fill_freed_memory()
    y.backward(along.to(y.dtype))
    return [tensor.detach().float() for tensor in (y, x.grad, convolution.weight.grad, convolution.bias.grad)]


@pytest.mark.parametrize(
    ("kernel", "stride", "depth", "side"),
    [(3, 1, 2, 2), (3, 1, 2, 8), (3, 1, 1, 2), (3, 1, 4, 2), (3, 2, 2, 4), (5, 1, 3, 3)],
)
def test_gradients_are_right_in_bfloat16(kernel, stride, depth, side):
    torch.manual_seed(0)
    convolution = SteadyConv3d(48, 48, kernel, stride, padding=kernel // 2)
    x = torch.randn(2, 48, depth, side, side)
    along = torch.randn(convolution(x).shape)
    exact = gradients(convolution, x, along, casts=False)
    for _ in range(3):
        for half, expected in zip(gradients(convolution, x, along, casts=True), exact):
            assert (half - expected).norm() < 0.02 * expected.norm()


def test_float32_is_left_alone():
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 2, 4, 4)
    expected, names = convolution(x), list(convolution.state_dict())
    use_steady_convolutions(convolution)
    assert type(convolution) is SteadyConv3d and torch.equal(convolution(x), expected)
    assert list(convolution.state_dict()) == names


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"resnet50_unet"}))  # which is 2-D
def test_backbones_have_no_other_convolution(name):
    network = BACKBONES[name].make_network(1, 1, 12, False)
    kinds = {type(part) for part in network.modules() if isinstance(part, nn.Conv3d)}
    assert kinds == {SteadyConv3d}


def test_a_step_in_bfloat16_leaves_finite_gradients_whatever_the_memory_held():
    """The deepest stage of a crop of 32 slices has depth 2 in the U-Net: its gradients were not reproducible."""
    torch.manual_seed(0)
    network = BACKBONES["unet"].make_network(1, 1, 16, False)
    x, found = torch.rand(2, 1, 32, 32, 32), []
    for _ in range(3):
        network.zero_grad()
        fill_freed_memory()
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        fill_freed_memory()
        y.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert found[0].isfinite().all() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stride", "has_bias"), [(1, True), (2, False), ((1, 2, 2), True)])
def test_one_voxel_convolutions_keep_the_layout_and_the_numbers(stride, has_bias):
    """One thread is where torch's own kernel does not."""
    torch.manual_seed(0)
    plain = nn.Conv3d(6, 4, 1, stride, bias=has_bias)
    ours = nn.Conv3d(6, 4, 1, stride, bias=has_bias)
    ours.load_state_dict(plain.state_dict())
    use_steady_convolutions(ours)
    x = make_channels_last(torch.randn(2, 6, 5, 4, 3))
    found = []
    for convolution in (ours, plain):
        one = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = convolution(one)
        y.square().sum().backward()
        found.append([y, one.grad, *(p.grad for p in convolution.parameters())])
    assert is_channels_last(found[0][0]) and is_channels_last(found[0][1])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(x)
    assert half.dtype == torch.bfloat16 and (half.float() - found[0][0]).abs().max() < 0.05
