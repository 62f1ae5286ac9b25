"""Schedules against the published ones (golden numbers) and against values worked out by hand."""

import numpy as np
import pytest

from engine.schedules import CosineSchedule, LinearSchedule, peak_lr
from tests.golden_fill import golden_arrays, known


@pytest.mark.parametrize("name", ["lr_default", "lr_readme", "wd", "mom", "short"])
def test_cosine_equals_published_schedule_at_every_step(name):
    golden = golden_arrays("golden_sched.npz")
    start, end, epochs, steps_per_epoch, warmup_epochs = golden[f"{name}_args"]
    num_steps, num_warmup = int(epochs * steps_per_epoch), int(warmup_epochs * steps_per_epoch)
    schedule = CosineSchedule(start, end, num_steps, num_warmup)
    ours = np.array([schedule(step) for step in range(num_steps)])
    np.testing.assert_allclose(*known(ours, golden[name]), rtol=1e-12, atol=1e-15)


def test_cosine_by_hand():
    schedule = CosineSchedule(start=1.0, end=0.1, num_steps=15, num_warmup_steps=6)
    assert [round(schedule(step), 6) for step in range(7)] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert schedule(9) == pytest.approx(0.1 + 0.45 * (1 + 0.5))  # a third of the way: cos(60 degrees) = 0.5
    assert schedule(15) == schedule(1000) == 0.1


def test_momentum_rises_to_one():
    values = [CosineSchedule(0.996, 1.0, 100)(step) for step in range(101)]
    assert values[0] == 0.996 and values[-1] == 1.0
    assert all(before < after for before, after in zip(values, values[1:]))


def test_warmup_longer_than_run_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        CosineSchedule(1.0, 0.0, num_steps=10, num_warmup_steps=11)


def test_linear_schedule():
    schedule = LinearSchedule(0.04, 0.07, num_steps=3)
    assert [schedule(step) for step in (0, 1, 3, 9)] == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert LinearSchedule(0.04, 0.07, 0)(0) == 0.07


def test_peak_lr_scales_only_when_asked():
    assert peak_lr(5e-5, effective_batch=64, reference_batch=0) == 5e-5
    assert peak_lr(5e-5, effective_batch=64, reference_batch=256) == pytest.approx(1.25e-5)
