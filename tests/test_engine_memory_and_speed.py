"""The flags of memory and speed: each computes what the plain step computes, and leaves the names of weights alone."""

import copy

import pytest
import torch
from torch import nn

import main_ddp
from engine.checkpoint import LATEST
from engine.device import on_gpus, pick_precision, use_channels_last
from engine.optim import load_optimizer, make_optimizer
from models.layers.channels_last import is_channels_last
from tests.small_alice import NOW, run_alice, small_alice, small_batch
from tests.tiny_run import add_store_and_table, arguments, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus"), 2, 0))


def gradients(method: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.requires_grad}


# Gradient accumulation


def accumulated(num_parts: int) -> tuple[dict, dict, dict]:
    """Gradients, mean terms and centres of a step over four samples in `num_parts` parts."""
    method = small_alice()
    with torch.no_grad():  # a teacher that differs from its student
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
    batch, reports = small_batch(4), []
    for part in range(num_parts):
        rows = slice(part * 4 // num_parts, (part + 1) * 4 // num_parts)
        total, terms = method({name: value[rows] for name, value in batch.items()}, NOW)
        (total / num_parts).backward()
        reports.append(terms)
    method.after_step(NOW, was_skipped=torch.tensor(False))
    means = {name: torch.stack([terms[name] for terms in reports]).mean() for name in reports[0]}
    return gradients(method), means, dict(method.loss.centres.named_buffers())


@pytest.mark.parametrize("num_parts", [2, 4])
def test_accumulated_parts_are_the_big_batch_in_every_term_gradient_and_centre(num_parts):
    """Only monitors that compare a batch's rows with each other see the parts; the README says so."""
    whole, parts = accumulated(1), accumulated(num_parts)
    for ours, expected in zip(parts, whole):
        assert ours.keys() == expected.keys()
    for name, expected in whole[0].items():
        assert (parts[0][name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8, name
    for name in ("loss_cls", "loss_tokens", "loss_recon", "teacher_entropy_share"):
        torch.testing.assert_close(parts[1][name], whole[1][name], rtol=1e-5, atol=1e-6)
    for name, expected in whole[2].items():
        assert (expected != 0).any()
        torch.testing.assert_close(parts[2][name], expected, rtol=1e-5, atol=1e-6)


# Activation checkpointing


def swin_step(**options) -> tuple[dict, int]:
    """Gradients of a SwinUNETR step, and the bytes that were kept for its backward pass."""
    method = small_alice(backbone="swin_unetr", **options)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = method(small_batch(1), NOW)
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    num_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    total.backward()
    return gradients(method), num_bytes


def test_activation_checkpointing_keeps_gradients_and_little_else():
    (plain, plain_bytes), (again, again_bytes) = swin_step(), swin_step(use_checkpoint=True)
    assert again_bytes < 0.35 * plain_bytes
    for name, expected in plain.items():
        assert (again[name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8, name


# Layout


def test_channels_last_changes_five_axes_only_and_no_value():
    method = small_alice()
    other = copy.deepcopy(method)
    use_channels_last(other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, method.state_dict()[name])
        assert value.is_contiguous(memory_format=torch.channels_last_3d) if value.ndim == 5 else value.is_contiguous()
    for ours, expected in zip(run_alice(other, small_batch(2))[0], run_alice(method, small_batch(2))[0]):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def trained(layout: str, fused: bool, state: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """One AdamW step of a convolution, from a stored optimiser state where one is given."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    if layout == "channels_last":
        use_channels_last(module)
    optimizer = make_optimizer(module, 0.1, 0.1, CPU, fused=fused)
    if state is not None:
        load_optimizer(optimizer, state)
    module(torch.ones(2, 3, 2, 2, 2)).square().sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("before", [("contiguous", False), ("channels_last", True)])
@pytest.mark.parametrize("now", [("contiguous", True), ("channels_last", True), ("contiguous", False)])
def test_optimiser_state_goes_on_in_any_layout_and_kernel(before, now):
    """A checkpoint of one GPU's settings resumed with others: same numbers, this run's kernel and strides."""
    state = trained(*before)[1].state_dict()
    expected, _ = trained("contiguous", False, trained("contiguous", False)[1].state_dict())
    module, optimizer = trained(*now, state)
    assert [group["fused"] for group in optimizer.param_groups] == [now[1] or None] * 2
    for ours, theirs in zip(module.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert optimizer.state[ours]["exp_avg"].stride() == ours.stride()


# Number formats


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_gpu_computes_it(monkeypatch, has_bf16, expected):
    def answer(including_emulation: bool = True) -> bool:
        return including_emulation or has_bf16  # old GPUs emulate it, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert pick_precision("auto", torch.device("cuda", 0)) == expected


# Runs


@pytest.mark.parametrize(("flag", "on_cpu", "on_gpu"), [(None, False, True), (True, True, True), (False, False, False)])
def test_flags_for_gpus_are_on_there_unless_they_are_off(flag, on_cpu, on_gpu):
    assert on_gpus(flag, torch.device("cpu")) is on_cpu and on_gpus(flag, torch.device("cuda", 0)) is on_gpu


def test_one_input_channel_gives_maps_that_lie_channels_last():
    """There both layouts are the same memory; the weight's strides decide."""
    module = nn.Conv3d(1, 4, 3, padding=1)
    x = torch.rand(2, 1, 5, 6, 7)
    expected = module(x)
    use_channels_last(module)
    assert is_channels_last(module(x)) and not is_channels_last(expected)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


def test_switches_without_a_value_may_stay_open(corpus, tmp_path):
    for words, expected in ((), True), (["--channels_last"], True), (["--no_channels_last"], False):
        flags = main_ddp.make_flags("alice").parse_args([*arguments(corpus, tmp_path), *words])
        assert flags.channels_last is expected and flags.cudnn_benchmark is None


def test_compiled_and_channels_last_run_saves_plain_names_and_is_resumed_without(corpus, tmp_path, monkeypatch):
    """torch.compile traces and differentiates all of both networks; only its C++ compiler, which takes minutes, is left
    out. A plain run goes on from the checkpoint."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend="aot_eager"))
    small = {"backbone": "unet", "feature_size": 4, "batch_size": 1}
    fast = {"compile": True, "channels_last": True, "cudnn_benchmark": True}
    try:
        main_ddp.main(arguments(corpus, tmp_path, **small, **fast, steps_per_epoch=2, warmup_epochs=0.5))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "student and teacher were traced"
    finally:
        torch.backends.cudnn.benchmark = False
        torch.compiler.reset()
    state = torch.load(tmp_path / LATEST, weights_only=True)
    assert state["step"] == 2
    assert not [name for part in ("student", "teacher") for name in state[part] if "_orig_mod" in name]
    main_ddp.main(arguments(corpus, tmp_path, **small, epochs=2, steps_per_epoch=2, warmup_epochs=0.5))
    resumed = torch.load(tmp_path / LATEST, weights_only=True)
    assert resumed["step"] == 4
    assert resumed["student"].keys() == state["student"].keys()
    assert all(line["loss"] < 1e3 for line in log_of(tmp_path))
