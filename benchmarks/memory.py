"""Resident memory of this process at its peak, on Linux; elsewhere nothing is known."""

from pathlib import Path

PROCESS_STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_resident() -> None:
    """Let the peak begin anew (Linux; elsewhere nothing happens)."""
    if PEAK_RESET.exists():
        PEAK_RESET.write_text("5")


def peak_resident_bytes() -> int | None:
    """The peak since the process began, or since `reset_peak_resident`, bytes; None where it cannot be known."""
    return _status("VmHWM")


def resident_bytes() -> int | None:
    """What the process holds now, bytes; None where it cannot be known."""
    return _status("VmRSS")


def _status(name: str) -> int | None:
    if not PROCESS_STATUS.exists():
        return None
    line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
