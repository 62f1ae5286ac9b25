"""One run, one folder: a second process that would write to the same --output_dir is refused.

Two runs of the same command overwrite each other's checkpoints and mix their logs, and neither of them notices.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from engine.distributed import World

LOCK = ".run.lock"


class FolderInUseError(ValueError):
    """Another process writes to the folder; the message names it."""


@contextlib.contextmanager
def claimed(output_dir: str | Path, world: World) -> Iterator[None]:
    """Lock the folder (made if missing) on rank 0; the system unlocks it when the process ends, also after a crash.

    Where the platform or the file system has no advisory locks, this does nothing.

    Raises:
        FolderInUseError: another process holds it.
    """
    if not world.is_main:
        yield
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        if _hold(file, output_dir):
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
        yield


def _hold(file, output_dir: str | Path) -> bool:
    """Whether the lock is ours; False where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise FolderInUseError(
            f"--output_dir {output_dir} is in use by {file.read().strip() or 'another process'}: end that run first, "
            "or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        return False
    return True
