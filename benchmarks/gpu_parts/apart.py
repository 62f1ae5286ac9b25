"""One item after the other, each in a process of its own: with a log, a time limit, and figures that outlive it."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.store.files import write_text
from engine.device import pick_device

PRELOADED = (
    *("benchmarks.gpu_parts.items", "benchmarks.gpu_parts.methods", "torch.utils.tensorboard"),
    "models.backbones.swin_unetr",
)
GRACE_S = 8.0  # between being asked to end and being ended


@dataclass(frozen=True)
class Workplace:
    """What an item is given.

    Attributes:
        folder: for files that nobody needs afterwards; all items of one call share it.
        is_rehearsal: toy sizes.
        keep: call it with figures as soon as they are there; they stay, whatever happens to the item later.
    """

    folder: Path
    is_rehearsal: bool
    keep: Callable[[dict], None]

    @property
    def device(self) -> torch.device:
        """CUDA; in a rehearsal the CPU where there is no CUDA."""
        return pick_device("auto" if self.is_rehearsal else "cuda", 0)

    @property
    def precision(self) -> str:
        """bf16; fp32 on a CPU, whose bf16 may be slow or wrong (LOG.md, "the NaN of bfloat16 on a CPU")."""
        return "bf16" if self.device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Item:
    """Something that is checked or measured.

    Attributes:
        measure: does it; a function of a module, or a `functools.partial` of one. An error is the item's failure.
        limit_s: seconds that it may take, its end included.
    """

    name: str
    part: int
    limit_s: float
    measure: Callable[[Workplace], None]


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """Where processes come from: a process with all imports done and CUDA untouched; it starts with the first item.

    A library that asks for CUDA while it is imported would make CUDA unusable in all of them. The variable lets PyTorch
    answer through NVML, without touching CUDA.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_apart(item: Item, limit_s: float, folder: Path, is_rehearsal: bool, output_dir: Path) -> dict:
    """Run an item to its end, or until `limit_s` is over.

    An item that is too slow receives SIGTERM, which ends a training with what it has, and SIGKILL `GRACE_S` later, as
    does everything that it has started.

    Args:
        folder: see `Workplace`.
        output_dir: NAME.log and NAME.json, the figures, are written here.

    Returns:
        `seconds`, `figures`, and `error`: None, or what went wrong.
    """
    figures, log = output_dir / f"{item.name}.json", output_dir / f"{item.name}.log"
    for path in (figures, log):
        path.unlink(missing_ok=True)
    if limit_s < 2 * GRACE_S:
        return {"seconds": 0.0, "figures": {}, "error": "left out, the time of its part is over"}
    started, is_late = time.perf_counter(), False
    given = (item.measure, folder, is_rehearsal, figures, log, multiprocessing.get_start_method())
    process = server().Process(target=_perform, args=given)
    process.start()
    try:
        process.join(limit_s - GRACE_S)
        if is_late := process.is_alive():
            process.terminate()
            process.join(GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    error = None
    if is_late:
        error = f"asked to end after {limit_s - GRACE_S:.0f} s"
    elif process.exitcode:
        error = last_line(log) or f"exit code {process.exitcode}"
    found = json.loads(figures.read_text()) if figures.is_file() else {}
    return {"seconds": time.perf_counter() - started, "figures": found, "error": error}


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, where Python names the error."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _perform(
    measure: Callable[[Workplace], None], folder: Path, is_rehearsal: bool, figures: Path, log: Path, start_method: str
) -> None:
    """What the other process does."""
    os.setsid()  # a group of its own, which can be ended together
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method(start_method, force=True)  # loading processes start as a user's do
    found: dict = {}

    def keep(more: dict) -> None:
        found.update(more)
        write_text(figures, json.dumps(found, indent=1) + "\n")

    measure(Workplace(folder, is_rehearsal, keep))
