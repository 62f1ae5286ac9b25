"""The checks of a step: are its losses and gradients finite, and was a stop requested; one answer for all ranks.

The answer is computed on the device, and the step obeys it there: where it is broken, `torch.where` and the optimiser's
`found_inf` leave everything as it was. The host can therefore queue a step before the one before it has been computed.
It reads each answer one step later, while the device works on. It reads at once where it needs to know: before a step
is logged, saved or looked at, and on a CPU, where reading costs nothing.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed import all_max

MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteLossError(ValueError):
    """The loss or a gradient became infinite or NaN; the message names the cases of the ranks where it did."""


@dataclass(frozen=True)
class CheckedStep:
    """One step's answer, on the device.

    Attributes:
        step: its number, from 0.
        losses: scalars of this rank's parts.
        grad_norm: scalar, before clipping.
        cases: names of what this rank trained on.
        was_skipped: bool scalar on the device; nothing may change where it is true.
        is_counted: bool scalar on the device; whether the losses count in the means.
        answer: float [3] on the host, once `is_there` has happened: a loss is broken, the gradient is, a stop is asked.
        is_there: None where the host need not wait.
    """

    step: int
    losses: list[Tensor]
    grad_norm: Tensor
    cases: list[str]
    was_skipped: Tensor
    is_counted: Tensor
    answer: Tensor
    is_there: torch.cuda.Event | None

    def read(self) -> tuple[bool, bool, bool]:
        """On any of the ranks: is a loss not finite, is the gradient not finite, did a stop signal come."""
        if self.is_there is not None:
            self.is_there.synchronize()
        broken_loss, broken_gradient, is_asked = map(bool, self.answer.tolist())
        return broken_loss, broken_gradient, is_asked


class StepChecks:
    """Checks every step, and keeps those whose answer has not been read.

    Args:
        device: of losses and gradients.
        is_scaled: the loss is scaled (fp16). Gradients that are not finite are then an overflow, and the losses count.
    """

    def __init__(self, device: torch.device, is_scaled: bool) -> None:
        self.device, self.is_scaled = device, is_scaled
        self.reads_at_once = device.type == "cpu"
        self.is_asked_to_stop = False
        self.num_skipped = 0  # in a row, of those read
        self.unread: deque[CheckedStep] = deque()

    def check(
        self, step: int, losses: list[Tensor], grad_norm: Tensor, cases: list[str], is_asked: bool
    ) -> CheckedStep:
        """Check a step over all ranks; arguments as in `CheckedStep`.

        Args:
            is_asked: whether a stop signal came to this rank.
        """
        checks = torch.stack(
            [
                1.0 - torch.isfinite(torch.stack(losses)).all().float(),
                1.0 - torch.isfinite(grad_norm).float(),
                torch.full((), float(is_asked), device=self.device),
            ]
        )
        all_max(checks)
        broken_loss, broken_gradient, _ = checks.bool()
        was_skipped = broken_loss | broken_gradient
        is_counted = ~(broken_loss if self.is_scaled else was_skipped)
        answer, is_there = checks.to("cpu", non_blocking=True), None
        if self.device.type == "cuda":
            is_there = torch.cuda.Event()
            is_there.record()
        checked = CheckedStep(step, losses, grad_norm, cases, was_skipped, is_counted, answer, is_there)
        self.unread.append(checked)
        return checked

    def read(self, must_know: bool) -> list[tuple[CheckedStep, bool, int]]:
        """The broken steps among those that can be read now: all of them when `must_know`, else all but the newest.

        All ranks must read at the same steps: they act together on what they find.

        Returns:
            Of each broken step: the step, whether it is an overflow of scaled gradients alone, and how many steps in a
            row were broken up to this one.
        """
        broken = []
        while len(self.unread) > (0 if must_know or self.reads_at_once or self.is_asked_to_stop else 1):
            checked = self.unread.popleft()
            broken_loss, broken_gradient, is_asked = checked.read()
            self.is_asked_to_stop |= is_asked
            self.num_skipped = self.num_skipped + 1 if broken_loss or broken_gradient else 0
            if self.num_skipped:
                broken.append((checked, self.is_scaled and not broken_loss, self.num_skipped))
        return broken
