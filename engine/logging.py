"""The log of a run: a progress line, log.txt (one JSON object a line) and TensorBoard, all on rank 0 only.

Other ranks get a silent stand-in with the same methods, so that the loop needs no branches. Values stay on their device
until a logging step reads them all at once.
"""

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from engine.distributed import World, all_mean


class Meters:
    """Means of named values since the last reading; adding never waits for the device, reading does once.

    Every rank must add the same names and read at the same steps: a reading averages over ranks.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # of each name in turn, and last how many were added

    def add(self, values: dict[str, torch.Tensor], is_counted: torch.Tensor | None = None) -> None:
        """Add one step's values, all on one device: scalar tensors, or arrays whose mean counts.

        Args:
            is_counted: bool scalar on that device, false = leave these values out; None counts them.
        """
        if self.sums is not None and sorted(values) != self.names:
            raise ValueError(f"means over {', '.join(sorted(values))} after means over {', '.join(self.names)}")
        self.names = sorted(values)
        row = [values[name].detach().float() for name in self.names]
        row = [value if value.ndim == 0 else value.mean() for value in row]
        row = torch.stack([*row, torch.ones_like(row[0])])
        if is_counted is not None:
            row = row.masked_fill(~is_counted, 0.0)
        self.sums = row if self.sums is None else self.sums + row

    def read(self) -> dict[str, float]:
        """Means over what was counted and over all ranks; resets them. Nothing where nothing was counted."""
        if self.sums is None:
            return {}
        *sums, num_counted = all_mean(self.sums).tolist()
        self.sums = None
        return {name: total / num_counted for name, total in zip(self.names, sums)} if num_counted else {}


class Clock:
    """Samples per second, and the share of time spent waiting for data, since the last reading.

    Counts are the caller's: the loops count the samples of all ranks.
    """

    def __init__(self) -> None:
        self.started = self.asked = time.perf_counter()
        self.waited_s = 0.0
        self.num_samples = 0

    def wait(self) -> None:
        """Call before asking for a batch."""
        self.asked = time.perf_counter()

    def data_arrived(self, num_samples: int) -> None:
        """Call when the batch is there: the time since `wait` was waiting."""
        self.waited_s += time.perf_counter() - self.asked
        self.num_samples += num_samples

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count: what a run does between its steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """`samples_per_s` and `data_wait_share` (0 to 1); resets both."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        values = {"samples_per_s": self.num_samples / elapsed, "data_wait_share": min(1.0, self.waited_s / elapsed)}
        self.started, self.waited_s, self.num_samples = time.perf_counter(), 0.0, 0
        return values


class RunLog:
    """Progress line, log.txt and TensorBoard of one run.

    Where a file cannot be written (the disk is full), one warning says so, and the training continues.

    Args:
        output_dir: log.txt and the TensorBoard files go here.
        num_steps: length of the whole run.
        first_step: where this process starts; lines of log.txt at or after it (from a run that was killed later than
            its last checkpoint) are dropped, so that each step appears once.
        tensorboard: whether to write TensorBoard files.
    """

    def __init__(self, output_dir: str | Path, num_steps: int, first_step: int = 0, tensorboard: bool = True) -> None:
        self.path = Path(output_dir) / "log.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_steps = num_steps
        keep_lines_before(self.path, first_step)
        self.is_live = sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not self.is_live, dynamic_ncols=True)
        self.writer = None
        self._warned: set[str] = set()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(output_dir) / "tensorboard"), purge_step=first_step or None)

    def advance(self) -> None:
        """One step is done."""
        self.bar.update(1)

    def say(self, text: str) -> None:
        """One line for the user, above the progress line."""
        self.bar.write(text) if self.is_live else print(text, flush=True)

    def record(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write values to log.txt and TensorBoard, and show them. `kind`: train, epoch or validation."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        line = {"kind": kind, "step": step, "epoch": epoch} | plain
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self.warn_once(f"{self.path} cannot be written", error)
        self._to_tensorboard(
            lambda writer: [writer.add_scalar(f"{kind}/{name}", value, step) for name, value in values.items()]
        )
        text = "  ".join(f"{name} {format_value(value)}" for name, value in values.items())
        if self.is_live and kind == "train":
            self.bar.set_postfix_str(text)
        else:
            self.say(f"[{kind}] step {step}/{self.num_steps}  epoch {epoch}  {text}")

    def has(self, kind: str, step: int) -> bool:
        """Whether log.txt has a line of this kind and step."""
        return any((line["kind"], line["step"]) == (kind, step) for _, line in whole_lines(self.path))

    def image(self, name: str, image, step: int) -> None:
        """A picture for TensorBoard. `image`: uint8 array [height, width, 3]."""
        self._to_tensorboard(lambda writer: writer.add_image(name, image, step, dataformats="HWC"))

    def close(self) -> None:
        self.bar.close()
        self._to_tensorboard(lambda writer: writer.close())

    def _to_tensorboard(self, write: Callable) -> None:
        """Let `write` use the TensorBoard writer; once that has failed, there is none for the rest of the run."""
        try:
            if self.writer is not None:
                write(self.writer)
        except OSError as error:
            self.writer = None
            self.warn_once("TensorBoard files cannot be written", error)

    def warn_once(self, what: str, error: OSError) -> None:
        """Say once what failed and why."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{what} ({error.strerror or error}); the run goes on without", stacklevel=3)


class SilentLog:
    """The stand-in for ranks that write nothing: every method of `RunLog`, and none does anything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not callable(getattr(RunLog, name, None)):
            raise AttributeError(name)
        return lambda *_, **__: None


def make_log(world: World, output_dir: str | Path, num_steps: int, first_step: int) -> RunLog | SilentLog:
    """The log of this rank: real on rank 0, silent elsewhere."""
    return RunLog(output_dir, num_steps, first_step) if world.is_main else SilentLog()


def format_value(value: float) -> str:
    """Short and readable: four digits, exponents only for small numbers."""
    return f"{value:.2e}" if value != 0 and abs(value) < 1e-3 else f"{value:.4g}"


def keep_lines_before(path: Path, first_step: int) -> None:
    """Drop the lines of a log that a run starting at `first_step` will write again, and a torn last line."""
    if not path.exists():
        return
    kept = [text for text, line in whole_lines(path) if line["step"] <= first_step and first_step > 0]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(text + "\n" for text in kept))
    aside.replace(path)


def whole_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The lines of a log and what they hold, without a torn one; none where there is no log."""
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            line["kind"], line["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        yield text, line
