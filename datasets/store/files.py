"""Writing files so that a reader, or a run killed at any moment, never meets half of one."""

import contextlib
import errno
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path

FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileWriteError(ValueError):
    """A file cannot be written; the message names it and the reason. Whatever was there before is unharmed."""


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write `content` aside, flush it to the disk, then rename it to `path` (replacing an older file in one step).

    Raises:
        FileWriteError: the disk, the quota or the file-size limit is exhausted, or the folder cannot be written to.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise _explained(error, path, len(content)) from error


def _explained(error: OSError, path: Path, num_bytes: int) -> FileWriteError:
    """What a user should read instead of an errno."""
    if error.errno in FULL_DISK_ERRORS:
        return FileWriteError(
            f"{path}: no room for {num_bytes / 2**20:.1f} MiB ({error.strerror}). Free some space there or choose "
            "another folder, then run the same command again; finished files are kept."
        )
    return FileWriteError(f"{path}: cannot be written ({error.strerror}). Choose another folder or change its rights.")


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def remove_asides(path: Path) -> None:
    """Remove what killed writers of `path` left behind. Call it only while no other process may be writing `path`."""
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.aside"):
        left_over.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(lock_file: str | Path) -> Iterator[bool]:
    """Hold an advisory lock on `lock_file` (created if missing) among processes; the system drops it if we die.

    Yields:
        Whether the lock is held. Where the platform or the file system has no such locks (Lustre without `-o flock`,
        NFS without lockd) it is not: writers then may do the same work twice, but files are still replaced in one step.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    path = Path(lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise _explained(error, path, 0) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
