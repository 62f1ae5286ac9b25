"""Meters, the clock, and log.txt across a restart."""

import json
import time

import pytest
import torch

from engine.distributed import World
from engine.logging import Clock, Meters, RunLog, SilentLog, make_log


def lines(path):
    return [json.loads(line) for line in (path / "log.txt").read_text().splitlines()]


def test_meters_average_over_steps_and_start_anew():
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0), "score": torch.tensor([0.0, 1.0])})
    meters.add({"loss": torch.tensor(3.0), "score": torch.tensor([1.0, 1.0])})
    assert meters.read() == {"loss": 2.0, "score": 0.75}
    assert meters.read() == {}


def test_meters_leave_out_what_does_not_count_whatever_it_is():
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)}, torch.tensor(True))
    meters.add({"loss": torch.tensor(float("nan"))}, torch.tensor(False))
    assert meters.read() == {"loss": 1.0}
    meters.add({"loss": torch.tensor(2.0)}, torch.tensor(False))
    assert meters.read() == {}


def test_meters_refuse_other_names_before_a_reading():
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="loss, score after means over loss"):
        meters.add({"loss": torch.tensor(1.0), "score": torch.tensor(1.0)})


def test_clock_tells_waiting_from_working():
    clock = Clock()
    clock.wait()
    time.sleep(0.05)
    clock.data_arrived(4)
    time.sleep(0.05)
    told = clock.read()
    assert 0.1 < told["data_wait_share"] < 0.9  # half, on a machine that has nothing else to do
    assert 1 < told["samples_per_s"] < 41
    clock.wait()
    clock.data_arrived(1)
    time.sleep(0.05)
    assert clock.read()["data_wait_share"] < 0.1


def test_log_lines_are_json_and_appear_once_after_a_resume(tmp_path):
    log = RunLog(tmp_path, num_steps=10, tensorboard=False)
    for step in (2, 4, 6):
        log.record("train", step, 0, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"kind": "train", "st')  # torn by a kill
    log = RunLog(tmp_path, num_steps=10, first_step=4, tensorboard=False)
    log.record("train", 6, 0, {"loss": 0.5})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_time_between_the_steps_does_not_count():
    clock = Clock()
    clock.wait()
    time.sleep(0.02)
    clock.data_arrived(4)
    with clock.paused():
        time.sleep(0.5)
    told = clock.read()
    assert told["data_wait_share"] > 0.1 and told["samples_per_s"] > 10  # 0.04 and 8 with the pause


def test_values_that_are_not_finite_are_null_in_the_log(tmp_path):
    """Bare NaN and Infinity are Python's, not JSON's."""
    log = RunLog(tmp_path, num_steps=1, tensorboard=False)
    log.record("train", 1, 0, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["lr"] == 0.5
    assert json.loads(line)["loss"] is None and json.loads(line)["grad_norm"] is None


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path, num_steps=3, tensorboard=False)
    (tmp_path / "log.txt").symlink_to("/dev/full")

    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    log.writer = Full()
    with pytest.warns(UserWarning, match="No space left on device.*goes on") as told:
        for step in (1, 2, 3):
            log.record("train", step, 0, {"loss": 1.0})
    assert len(told) == 2 and log.writer is None  # log.txt and TensorBoard


def test_only_rank_zero_writes(tmp_path):
    log = make_log(World(rank=1, size=2), tmp_path / "run", num_steps=3, first_step=0)
    assert isinstance(log, SilentLog)
    log.say("unheard")
    log.record("train", 1, 0, {"loss": 1.0})
    log.advance()
    log.close()
    assert not (tmp_path / "run").exists()


def test_silent_log_has_every_method_of_the_real_one():
    for name in vars(RunLog):
        if not name.startswith("_"):
            assert getattr(SilentLog(), name)("unheard") is None
    with pytest.raises(AttributeError):
        _ = SilentLog().no_method
