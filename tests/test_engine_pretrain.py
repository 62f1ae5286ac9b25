"""The loop on a network of a few numbers: order of phases, accumulation, freezing, non-finite losses, signals."""

import dataclasses
import itertools
import os
import signal

import pytest
import torch
from torch import nn

from engine.checkpoint import CheckpointError
from engine.device import make_scaler, pick_precision
from engine.distributed import World
from engine.logging import RunLog
from engine.loop import MAX_SKIPPED_IN_A_ROW, Hooks, LoopOptions, NonFiniteLossError, Schedules, pretrain, validate
from engine.optim import clip_gradients, decays, make_optimizer
from engine.run import RunState, warn_of_changed_steps
from tests.tiny_run import log_of

CPU = torch.device("cpu")


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        self.last_layer = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(self.body(x))

    def last_layer_parameters(self) -> list[nn.Parameter]:
        return [self.last_layer.weight]


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Student().requires_grad_(False)

    @torch.no_grad()
    def update(self, student: Student, momentum: float) -> None:
        for own, other in zip(self.net.parameters(), student.parameters()):
            own.lerp_(other, 1 - momentum)


class Loss(nn.Module):
    """Squared error to the teacher, with a running mean as centres have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))
        self.pending: list[torch.Tensor] = []

    def forward(self, out: torch.Tensor, target: torch.Tensor, is_last_part: bool) -> torch.Tensor:
        if self.training:
            self.pending.append(target.detach())
            if is_last_part:
                self.centre.lerp_(torch.cat(self.pending).mean(0), 0.1)
                self.pending = []
        return (out - target + 1).square().mean()


def make_batch(first: int, size: int) -> dict:
    rows = [torch.randn(4, generator=torch.Generator().manual_seed(first + j)) for j in range(size)]
    return {"query": torch.stack(rows), "is_fallback": torch.zeros(size, dtype=torch.bool), "score": torch.ones(size)}


def batches_of(size: int, start: int = 0):
    return (make_batch(first, size) for first in itertools.count(start, size))


class Setup:
    """A run of the loop with everything recorded."""

    def __init__(self, folder, size: int = 4, **options) -> None:
        student = Student()
        self.run = RunState(
            student, Teacher(), Loss(), make_optimizer(student, 0.1, 0.01, CPU), make_scaler("fp32", CPU)
        )
        self.options = LoopOptions(**({"num_steps": 4, "steps_per_epoch": 2, "log_freq": 1} | options))
        self.schedules = Schedules(lambda s: 0.1 / (1 + s), lambda s: 0.01 * s, lambda s: 0.5, lambda s: 0.04)
        self.saved, self.validated, self.drawn = [], [], []
        self.hooks = Hooks(
            validate=lambda: self.validated.append(self.run.step) or {"loss": 1.0},
            draw=lambda batch, step: self.drawn.append(step),
            save=lambda epoch: self.saved.append((self.run.step, epoch)),
            saved=lambda: True,
            case_names=lambda batch: [f"case{int(value * 100)}" for value in batch["query"][:, 0]],
        )
        self.log = RunLog(folder, self.options.num_steps, tensorboard=False)
        self.batches = batches_of(size)
        self.poison_at: tuple[int, ...] = ()

    def objective(self, batch: dict, teacher_temp: float, is_last_part: bool):
        out, target = self.run.student(batch["query"]), self.run.teacher.net(batch["query"])
        total = self.run.loss(out, target, is_last_part)
        if self.run.step in self.poison_at:
            total = total * float("nan")
        return total, {"loss_recon": total.detach()}

    def __call__(self) -> bool:
        return pretrain(
            self.run, self.run.student, self.objective, self.batches, self.schedules, self.options, self.hooks,
            World(), self.log,
        )  # fmt: skip

    def weights(self) -> dict[str, torch.Tensor]:
        modules = nn.ModuleList([self.run.student, self.run.teacher, self.run.loss])
        return {name: value.clone() for name, value in modules.state_dict().items()}


def test_accumulation_equals_the_big_batch(tmp_path):
    big, parts = Setup(tmp_path / "big", size=6), Setup(tmp_path / "parts", size=2, num_parts=3)
    assert big() and parts()
    for name, value in big.weights().items():
        torch.testing.assert_close(parts.weights()[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(log_of(tmp_path / "big"), log_of(tmp_path / "parts")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_stopped_and_resumed_equals_uninterrupted_exactly(tmp_path):
    whole, first, second = (Setup(tmp_path / name) for name in ("whole", "first", "second"))
    whole()
    first.options = LoopOptions(num_steps=3, steps_per_epoch=2)
    first()
    torch.save(first.run.as_checkpoint(2), tmp_path / "checkpoint.pth")
    second.run.restore(torch.load(tmp_path / "checkpoint.pth", weights_only=True), "checkpoint.pth")
    assert second.run.step == 3
    second.batches = batches_of(4, start=3 * 4)
    second()
    for name, value in whole.weights().items():
        assert torch.equal(second.weights()[name], value), name


def described(num_processes: int, steps_per_epoch: int) -> dict:
    flags = {"batch_size": 8, "accumulate_steps": 1}
    return {"flags": flags, "effective_batch": 8 * num_processes, "steps_per_epoch": steps_per_epoch}


@pytest.mark.parametrize(
    ("num_processes", "cure"),
    [
        (4, "--batch_size 8 --accumulate_steps 2 --steps_per_epoch 31"),
        (16, "--batch_size 4 --accumulate_steps 1 --steps_per_epoch 31"),
        (5, "a number of processes that divides 64, and --steps_per_epoch 31"),
    ],
)
def test_another_effective_batch_is_told_with_the_flags_that_bring_it_back(tmp_path, num_processes, cure):
    setup = Setup(tmp_path)
    state = setup.run.as_checkpoint(31) | described(8, 31)
    setup.run.description = described(num_processes, 2000 // (8 * num_processes))
    told = rf"batch of 64 and 31 steps an epoch; this run has {8 * num_processes} and .* as before: {cure}$"
    with pytest.warns(UserWarning, match=told):
        setup.run.restore(state, "checkpoint.pth")


def test_the_same_effective_batch_and_older_checkpoints_are_not_warned_of(tmp_path, recwarn):
    warn_of_changed_steps(described(8, 31), described(8, 31), "checkpoint.pth")
    warn_of_changed_steps({"flags": {}}, described(4, 62), "older.pth")
    assert not recwarn.list


def test_schedules_reach_the_optimizer_and_the_log(tmp_path):
    setup = Setup(tmp_path)
    setup()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    decayed, kept = setup.run.optimizer.param_groups
    assert decayed["lr"] == kept["lr"] == pytest.approx(0.025)
    assert decayed["weight_decay"] == pytest.approx(0.03) and kept["weight_decay"] == 0


def test_last_layer_stands_still_while_frozen(tmp_path):
    setup = Setup(tmp_path, num_steps=2, num_freeze_steps=2)
    before = setup.weights()
    setup()
    after = setup.weights()
    assert torch.equal(after["0.last_layer.weight"], before["0.last_layer.weight"])
    assert not torch.equal(after["0.body.weight"], before["0.body.weight"])
    setup.options = LoopOptions(num_steps=3, steps_per_epoch=2, num_freeze_steps=2)
    setup()
    assert not torch.equal(setup.weights()["0.last_layer.weight"], before["0.last_layer.weight"])


def test_clipping_takes_all_trained_modules_together():
    modules = nn.ModuleDict({"backbone": nn.Linear(2, 2), "casa": nn.Linear(2, 2)})
    sum(module(torch.ones(1, 2)).sum() * 10 for module in modules.values()).backward()
    parameters = list(modules.parameters())
    norm = clip_gradients(parameters, 3.0)
    assert float(norm) == pytest.approx((2 * (4 + 2) * 100) ** 0.5)
    assert float(sum(p.grad.square().sum() for p in parameters)) == pytest.approx(9.0, rel=1e-4)
    assert clip_gradients(parameters, 0) == pytest.approx(3.0, rel=1e-4)  # measured, not changed
    assert float(sum(p.grad.square().sum() for p in parameters)) == pytest.approx(9.0, rel=1e-4)


def test_epochs_decide_when_to_save_validate_and_draw(tmp_path):
    setup = Setup(tmp_path, num_steps=9, steps_per_epoch=2, save_freq=2, keep_freq=4, val_freq=3, picture_freq=5)
    setup()
    assert setup.saved == [(4, None), (8, 4), (9, None)]  # every second epoch, a numbered copy, the end
    assert setup.validated == [6, 9]
    assert setup.drawn == [5, 9]
    assert [line["step"] for line in log_of(tmp_path, "epoch")] == [2, 4, 6, 8, 9]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_but_one_on_the_way_is_not(tmp_path):
    setup = Setup(tmp_path, num_steps=4, steps_per_epoch=2)
    setup.hooks = dataclasses.replace(setup.hooks, saved=lambda: False)
    with pytest.raises(CheckpointError, match="step 4 could not be saved"):
        setup()


def test_non_finite_loss_stops_before_any_weight_changes(tmp_path):
    setup = Setup(tmp_path)
    setup.poison_at = (1,)
    setup.options = LoopOptions(num_steps=1, steps_per_epoch=2)
    setup()
    before = setup.weights()
    setup.options = LoopOptions(num_steps=4, steps_per_epoch=2)
    name = setup.hooks.case_names(make_batch(4, 4))[0]
    with pytest.raises(NonFiniteLossError, match=rf"step 1: .*rank 0.*{name}.*--nan_policy skip"):
        setup()
    after = setup.weights()
    assert all(torch.equal(after[key], before[key]) for key in before if "centre" not in key)


def test_skip_leaves_out_the_step_and_its_centres(tmp_path):
    setup = Setup(tmp_path, num_steps=2, nan_policy="skip")
    setup.poison_at = (0, 1)
    before = setup.weights()
    assert setup()
    assert setup.run.step == 2
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())


def test_skipping_goes_on_with_a_scaled_loss(tmp_path):
    setup = Setup(tmp_path, num_steps=5, nan_policy="skip")
    setup.run.scaler = make_scaler("fp16", CPU)
    setup.poison_at = (1, 3)
    assert setup() and setup.run.step == 5
    assert setup.run.scaler.get_scale() == 2.0**16 / 4


def test_a_skipped_step_takes_only_its_own_values_out_of_the_means(tmp_path):
    setup = Setup(tmp_path, num_steps=4, steps_per_epoch=4, nan_policy="skip")
    setup.poison_at = (2,)
    setup()
    (epoch,), steps = log_of(tmp_path, "epoch"), {line["step"]: line for line in log_of(tmp_path)}
    assert "loss" not in steps[3]
    good = [steps[step]["loss"] for step in (1, 2, 4)]
    assert epoch["loss"] == pytest.approx(sum(good) / 3)


def test_skipping_ends_after_too_many_in_a_row(tmp_path):
    setup = Setup(tmp_path, num_steps=100, nan_policy="skip")
    setup.poison_at = tuple(range(1, 100))
    with pytest.raises(NonFiniteLossError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row"):
        setup()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_after_the_running_step(tmp_path, number):
    setup = Setup(tmp_path, num_steps=10, steps_per_epoch=10)
    handler = signal.getsignal(number)
    plain = setup.objective

    def signalled(*arguments):
        if setup.run.step == 2:
            os.kill(os.getpid(), number)
        return plain(*arguments)

    setup.objective = signalled
    assert setup() is False
    assert setup.saved == [(3, None)]
    assert signal.getsignal(number) == handler


def test_validation_leaves_no_trace(tmp_path):
    setup = Setup(tmp_path)
    setup.run.student.body.eval()  # a module whose own mode differs from its parent's
    modules = [setup.run.student, setup.run.teacher, setup.run.loss]
    modes, before = [m.training for root in modules for m in root.modules()], setup.weights()
    told = validate(setup.objective, modules, [make_batch(0, 4), make_batch(4, 4)], 0.04, World())
    assert told["loss"] == pytest.approx(told["loss_recon"]) and told["pair_score"] == 1.0
    assert [m.training for root in modules for m in root.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())

    def broken(*arguments):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        validate(broken, modules, [make_batch(0, 4)], 0.04, World())
    assert [m.training for root in modules for m in root.modules()] == modes


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("backbone.network.layers.weight", (4, 4), True),
        ("head.mlp.0.bias", (4,), False),
        ("norm.weight", (4,), False),
        ("backbone.mask_token", (1, 4, 1, 1, 1), False),
        ("attn.relative_position_bias_table", (343, 3), False),
    ],
)
def test_what_weight_decay_touches(name, shape, expected):
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_precision_names():
    assert pick_precision("auto", CPU) == "fp32"
    assert pick_precision("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="--use_fp16"):
        pick_precision("fp16", CPU)
    with pytest.raises(ValueError, match="fp8"):
        pick_precision("fp8", CPU)
