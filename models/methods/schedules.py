"""Schedules per step: learning rate, weight decay, EMA momentum, teacher temperature.

The cosine with linear warm-up is DINO's (Caron et al., ICCV 2021), which Alice uses for all three of its cosines. Each
schedule is a function of the step alone, so that a resumed run needs nothing but its step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from losses.distillation import DistillationOptions


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from `warmup_start` to `start`, then half a cosine from `start` towards `end`.

    Args:
        start: value at the end of the warm-up (the peak of a learning rate).
        end: value that the cosine tends to; reached one step after the last.
        num_steps: length of the whole schedule, warm-up included.
        num_warmup_steps: length of the warm-up; 0 = none.
        warmup_start: value at step 0 where there is a warm-up.

    Raises:
        ValueError: the warm-up is longer than the schedule.
    """

    start: float
    end: float
    num_steps: int
    num_warmup_steps: int = 0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.num_warmup_steps <= self.num_steps:
            raise ValueError(f"a warm-up of {self.num_warmup_steps} steps does not fit into {self.num_steps} steps")

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0; beyond the last step it stays at `end`."""
        if step < self.num_warmup_steps:
            share = step / max(1, self.num_warmup_steps - 1)
            return self.warmup_start + (self.start - self.warmup_start) * share
        if step >= self.num_steps:
            return self.end
        share = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class LinearSchedule:
    """From `start` to `end` in equal steps over `num_steps`, then constant; `num_steps` 0 = `end` from the outset."""

    start: float
    end: float
    num_steps: int

    def __call__(self, step: int) -> float:
        if step >= self.num_steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.num_steps


def distillation_schedules(
    options: DistillationOptions, freeze_epochs: float, num_steps: int, steps_per_epoch: int
) -> dict[str, Callable[[int], float]]:
    """The teacher's momentum and temperature, and whether the head's last layers stand still (1 or 0), per step."""
    num_freeze_steps = round(freeze_epochs * steps_per_epoch)
    warmup = options.warmup_teacher_temp_epochs * steps_per_epoch
    return {
        "momentum_teacher": CosineSchedule(options.momentum_teacher, 1.0, num_steps),
        "teacher_temp": LinearSchedule(options.warmup_teacher_temp, options.teacher_temp, warmup),
        "last_layer_frozen": lambda step: float(step < num_freeze_steps),
    }
