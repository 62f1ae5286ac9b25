"""The loop on a network of a few numbers: order of phases, accumulation, freezing, non-finite losses, signals."""

import dataclasses
import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import engine.loop
from engine.checkpoint import CheckpointError
from engine.checks import MAX_SKIPPED_IN_A_ROW, NonFiniteLossError
from engine.device import make_scaler, pick_precision
from engine.distributed import World
from engine.logging import RunLog
from engine.loop import Hooks, LoopOptions, norm_buffers, pretrain, validate, values_at
from engine.optim import clip_gradients, decays, make_optimizer, set_schedule
from engine.run import RunState, warn_of_changed_steps
from losses.centre import RunningMeans
from models.methods.method import Method, average_towards, rows_of
from tests.tiny_run import log_of

CPU = torch.device("cpu")


class Student(nn.Module):
    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3) if with_norm else nn.Identity()
        self.last_layer = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(self.norm(self.body(x)))


class TinyMethod(Method):
    """Squared error to the teacher, with a running mean as centres have it, and a last layer that is frozen at first.

    Steps in `poisoned` have a loss that is not finite, steps in `overflowing` gradients that are not.
    """

    poisoned: tuple[int, ...] = ()
    overflowing: tuple[int, ...] = ()

    def __init__(self, num_freeze_steps: int = 0, with_norm: bool = False) -> None:
        super().__init__()
        self.num_freeze_steps = num_freeze_steps
        self.student = Student(with_norm)
        self.teacher = Student(with_norm).requires_grad_(False)
        self.loss = RunningMeans({"centre": 2}, 0.9)
        self.train()

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict:
        frozen = {"last_layer_frozen": lambda step: float(step < self.num_freeze_steps)}
        return {"momentum_teacher": lambda step: 0.5} | frozen

    def forward(self, batch: dict, now: dict) -> tuple[torch.Tensor, dict]:
        out = self.student(rows_of(batch["view"]))
        with torch.no_grad():
            target = self.teacher(rows_of(batch["view"]))
        if self.training:
            self.loss.collect("centre", target)
        if now["step"] in self.overflowing:
            out.register_hook(lambda gradient: gradient * float("inf"))
        total = (out - target + 1).square().mean()
        if now["step"] in self.poisoned:
            total = total * float("nan")
        return total, {"loss_recon": total.detach()}

    def before_step(self, now: dict) -> None:
        if now["last_layer_frozen"]:
            self.student.last_layer.weight.grad = None

    def after_step(self, now: dict, was_skipped: torch.Tensor) -> None:
        average_towards(self.teacher, self.student, now["momentum_teacher"], was_skipped)
        self.loss.apply(was_skipped)


def make_batch(first: int, size: int) -> dict:
    rows = [torch.randn(4, generator=torch.Generator().manual_seed(first + j)) for j in range(size)]
    view = torch.stack(rows)[:, None]  # V = 1
    return {"view": view, "is_fallback": torch.zeros(size, dtype=torch.bool), "score": torch.ones(size)}


def batches_of(size: int, start: int = 0):
    return (make_batch(first, size) for first in itertools.count(start, size))


def case_names(batch: dict) -> list[str]:
    return [f"case{int(value * 100)}" for value in batch["view"][:, 0, 0]]


class Setup:
    """A run of the loop with everything recorded."""

    def __init__(self, folder, size: int = 4, num_freeze_steps: int = 0, with_norm: bool = False, **options) -> None:
        self.method = TinyMethod(num_freeze_steps, with_norm)
        optimizer = make_optimizer(self.method.student, 0.1, 0.01, CPU)
        self.run = RunState(self.method, optimizer, make_scaler("fp32", CPU))
        self.options = LoopOptions(**({"num_steps": 4, "steps_per_epoch": 2, "log_freq": 1} | options))
        own = {"lr": lambda step: 0.1 / (1 + step), "weight_decay": lambda step: 0.01 * step}
        self.schedules = own | self.method.schedules(4, 2)
        self.saved, self.validated, self.drawn = [], [], []
        self.hooks = Hooks(
            validate=lambda: self.validated.append(self.run.step) or {"loss": 1.0},
            draw=lambda batch, step: self.drawn.append(step),
            save=lambda epoch: self.saved.append((self.run.step, epoch)),
            saved=lambda: True,
        )
        self.log = RunLog(folder, self.options.num_steps, tensorboard=False)
        self.batches = batches_of(size)

    def __call__(self) -> bool:
        dataset = SimpleNamespace(case_names=case_names)
        return pretrain(
            self.run, self.method, dataset, self.batches, self.schedules, self.options, self.hooks, World(), self.log
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.method.state_dict().items()}


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
    assert torch.equal(after["student.last_layer.weight"], before["student.last_layer.weight"])
    assert not torch.equal(after["student.body.weight"], before["student.body.weight"])
    setup.options = LoopOptions(num_steps=3, steps_per_epoch=2)
    setup()
    assert not torch.equal(setup.weights()["student.last_layer.weight"], before["student.last_layer.weight"])


def test_parts_with_a_constant_rate_keep_the_peak_and_decay_like_the_others():
    method = TinyMethod()
    optimizer = make_optimizer(method.student, 0.1, 0.01, CPU, kind="sgd", constant_parts=("last_layer",))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    set_schedule(optimizer, 0.025, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0.3, 0]
    assert optimizer.param_groups[2]["params"][0] is method.student.last_layer.weight


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
    assert setup.saved == [(4, None), (6, None), (8, 4), (9, None)]  # every second epoch, a numbered copy, the end
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
    setup.method.poisoned = (1,)
    setup.options = LoopOptions(num_steps=1, steps_per_epoch=2)
    setup()
    before = setup.weights()
    setup.options = LoopOptions(num_steps=4, steps_per_epoch=2)
    name = case_names(make_batch(4, 4))[0]
    with pytest.raises(NonFiniteLossError, match=rf"step 1: .*rank 0.*{name}.*--nan_policy skip"):
        setup()
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())


def test_gradients_that_are_not_finite_stop_an_unscaled_run_too(tmp_path):
    setup = Setup(tmp_path)
    setup.method.overflowing = (1,)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*gradient norm (inf|nan).*--nan_policy skip"):
        setup()


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("how", ["poisoned", "overflowing"])
def test_a_skipped_step_leaves_no_trace(tmp_path, how, with_norm):
    """Weights, moments of the optimiser, averages, centres, and the running statistics of batch norms."""
    setup = Setup(tmp_path, num_steps=3, nan_policy="skip", num_parts=2, with_norm=with_norm)
    setup.options = dataclasses.replace(setup.options, num_steps=1)
    setup()
    before, moments = setup.weights(), flat_state(setup.run.optimizer)
    setattr(setup.method, how, (1, 2))
    setup.options = dataclasses.replace(setup.options, num_steps=3)
    assert setup() and setup.run.step == 3
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())
    assert all(torch.equal(value, moments[name]) for name, value in flat_state(setup.run.optimizer).items())
    assert len(norm_buffers(setup.method)) == (6 if with_norm else 0)
    setup.options = dataclasses.replace(setup.options, num_steps=4)
    setup()
    changed = [name for name, value in setup.weights().items() if not torch.equal(value, before[name])]
    assert "loss.centre" in changed and ("student.norm.running_mean" in changed) is with_norm


def flat_state(optimizer: torch.optim.Optimizer) -> dict[tuple, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {(index, name): value.clone() for index, values in state.items() for name, value in values.items()}


def test_a_skipped_step_does_not_count_towards_the_centres_of_the_next(tmp_path):
    """Two runs whose only difference is a broken step in between end with the same centre."""
    plain, broken = Setup(tmp_path / "plain"), Setup(tmp_path / "broken", nan_policy="skip")
    plain.options = dataclasses.replace(plain.options, num_steps=1)
    plain.batches = batches_of(4, start=4)
    plain()
    broken.method.poisoned = (0,)
    broken.options = dataclasses.replace(broken.options, num_steps=2)
    broken()
    assert torch.equal(plain.weights()["loss.centre"], broken.weights()["loss.centre"])
    assert plain.weights()["loss.centre"].any()


def test_skipping_goes_on_with_a_scaled_loss(tmp_path):
    setup = Setup(tmp_path, num_steps=5, nan_policy="skip")
    setup.run.scaler = make_scaler("fp16", CPU)
    setup.method.poisoned = (1, 3)
    assert setup() and setup.run.step == 5
    assert setup.run.scaler.get_scale() == 2.0**16 / 4


def test_an_overflow_of_a_scaled_loss_is_skipped_without_a_word_and_scales_less(tmp_path, capsys):
    """Not finite are the gradients, not the loss: no error under --nan_policy stop, and averages stand still."""
    setup = Setup(tmp_path, num_steps=3)
    setup.run.scaler = make_scaler("fp16", CPU)
    setup.method.overflowing = (0, 1)
    setup.options = dataclasses.replace(setup.options, num_steps=2)
    before = setup.weights()
    assert setup() and setup.run.step == 2
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())
    assert not any(value.any() for value in flat_state(setup.run.optimizer).values())
    assert setup.run.scaler.get_scale() == 2.0**16 / 4
    assert "skipped" not in capsys.readouterr().out
    setup.options = dataclasses.replace(setup.options, num_steps=3)
    setup()
    changed = {name for name, value in setup.weights().items() if not torch.equal(value, before[name])}
    assert {"student.body.weight", "teacher.body.weight", "loss.centre"} <= changed


def test_overflows_end_the_run_when_they_do_not_end(tmp_path):
    setup = Setup(tmp_path, num_steps=100, steps_per_epoch=100)
    setup.run.scaler = make_scaler("fp16", CPU)
    first = MAX_SKIPPED_IN_A_ROW - 1  # so many in a row are the scaler's business
    setup.method.overflowing = (*range(first), *range(first + 1, 100))
    with pytest.raises(NonFiniteLossError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row.*--precision"):
        setup()
    assert setup.run.step == 2 * MAX_SKIPPED_IN_A_ROW - 1


def test_a_broken_loss_of_a_scaled_run_is_no_overflow(tmp_path):
    setup = Setup(tmp_path)
    setup.run.scaler = make_scaler("fp16", CPU)
    setup.method.poisoned = (1,)
    with pytest.raises(NonFiniteLossError, match="step 1: .*--nan_policy skip"):
        setup()


def test_a_skipped_step_takes_only_its_own_values_out_of_the_means(tmp_path):
    setup = Setup(tmp_path, num_steps=4, steps_per_epoch=4, nan_policy="skip")
    setup.method.poisoned = (2,)
    setup()
    (epoch,), steps = log_of(tmp_path, "epoch"), {line["step"]: line for line in log_of(tmp_path)}
    assert "loss" not in steps[3]
    good = [steps[step]["loss"] for step in (1, 2, 4)]
    assert epoch["loss"] == pytest.approx(sum(good) / 3)


def test_skipping_ends_after_too_many_in_a_row(tmp_path):
    setup = Setup(tmp_path, num_steps=100, nan_policy="skip")
    setup.method.poisoned = tuple(range(1, 100))
    with pytest.raises(NonFiniteLossError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row"):
        setup()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_after_the_running_step(tmp_path, monkeypatch, number):
    setup = Setup(tmp_path, num_steps=10, steps_per_epoch=10)
    handler = signal.getsignal(number)
    plain = engine.loop.seed_step

    def seed_and_signal(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(engine.loop, "seed_step", seed_and_signal)
    assert setup() is False
    assert setup.saved == [(3, None)]
    assert signal.getsignal(number) == handler


def test_a_step_is_saved_before_it_is_looked_at_and_a_stopped_run_looks_at_nothing(tmp_path, monkeypatch):
    """Looking may take longer than a launcher waits after its signal."""
    looks = {"picture_freq": 3, "val_freq": 1, "probe_freq": 1}
    setup, order = Setup(tmp_path, num_steps=9, steps_per_epoch=3, save_freq=100, **looks), []
    plain = engine.loop.seed_step

    def seed_and_signal(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.loop, "seed_step", seed_and_signal)
    setup.hooks = Hooks(
        validate=lambda: order.append("validate") or {},
        draw=lambda batch, step: order.append("draw"),
        save=lambda epoch: order.append(f"save {setup.run.step}"),
        saved=lambda: True,
        probe=lambda: order.append("probe") or {},
    )
    assert setup() is False
    assert order == ["save 3", "draw", "validate", "probe", "save 6"]


def test_a_signal_while_validating_leaves_the_probe_out(tmp_path):
    setup = Setup(tmp_path, num_steps=9, steps_per_epoch=3, val_freq=1, probe_freq=1)
    setup.hooks = dataclasses.replace(
        setup.hooks,
        validate=lambda: os.kill(os.getpid(), signal.SIGTERM) or {},
        probe=lambda: pytest.fail("probed"),
    )
    assert setup() is False
    assert setup.saved == [(3, None), (4, None)]


def test_a_look_that_a_killed_run_did_not_get_to_comes_first_in_the_next(tmp_path):
    looks = {"num_steps": 9, "steps_per_epoch": 3, "val_freq": 1, "probe_freq": 3}
    killed, order = Setup(tmp_path, **looks), []

    def die_while_validating() -> dict:
        raise KeyboardInterrupt

    killed.hooks = dataclasses.replace(killed.hooks, validate=die_while_validating)
    with pytest.raises(KeyboardInterrupt):
        killed()
    for steps_done, expected in ((3, [3, 6, 9, "probe"]), (9, []), (6, [9, "probe"])):
        next_one = Setup(tmp_path / "unused", **looks)
        next_one.run.step = steps_done
        next_one.log = RunLog(tmp_path, 9, first_step=steps_done, tensorboard=False)
        order.clear()
        next_one.hooks = dataclasses.replace(
            next_one.hooks,
            validate=lambda run=next_one.run: order.append(run.step) or {"loss": 1.0},
            probe=lambda: order.append("probe") or {"dice": 0.5},
        )
        assert next_one()
        assert order == expected, steps_done
        assert [line["step"] for line in log_of(tmp_path, "validation")] == [3, 6, 9]
        assert [line["step"] for line in log_of(tmp_path, "probe")] == [9]


def test_validation_leaves_no_trace(tmp_path, monkeypatch):
    setup = Setup(tmp_path, with_norm=True)
    method, now = setup.method, values_at(setup.schedules, 4)
    method.student.body.eval()  # a module whose own mode differs from its parent's
    modes, before = [module.training for module in method.modules()], setup.weights()
    means = validate(method, [make_batch(0, 4), make_batch(4, 4)], now, "fp32", World())
    assert means["loss"] == pytest.approx(means["loss_recon"]) and means["pair_score"] == 1.0
    assert means["fallback_share"] == 0
    assert [module.training for module in method.modules()] == modes
    method.loss.apply(torch.tensor(False))  # nothing was collected
    assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())

    def broken(*arguments):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(method, "forward", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        validate(method, [make_batch(0, 4)], now, "fp32", World())
    assert [module.training for module in method.modules()] == modes


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
