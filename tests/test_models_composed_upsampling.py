"""The upsampling block that makes no fine map of its input: the plain block's numbers, with less arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.unetr_block import UnetrUpBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.backbones.swin_unetr import SwinUNETRBackbone
from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.composed_upsampling import (
    ComposedUpBlock,
    upsample_and_convolve,
    upsample_and_mix,
    use_composed_upsampling,
)
from models.layers.instance_norm import SteadyResBlock, use_steady_instance_norm

WIDTH = 6
SIDES = (3, 4, 5)
LAYOUTS = {"contiguous": lambda x: x, "channels_last": make_channels_last}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def blocks(in_channels: int = WIDTH) -> tuple[UnetrUpBlock, UnetrUpBlock]:
    """The block with our norms alone, and the same one composed."""
    torch.manual_seed(0)
    plain = UnetrUpBlock(3, in_channels, WIDTH, 3, 2, "instance", res_block=True)
    use_steady_instance_norm(plain)
    ours = copy.deepcopy(plain)
    use_composed_upsampling(ours)
    return plain, ours


def maps(layout: str = "contiguous", sides: tuple[int, int, int] = SIDES) -> tuple[Tensor, Tensor]:
    """Input and skip connection of a block, two samples."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, WIDTH, *sides), (2, WIDTH, *(2 * side for side in sides)))
    return tuple(LAYOUTS[layout](torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes)


def gradients(block: UnetrUpBlock, layout: str) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of both inputs and of every weight."""
    inputs = maps(layout)
    output = block(*inputs)
    sought = [*inputs, *block.parameters()]
    return output, torch.autograd.grad((output * torch.randn(output.shape)).sum(), sought)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sides", [SIDES, (1, 2, 1), (8, 1, 3)])
def test_two_convolutions_are_one(sides, layout) -> None:
    """Other numbers of channels everywhere; what lies outside of the fine map counts as zero."""
    x, up, window = random(2, 3, *sides), random(3, 4, 2, 2, 2, seed=1), random(5, 4, 3, 3, 3, seed=2)
    expected = F.conv3d(F.conv_transpose3d(x, up, stride=2), window, padding=1)
    found = upsample_and_convolve(LAYOUTS[layout](x), up, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for ours, plain in zip(*(torch.autograd.grad((y * weights).sum(), (x, up, window)) for y in (found, expected))):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transposed_convolution_takes_the_mixing_behind_it(layout) -> None:
    x, up, mix = random(2, 3, *SIDES), random(3, 4, 2, 2, 2, seed=1), random(5, 4, 1, 1, 1, seed=2)
    expected = F.conv3d(F.conv_transpose3d(x, up, stride=2), mix)
    torch.testing.assert_close(upsample_and_mix(LAYOUTS[layout](x), up, mix), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_map_between_keeps_its_layout(layout, monkeypatch) -> None:
    """One thread too, where torch's convolution of one voxel brings a map into torch's order."""
    _, ours = blocks()
    seen = []
    monkeypatch.setattr(ours.conv_block, "finish", lambda *given: seen.extend(given))
    ours(*maps(layout))
    assert [is_channels_last(one) for one in seen] == 2 * [layout == "channels_last"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_gives_the_plain_blocks_output_and_gradients(layout) -> None:
    plain, ours = blocks()
    assert type(ours) is ComposedUpBlock and ours.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(2)
    expected, expected_gradients = gradients(plain, layout)
    torch.manual_seed(2)
    found, found_gradients = gradients(ours, layout)
    assert found.dtype == torch.float32 and is_channels_last(found) == (layout == "channels_last")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(found_gradients, expected_gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_block() -> None:
    plain, ours = blocks()
    with torch.no_grad():
        exact = plain(*maps())
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(block(*maps()).float() - exact).square().mean().sqrt() for block in (plain, ours)]
    assert 0 < errors[1] < 1.2 * errors[0]


def test_it_computes_and_keeps_less() -> None:
    """A quarter of the arithmetic less; beside its inputs, two maps of full resolution less for the backward pass."""
    counted, kept = [], []
    inputs = maps(sides=(24, 24, 24))
    for block in blocks():
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            block(*inputs)
        counted.append(counter.get_total_flops())
        kept.append(sum(size for at, size in sizes.items() if at not in [one.data_ptr() for one in inputs]))
    fine = inputs[1].numel() * 4
    assert kept[1] <= kept[0] - 1.9 * fine, (kept, fine)
    assert counted[1] <= 0.8 * counted[0], counted


def test_the_finest_block_of_three_axes_alone_goes_this_way() -> None:
    made = [SwinUNETRBackbone.make_network(1, 1, 12, False, axes) for axes in (3, 2)]
    names = [[name for name, part in net.named_modules() if isinstance(part, ComposedUpBlock)] for net in made]
    assert names == [["decoder1"], []]
    assert all(isinstance(part.conv_block, SteadyResBlock) for part in (made[0].decoder1, made[1].decoder1))
    assert type(blocks(2 * WIDTH)[1]) is UnetrUpBlock
