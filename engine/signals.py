"""Asked to stop: SIGTERM and SIGUSR1 (Slurm's warning before the time limit) end a run at the next step's end.

The loop then writes a checkpoint and the program exits with `EXIT_INTERRUPTED`: a job script sees "start me again"
beside success (0) and failure (anything else). Before the first step there is nothing to save, and the program exits
with the same code at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: a temporary end, try again.
EXIT_INTERRUPTED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def exit_until_trained(number: int, frame: FrameType | None) -> None:
    """The handler of a program that starts up."""
    raise SystemExit(EXIT_INTERRUPTED)


def stop_early_when_asked() -> None:
    """From now until a `StopRequest` a stop signal ends the program with `EXIT_INTERRUPTED`."""
    for number in STOP_SIGNALS:
        signal.signal(number, exit_until_trained)


def stop_with_torchrun() -> None:
    """Under torchrun, its end is a SIGTERM to this process, which would otherwise train on without a parent.

    torchrun passes SIGTERM on to its processes, but SIGUSR1 or SIGKILL end torchrun alone. Linux only.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def exiting_when_asked() -> Iterator[None]:
    """Inside the block a stop signal ends the program at once: for work after the training that can be done again."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop_early_when_asked()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Inside `with StopRequest() as stop:`, `stop.requested` becomes True when a stop signal arrives."""

    def __init__(self) -> None:
        self.requested = False
        self.handlers_before: dict = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> "StopRequest":
        self.handlers_before = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            # The training is over: a second signal must not change the exit code of a run that ends as it should.
            done = signal.SIG_DFL if error is not None else signal.SIG_IGN
            signal.signal(number, done if handler is exit_until_trained else handler)
