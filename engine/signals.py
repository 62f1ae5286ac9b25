"""Asked to stop: SIGTERM and SIGUSR1 (Slurm's warning before the time limit) end a run at the next step's end.

The loop then writes a checkpoint and the program exits with `EXIT_INTERRUPTED`, so that a job script can tell "start me
again" from success (0) and failure (anything else).
"""

import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h: a temporary end, try again.
EXIT_INTERRUPTED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
