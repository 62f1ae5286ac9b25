"""Instance norm in bfloat16 on CPU against exact arithmetic, where PyTorch's own kernel goes wrong."""

import pytest
import torch
from torch import nn

from models.backbones.swin_unetr import SwinUNETRBackbone
from models.layers.instance_norm import SteadyInstanceNorm2d, SteadyInstanceNorm3d, use_steady_instance_norm


def gradient_error(norm: nn.Module, x: torch.Tensor, along: torch.Tensor) -> float:
    """Largest error of the input's gradient, relative to the largest exact gradient."""
    half, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    norm(half).backward(along)
    norm(exact).backward(along.double())
    return ((half.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()).item()


@pytest.mark.parametrize("size", [(2, 1, 1), (2, 2, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_gradients_over_few_tokens_are_right_in_bfloat16(size: tuple, mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (mean + 0.1 * torch.randn(2, 192, *size, generator=generator)).bfloat16()
    along = torch.randn(2, 192, *size, generator=generator).bfloat16()
    norm = SteadyInstanceNorm2d(192) if len(size) == 2 else SteadyInstanceNorm3d(192)
    assert gradient_error(norm, x, along) < 0.01


def test_float32_is_left_alone() -> None:
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SteadyInstanceNorm3d(3)(x), nn.InstanceNorm3d(3)(x))


@pytest.mark.parametrize(
    ("roi", "expected"), [((64, 32, 32), SteadyInstanceNorm3d), ((1, 64, 32), SteadyInstanceNorm2d)]
)
def test_the_backbone_has_no_other_instance_norm(roi: tuple, expected: type) -> None:
    network = SwinUNETRBackbone(12, roi).network
    names = list(network.state_dict())
    use_steady_instance_norm(network)
    kinds = {type(part) for part in network.modules() if isinstance(part, nn.modules.instancenorm._InstanceNorm)}
    assert kinds == {expected} and list(network.state_dict()) == names
