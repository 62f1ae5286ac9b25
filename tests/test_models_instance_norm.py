"""Instance norm: right in bfloat16 on CPU, where PyTorch's kernel goes wrong; channels-last maps stay so."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from torch import nn

from engine.device import use_channels_last
from models.backbones.swin_unetr import SwinUNETRBackbone
from models.backbones.unet import UNetBackbone
from models.layers import layout_norm
from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.instance_norm import SteadyInstanceNorm2d, SteadyInstanceNorm3d, use_steady_instance_norm
from models.layers.layout_norm import LayoutNorm


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


def test_a_group_norm_is_right_where_means_are_large_and_maps_channels_last() -> None:
    """Torch's own is off by 0.002 here, in torch's order by 2e-5."""
    network = nn.Sequential(nn.GroupNorm(8, 128))
    use_steady_instance_norm(network)
    x = 100 + torch.randn(2, 128, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    along = torch.randn(2, 128, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    ours, exact = make_channels_last(x).requires_grad_(), x.double().requires_grad_()
    found, expected = network(ours), F.group_norm(exact, 8)
    found.backward(make_channels_last(along))
    expected.backward(along.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=1e-4)


# Layout


def random_map(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A channels-last map, of channels with different means and deviations."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.5, 2, size[1]).view(1, -1, *[1] * (len(size) - 2))
    return make_channels_last((x * scales + scales).to(dtype))


def results(function, x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of x and of the parameters, for a loss that weighs every place differently."""
    leaves = [x.clone(memory_format=torch.preserve_format), *parameters]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    along = torch.linspace(-1, 1, out.numel()).bfloat16().to(out).view(out.shape)  # values that every type holds
    return [out, *torch.autograd.grad(out, leaves, along)]


@pytest.mark.parametrize("slope", [1.0, 0.01])
@pytest.mark.parametrize("size", [(2, 6, 5, 4, 3), (2, 6, 5, 4), (1, 3, 2, 2, 2)])
def test_a_channels_last_map_stays_one_and_keeps_its_numbers(size, slope, monkeypatch) -> None:
    """On a CPU, and as on other devices; against torch's norm in double precision."""
    x = random_map(*size)
    norm = (SteadyInstanceNorm3d if len(size) == 5 else SteadyInstanceNorm2d)(size[1], affine=True)
    weight, bias = torch.linspace(0.5, 1.5, size[1]), torch.linspace(-1, 1, size[1])

    def ours(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    def by_function(x, weight, bias):
        return LayoutNorm.apply(x, weight, bias, 1e-5, slope)

    def exact(x, weight, bias):
        return F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias, eps=1e-5), slope)

    expected = results(exact, x.double(), weight.double(), bias.double())
    norm.forward = lambda x: norm.then(x, slope)
    for function in (ours, by_function):
        found = results(function, x, weight, bias)
        assert is_channels_last(found[0])
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_gradient_may_arrive_channels_last(num_samples) -> None:
    """Of a contiguous map too: torch's own backward pass of a single sample is then wrong on a CPU."""
    x = random_map(num_samples, 6, 5, 4, 3).contiguous()
    norm = SteadyInstanceNorm3d(6, affine=True)

    def before(norm):
        return lambda x: F.leaky_relu(make_channels_last(norm(x)), 0.01)

    expected = results(before(copy.deepcopy(norm).double()), x.double())
    exact = results(lambda x: F.leaky_relu(F.instance_norm(x), 0.01), x.double())
    found = results(before(norm), x)
    for one, same, other in zip(found, expected, exact):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same, other)


@pytest.mark.parametrize("slope", [1.0, 0.01])
def test_a_map_of_nothing_gets_torchs_gradient(slope) -> None:
    """A crop of air: every output is 0, where the LeakyReLU bends, and the norm multiplies gradients by 316."""
    x = random_map(2, 6, 5, 4, 3)
    x[0] = 0
    expected = results(lambda x: F.leaky_relu(F.instance_norm(x), slope), x.double())
    norm = SteadyInstanceNorm3d(6)
    for function in (lambda x: norm.then(x, slope), lambda x: LayoutNorm.apply(x, None, None, 1e-5, slope)):
        for one, other in zip(results(function, x), expected):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slope", [1.0, 0.01])
def test_half_precision_has_float32_inside(slope) -> None:
    x = random_map(2, 6, 5, 4, 3, dtype=torch.bfloat16)

    def exact(x):
        return F.leaky_relu(F.instance_norm(x), slope)

    norm = SteadyInstanceNorm3d(6)
    expected = results(exact, x.double())
    for function in (lambda x: norm.then(x, slope), lambda x: LayoutNorm.apply(x, None, None, 1e-5, slope)):
        found = results(function, x)
        assert found[0].dtype == found[1].dtype == torch.bfloat16 and is_channels_last(found[0])
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


def test_the_backward_pass_keeps_the_input_alone() -> None:
    x, kept = random_map(2, 6, 5, 4, 3).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        LayoutNorm.apply(x, torch.ones(6), torch.zeros(6), 1e-5, 0.01)
    large = [one for one in kept if one.numel() >= x.numel()]
    assert [one.data_ptr() for one in large] == [x.data_ptr()]


def test_what_follows_may_work_in_place() -> None:
    """Blocks of other libraries activate and add in place."""
    x, added = random_map(2, 6, 5, 4, 3), random_map(2, 6, 5, 4, 3).flip(0)
    found = []
    for in_place in (True, False):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = LayoutNorm.apply(leaf, None, None, 1e-5, 1.0)
        if in_place:
            y += added
            F.leaky_relu_(y, 0.1)
        else:
            y = F.leaky_relu(y + added, 0.1)
        y.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_compiled_kernels_give_the_same_numbers(monkeypatch) -> None:
    """What CUDA devices run, compiled for the CPU; a second size takes the same code."""
    monkeypatch.setattr(layout_norm, "kernel_of", lambda function, device: layout_norm.compiled(function))
    for size in ((2, 6, 5, 4, 3), (2, 6, 8, 8, 8)):
        x, parameters = random_map(*size), (torch.linspace(0.5, 1.5, 6), torch.linspace(-1, 1, 6))
        found = results(lambda *leaves: LayoutNorm.apply(*leaves, 1e-5, 0.01), x, *parameters)
        monkeypatch.undo()
        expected = results(lambda *leaves: LayoutNorm.apply(*leaves, 1e-5, 0.01), x, *parameters)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        monkeypatch.setattr(layout_norm, "kernel_of", lambda function, device: layout_norm.compiled(function))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_compiles_it_and_gets_the_cpus_numbers(dtype) -> None:
    layout_norm.compiled.cache_clear()
    for size in ((2, 6, 5, 4, 3), (2, 32, 24, 24, 24)):
        x, weight, bias = random_map(*size), torch.linspace(0.5, 1.5, size[1]), torch.linspace(-1, 1, size[1])
        x = x.to(dtype)
        on_cpu = results(lambda *leaves: LayoutNorm.apply(*leaves, 1e-5, 0.01), x, weight, bias)
        on_gpu = results(lambda *leaves: LayoutNorm.apply(*leaves, 1e-5, 0.01), x.cuda(), weight.cuda(), bias.cuda())
        assert is_channels_last(on_gpu[0]) and on_gpu[0].dtype == dtype
        for one, other in zip(on_gpu, on_cpu):
            tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * other.abs().max().item()
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=tolerance)


def test_a_machine_that_cannot_compile_is_warned_once(monkeypatch, caplog) -> None:
    def refuse(function, dynamic):
        def call(*arguments):
            raise RuntimeError("no compiler here\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    kernel = layout_norm.compiled.__wrapped__(lambda x: x + 1)
    with caplog.at_level(logging.WARNING):
        assert kernel(1) == kernel(1) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "instance norms run uncompiled, which is slower: no compiler here"
    ]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda dims: UnetResBlock(dims, 4, 6, 3, 2, "instance"),
        lambda dims: UnetResBlock(dims, 6, 6, 3, 1, ("instance", {"affine": True})),
        lambda dims: UnetResBlock(dims, 6, 6, 3, 1, ("group", {"num_groups": 2})),
        lambda dims: UnetBasicBlock(dims, 4, 6, 3, 1, "instance"),
    ],
)
def test_blocks_equal_monais(make, dims, is_last) -> None:
    torch.manual_seed(0)
    reference = make(dims)
    ours = copy.deepcopy(reference)
    use_steady_instance_norm(ours)
    assert type(ours) is not type(reference) and list(ours.state_dict()) == list(reference.state_dict())
    x = random_map(2, reference.conv1.conv.in_channels, *(6, 5, 4)[:dims])
    found = []
    for block in (ours, reference):
        one = x if is_last else x.contiguous()
        parameters = dict(block.named_parameters())

        def run(x, *values, block=block, names=tuple(parameters)):
            return torch.func.functional_call(block, dict(zip(names, values)), (x,))

        found.append(results(run, one, *parameters.values()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", [SwinUNETRBackbone(12, (64, 32, 32)), UNetBackbone(16, (64, 32, 32))])
def test_a_channels_last_network_stays_so_from_norm_to_norm(backbone: nn.Module) -> None:
    use_channels_last(backbone)
    layouts = {"norm": [], "convolution": []}

    def watch(kind):
        def hook(module, inputs, output):
            layouts[kind].append((is_channels_last(inputs[0]), is_channels_last(output)))

        return hook

    for part in backbone.modules():
        if isinstance(part, nn.modules.instancenorm._InstanceNorm):
            part.then = lambda x, slope, part=part, then=part.then: watched(part, x, then(x, slope))
        elif isinstance(part, nn.Conv3d):
            part.register_forward_hook(watch("convolution"))

    def watched(part, x, output):
        watch("norm")(part, (x,), output)
        return output

    backbone.decode(backbone.encode(torch.rand(2, 1, 64, 32, 32)))
    assert len(layouts["norm"]) >= 20 and all(before == after for before, after in layouts["norm"])
    # A map of one channel lies both ways, and the two or three convolutions of it take torch's usual one.
    for kind in layouts:
        assert sum(not before for before, _ in layouts[kind]) <= 4, layouts[kind]
