"""Faults inside a rank: each function prepares the process that calls it, before the run in it starts.

The code of the run itself has no hooks for them: one of its functions is replaced in that process.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import engine.checkpoint
import engine.loop
from datasets.samples.dataset import CropDataset
from models.methods import METHODS

SAVING_MOMENTS = ("writing", "written", "between", "renamed")


def die() -> None:
    """End this process at once, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def around_step(method: str, step: int, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around this rank's training forward of a step."""
    kind = METHODS[method]
    plain = kind.forward

    def forward(self, batch, now):
        is_training = self.training and now["step"] == step
        if is_training:
            before()
        found = plain(self, batch, now)
        if is_training:
            after()
        return found

    kind.forward = forward


def die_in_forward(method: str, step: int) -> None:
    """Die in the forward pass of a step."""
    around_step(method, step, die, lambda: None)


def die_in_all_reduce(method: str, step: int, after_s: float) -> None:
    """Die some seconds after the forward pass of a step, while the gradients wait for a rank that comes late."""
    around_step(method, step, lambda: None, threading.Timer(after_s, die).start)


def come_late(method: str, step: int, late_s: float) -> None:
    """Wait before the forward pass of a step."""
    around_step(method, step, lambda: time.sleep(late_s), lambda: None)


def die_in_validation(method: str, number: int) -> None:
    """Die in the forward pass of the process's validation `number`, from 0."""
    kind, plain_validate, plain = METHODS[method], engine.loop.validate, METHODS[method].forward
    begun: list[int] = []

    def forward(self, batch, now):
        if not self.training and len(begun) == number + 1:
            die()
        return plain(self, batch, now)

    def validate(*arguments):
        begun.append(1)
        return plain_validate(*arguments)

    kind.forward = forward
    import main_ddp

    main_ddp.validate = validate


def die_in_saving(number: int, moment: str) -> None:
    """Die in the process's save `number`, from 0: while the file is written (half of it is there), when it is written
    aside, between the two renames, or after them (`SAVING_MOMENTS`)."""
    write, replace, written = engine.checkpoint.write_synced, Path.replace, []

    def write_and_die(state: dict, path: Path) -> None:
        written.append(path)
        write(state, path)
        if len(written) == number + 1 and moment == "writing":
            os.truncate(path, path.stat().st_size // 2)
        if len(written) == number + 1 and moment in ("writing", "written"):
            die()

    def replace_and_die(self: Path, target: Path) -> Path:
        done = replace(self, target)
        last = {"between": engine.checkpoint.PREVIOUS, "renamed": engine.checkpoint.LATEST}.get(moment)
        if len(written) == number + 1 and Path(target).name == last:
            die()
        return done

    engine.checkpoint.write_synced, Path.replace = write_and_die, replace_and_die


def set_clock(hours: float) -> None:
    """A clock that is wrong: what Python asks for the time of day is some hours off."""
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + 3600 * hours
    time.time_ns = lambda: right_ns() + int(3600e9 * hours)


def poison_samples(indices: Sequence[int]) -> None:
    """Some samples hold NaN: all crops and views of them."""
    plain = CropDataset.cut

    def poisoned(self: CropDataset, index: int) -> dict:
        sample = plain(self, index)
        if index in indices:
            draws = sample["draws"]
            for windows in (draws["window"], *(drawn["look"] for name, drawn in draws.items() if name != "window")):
                windows[..., :2] = float("nan")
        return sample

    CropDataset.cut = poisoned
