"""Distillation between two networks' distributions: DINO (Caron et al., ICCV 2021, equations 1 and 4).

    P(t) = softmax((t - centre) / teacher_temp),   H(t, s) = - sum_k P(t)_k log softmax(s / student_temp)_k

Every term is a mean over rows, so the mean over ranks of equal batches equals the loss of the joined batch, and DDP's
averaged gradients equal its gradients. Only the centres (or Sinkhorn's sums) talk to other ranks; they are constants of
the loss, and they are updated after the optimiser's step.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from losses.centre import RunningMeans
from losses.sinkhorn import balanced_probabilities


@dataclass(frozen=True)
class DistillationOptions:
    """How a teacher's logits become targets.

    Attributes:
        student_temp: temperature of the student's softmax
        teacher_temp: temperature of the teacher's softmax after its warm-up
        warmup_teacher_temp: temperature of the teacher's softmax at the start
        warmup_teacher_temp_epochs: epochs from the one to the other; 0 = none
        centring: against collapse: take a running mean off the teacher's logits (mean, DINO), or balance the rows of
            every forward pass (sinkhorn, SwAV); use sinkhorn when batches are small and the log warns of collapse, then
            also set --teacher_temp 0.012
        centre_momentum: momentum of the centres, per step; with --centring mean
        momentum_teacher: EMA momentum of the teacher at the start; rises to 1 along a cosine
    """

    student_temp: float = 0.1
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 30
    centring: Literal["mean", "sinkhorn"] = "mean"
    centre_momentum: float = 0.9
    momentum_teacher: float = 0.996

    def __post_init__(self) -> None:
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected more than 0")
        if self.warmup_teacher_temp_epochs < 0:
            raise ValueError(f"--warmup_teacher_temp_epochs {self.warmup_teacher_temp_epochs}: expected 0 or more")
        if self.centring not in ("mean", "sinkhorn"):
            raise ValueError(f"--centring {self.centring!r}: expected mean or sinkhorn")
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(f"--centre_momentum {self.centre_momentum}: expected a number from 0 to below 1")
        if not 0 <= self.momentum_teacher <= 1:
            raise ValueError(f"--momentum_teacher {self.momentum_teacher}: expected a momentum between 0 and 1")


class Distillation(nn.Module):
    """Targets from a teacher's logits, for several named outputs; the centres are its state."""

    def __init__(self, widths: dict[str, int], options: DistillationOptions | None = None) -> None:
        """`widths`: name of an output -> its number of logits K; the first one's mean distribution is watched."""
        super().__init__()
        self.options = options or DistillationOptions()
        self.first = next(iter(widths))
        # The mean teacher distribution starts uniform; it is watched, not part of the loss.
        watched, width = f"{self.first}_distribution", widths[self.first]
        self.centres = RunningMeans(
            widths | {watched: width}, self.options.centre_momentum, start={watched: 1.0 / width}
        )

    def targets(self, name: str, logits: Tensor, teacher_temp: float) -> Tensor:
        """The teacher's distributions, float32 of the logits' shape [..., K]; training collects for the centres.

        Args:
            logits: [..., K]; with sinkhorn all rows of one call (and of all ranks) are balanced together.
            teacher_temp: above 0.
        """
        if teacher_temp <= 0:
            raise ValueError(f"--teacher_temp must be above 0, got {teacher_temp}")
        logits = logits.detach().float()
        if self.training:
            self.centres.collect(name, logits)
        if self.options.centring == "sinkhorn":  # ranks may validate different numbers of batches: each for itself
            found = balanced_probabilities(logits, teacher_temp, across_ranks=self.training)
        else:
            found = F.softmax((logits - getattr(self.centres, name)) / teacher_temp, dim=-1)
        if self.training and name == self.first:
            self.centres.collect(f"{name}_distribution", found)
        return found

    def cross_entropies(self, targets: Tensor, logits: Tensor) -> Tensor:
        """H of targets and a student's logits, both [..., K], for each row [...], in float32."""
        return -(targets * F.log_softmax(logits.float() / self.options.student_temp, dim=-1)).sum(-1)

    def cross_entropy(self, targets: Tensor, logits: Tensor) -> Tensor:
        """The mean of `cross_entropies` over all rows."""
        return self.cross_entropies(targets, logits).mean()

    @property
    def mean_distribution(self) -> Tensor:
        """Running mean [K] of the first output's targets over batches and ranks."""
        return getattr(self.centres, f"{self.first}_distribution")

    def update(self, was_skipped: Tensor) -> None:
        """Fold what was collected into the centres, over all ranks; see `losses.centre.RunningMeans.apply`."""
        self.centres.apply(was_skipped)


def swap_views(rows: Tensor) -> Tensor:
    """Rows [2B, ...] whose pairs stand together: the two rows of every pair exchanged."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
