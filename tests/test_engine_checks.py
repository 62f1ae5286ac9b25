"""Steps whose answer the host reads one step late, as on a GPU: the same weights, nothing broken saved, all told."""

import copy
import dataclasses
import os
import signal

import pytest
import torch
from torch import nn

import engine.loop
from engine.checks import MAX_SKIPPED_IN_A_ROW, NonFiniteLossError, StepChecks
from engine.device import make_scaler
from engine.optim import make_optimizer, step_unless
from models.methods.method import average_towards
from tests.test_engine_pretrain import CPU, Setup, batches_of, flat_state

RARELY = {"num_steps": 8, "steps_per_epoch": 8, "log_freq": 100}  # nothing to read before the end
TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


class LateChecks(StepChecks):
    """As on a device whose values take long to read."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.reads_at_once = False


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(engine.loop, "StepChecks", LateChecks)


def state_of(setup: Setup) -> dict:
    return setup.weights() | flat_state(setup.run.optimizer)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_late_answer_changes_nothing(tmp_path, precision, monkeypatch):
    """Broken losses, broken gradients, and both in a row; batch norms; two parts a step."""
    ended = []
    for kind in (StepChecks, LateChecks):
        monkeypatch.setattr(engine.loop, "StepChecks", kind)
        setup = Setup(tmp_path / kind.__name__, nan_policy="skip", with_norm=True, num_parts=2, **RARELY)
        setup.run.scaler = make_scaler(precision, CPU)
        setup.method.poisoned, setup.method.overflowing = (0, 3, 4), (4, 6)
        assert setup()
        ended.append(state_of(setup) | {"scale": torch.tensor(setup.run.scaler.get_scale())})
    assert_same(*ended)
    assert all(value.isfinite().all() for value in ended[0].values())


def test_a_broken_step_is_told_one_step_late_and_nothing_is_saved_or_changed(tmp_path, late):
    setup = Setup(tmp_path, **RARELY | {"num_steps": 2, "steps_per_epoch": 2})
    setup()
    setup.saved.clear()
    before, seen = state_of(setup), []
    setup.options = dataclasses.replace(setup.options, num_steps=8, steps_per_epoch=8)
    setup.method.poisoned = (2,)
    forward = setup.method.forward
    setup.method.forward = lambda batch, now: seen.append(now["step"]) or forward(batch, now)
    with pytest.raises(NonFiniteLossError, match=r"^step 2: .*rank 0.*--nan_policy skip"):
        setup()
    assert seen == [2, 3] and setup.saved == []
    assert_same(before, state_of(setup))


def test_a_broken_step_that_would_be_saved_is_told_at_once(tmp_path, late):
    setup = Setup(tmp_path, **RARELY | {"steps_per_epoch": 3})
    setup.method.poisoned = (2,)
    with pytest.raises(NonFiniteLossError, match="^step 2: "):
        setup()
    assert setup.run.step == 2 and setup.saved == []


def test_a_signal_is_heard_one_step_late(tmp_path, late, monkeypatch):
    """And the step that is then saved must be known to be whole."""
    plain = engine.loop.seed_step

    def seed_and_signal(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.loop, "seed_step", seed_and_signal)
    whole, broken = Setup(tmp_path / "whole", **RARELY), Setup(tmp_path / "broken", **RARELY)
    assert whole() is False and whole.saved == [(4, None)]
    broken.method.poisoned = (3,)
    with pytest.raises(NonFiniteLossError, match="^step 3: "):
        broken()
    assert broken.saved == []


def test_too_many_broken_steps_in_a_row_end_a_late_run_too(tmp_path, late):
    setup = Setup(tmp_path, nan_policy="skip", num_steps=100, steps_per_epoch=100, log_freq=100)
    setup.method.poisoned = tuple(range(100))
    with pytest.raises(NonFiniteLossError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row"):
        setup()
    assert setup.run.step == MAX_SKIPPED_IN_A_ROW


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_that_is_called_off_leaves_the_optimiser_as_it_was(kind, fused):
    """Broken first and between: as if it had never been asked for; the next step counts on from the last one."""
    ended = []
    for called_off in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = make_optimizer(module, 0.1, 0.1, CPU, kind=kind, fused=fused)
        for step in range(3):
            for was_skipped in [SKIPPED, TAKEN] if called_off else [TAKEN]:
                broken = float("nan") if was_skipped else 1.0
                module.zero_grad()
                (module(torch.ones(1, 3) * (step + 1)).square().sum() * broken).backward()
                step_unless(was_skipped, optimizer)
        state = {(n, name): value for n, one in enumerate(optimizer.state.values()) for name, value in one.items()}
        ended.append(state | dict(module.named_parameters()))
        assert not hasattr(optimizer, "found_inf")
    assert_same(*ended)


def test_a_teacher_moves_the_same_whether_or_not_it_could_have_been_held():
    torch.manual_seed(0)
    student, first = (nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3)) for _ in range(2))
    student[1].num_batches_tracked += 5
    teachers = [copy.deepcopy(first) for _ in range(3)]
    before = {name: value.clone() for name, value in teachers[0].state_dict().items()}
    for teacher, was_skipped in zip(teachers, (None, TAKEN, SKIPPED)):
        average_towards(teacher, student, 0.9, was_skipped, copied=("1.weight",))
    moved, same, held = (teacher.state_dict() for teacher in teachers)
    assert_same(moved, same)
    assert_same(held, before)
    assert moved["1.num_batches_tracked"] == 5 and not torch.equal(moved["0.weight"], before["0.weight"])


def test_constant_tables_are_not_copied_with_every_step():
    teacher = nn.Module()
    teacher.register_buffer("relative_position_index", torch.arange(3))
    student = nn.Module()
    student.register_buffer("relative_position_index", torch.full((3,), 7))
    average_towards(teacher, student, 0.5, TAKEN)
    assert teacher.relative_position_index.tolist() == [0, 1, 2]


def test_the_same_batches_give_the_same_run_late(tmp_path, late):
    """Late reading and resuming together: stopped at a saved step, gone on to the end."""
    whole, first, second = (Setup(tmp_path / name, **RARELY) for name in ("whole", "first", "second"))
    whole()
    first.options = dataclasses.replace(first.options, num_steps=3)
    first()
    torch.save(first.run.as_checkpoint(8), tmp_path / "checkpoint.pth")
    second.run.restore(torch.load(tmp_path / "checkpoint.pth", weights_only=True), "checkpoint.pth")
    second.batches = batches_of(4, start=3 * 4)
    second()
    assert_same(whole.weights(), second.weights())
