"""What a pretraining method is: the one interface between methods and the training loop.

A method owns its networks, its losses and what it keeps between steps. The loop calls, in this order:

    total, terms = method(batch, now)            forward; several times a step with gradient accumulation
    method.before_step(now)                      gradients are there, not yet clipped
    method.after_step(now, was_skipped)          averages, centres, queues

Shape letters: `models.backbones.interface`; V = crops of one sample.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from datasets.samples.anatomy import AnatomyRequest

Batch = dict[str, Tensor]
Now = dict[str, float]  # "step", "lr", "weight_decay", and the values of the method's own schedules


class Method(nn.Module):
    """A pretraining method. Subclasses fill in `__init__`, `forward` and the first three class variables.

    Attributes:
        Options: a dataclass; its fields are the method's flags.
        pairings: values of --pairing that it can use; the first is its default.
        views: batch name -> what that entry is made of every crop ("augmented", "moved", "blocks", "distorted"); the
            class's default, which an instance may overwrite. A distorted view NAME brings its target, NAME_target.
        constant_lr: parts of the student whose learning rate follows no schedule.
        sees_batch: a norm looks across samples, so that ranks and accumulated parts do not equal one big batch; an
            instance may overwrite it, where the backbone decides.
        anatomy: what every sample must bring of SAM's vectors inside its crops; None = nothing. An instance sets it.
        student: everything that has gradients; `student.backbone` is what people want.
    """

    Options: ClassVar[type]
    pairings: ClassVar[tuple[str, ...]]
    views: ClassVar[dict[str, str]]
    constant_lr: ClassVar[tuple[str, ...]] = ()
    sees_batch: ClassVar[bool] = False
    anatomy: AnatomyRequest | None = None

    student: nn.Module  # `teacher` has no default here: nn.Module would never find the module of that name

    def networks(self) -> dict[str, nn.Module]:
        """The student, and the teacher where there is one, by name; a teacher may lack a `backbone`."""
        return {name: part for name, part in self.named_children() if name in ("student", "teacher")}

    def train(self, mode: bool = True) -> "Method":
        """As every module's, but a teacher stays in evaluation mode."""
        super().train(mode)
        if "teacher" in self.networks():
            self.teacher.eval()
        return self

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
        """The method's own values per step, by the name that they have in `now` and in the log."""
        return {}

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss (a scalar with gradient) and its detached terms and monitors; changes no state but norms'.

        Args:
            batch: on the method's device: "crop" [B, V, 1, D, H, W] in [0, 1] and one entry [B, V, ...] for each name
                in `views`.
            now: values of this step.
        """
        raise NotImplementedError

    def before_step(self, now: Now) -> None:
        """Change gradients before they are clipped, for example to freeze a layer."""

    def after_step(self, now: Now, was_skipped: Tensor) -> None:
        """Move averages, centres and queues on, and forget what `forward` collected for it.

        Args:
            was_skipped: bool scalar on the method's device. Where it is true nothing may change; do not read it
                (`if was_skipped:` would wait for the device), but hand it on to what moves.
        """

    def look(self, batch: Batch) -> dict[str, Tensor]:
        """For pictures, rows [B * V, ...] in the order of `rows_of`; called in evaluation mode, without gradient.

        "seen": what the student saw [R, 1, D, H, W], NaN = hidden; "reconstruction": what it made of it; "target": what
        it should have made of it, where that is not the batch's crops;
        "attention_NAME": [R, N, M], attention of N asking tokens to M tokens of the view, mean over heads.
        """
        return {}


def rows_of(entry: Tensor) -> Tensor:
    """[B, V, ...] -> rows [B * V, ...]; the V rows of one sample stand together."""
    return entry.flatten(0, 1)


@torch.no_grad()
def average_towards(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float,
    was_skipped: Tensor | None = None,
    copied: tuple[str, ...] = (),
    with_buffers: bool = True,
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over the names that the teacher has.

    Args:
        momentum: 0 copies, 1 keeps.
        was_skipped: bool scalar on the networks' device; where it is true the teacher stays. None moves it.
        copied: prefixes of names that are copied instead. So are counters (integers without axes); tables of integers
            are constants of the architecture.
        with_buffers: also the running statistics of batch norms; false where the teacher follows batches of its own.
    """
    source = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    averaged: list[Tensor] = []
    towards: list[Tensor] = []
    buffers = teacher.named_buffers() if with_buffers else ()
    for name, tensor in (*teacher.named_parameters(), *buffers):
        if name.startswith(copied) or (not tensor.is_floating_point() and tensor.ndim == 0):
            new = source[name]
            tensor.copy_(new if was_skipped is None else torch.where(was_skipped, tensor, new))
        elif tensor.is_floating_point():
            averaged.append(tensor)
            towards.append(source[name])
    if was_skipped is None:
        torch._foreach_lerp_(averaged, towards, 1.0 - momentum)
    elif averaged:
        weight = (1.0 - momentum) * (~was_skipped).to(averaged[0].dtype)
        torch._foreach_lerp_(averaged, towards, [weight] * len(averaged))
