"""Checkpoints: tensors and plain values only, written aside and renamed, with a fallback to the one before.

A run's folder holds `checkpoint.pth` (the latest), `checkpoint_previous.pth` (the one before) and, where asked for,
numbered ones (`checkpoint0010.pth`) that stay. At every moment at least one complete checkpoint exists once the first
was written: the new file is complete and on disk before any name changes. Everything loads with `weights_only=True`,
so that a checkpoint can carry no code.
"""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch

LATEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the file and says what to do."""


def save_checkpoint(state: dict, output_dir: str | Path, keep_as: str | None = None) -> bool:
    """Make `state` the latest checkpoint of `output_dir` and the latest the previous one. Call it on rank 0 only.

    Args:
        state: nested dicts and lists of tensors and plain values.
        output_dir: the run's folder.
        keep_as: name of a further copy that later checkpoints leave alone; None = no copy.

    Returns:
        False where the disk refused (full, over quota, gone): the checkpoints from before are untouched, a warning
        says so, and the run can go on.
    """
    folder = Path(output_dir)
    aside = folder / (LATEST + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(state, aside)
        if keep_as is not None:
            copy_aside = folder / (keep_as + ".tmp")
            shutil.copyfile(aside, copy_aside)
            copy_aside.replace(folder / keep_as)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into RuntimeError.
        for leftover in folder.glob("*.pth.tmp"):
            leftover.unlink(missing_ok=True)
        kept = folder / LATEST
        warnings.warn(
            f"could not write a checkpoint to {folder} ({str(error).splitlines()[0]}); "
            + (f"{kept} from before is kept" if kept.exists() else "there is none from before"),
            stacklevel=2,
        )
        return False
    if (folder / LATEST).exists():
        (folder / LATEST).replace(folder / PREVIOUS)
    aside.replace(folder / LATEST)
    sync_folder(folder)
    return True


def write_synced(state: dict, path: Path) -> None:
    """Write `state` to `path` and wait until the disk has it."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names too (a rename alone may be lost in a power cut)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: str | Path, kind: str | None = None) -> dict:
    """Read one checkpoint onto the CPU, with `weights_only=True`.

    Args:
        path: the file.
        kind: what its "kind" entry must be, for example "alice"; None = any file that holds a dict.

    Raises:
        CheckpointError: missing, truncated, corrupt, holding objects that only code can rebuild, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected the dict that main_ddp.py writes")
    if kind is not None and state.get("kind") != kind:
        found = f"kind {state['kind']!r}" if "kind" in state else f"keys {', '.join(map(str, list(state)[:5]))} ..."
        raise CheckpointError(f"{path}: not a checkpoint of kind {kind!r} (found {found})")
    return state


def unreadable(path: Path, error: Exception) -> str:
    """Tell a file with foreign objects apart from one that is merely broken."""
    text = str(error)
    if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
        return (
            f"{path}: holds pickled Python objects besides tensors, which could run code, and is not loaded; "
            "save its tensors alone (a dict of tensors) in the environment that made it"
        )
    return f"{path}: not a complete checkpoint ({first_line(error)})"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def find_resumable(output_dir: str | Path, kind: str) -> tuple[dict, Path] | None:
    """The newest readable checkpoint of a run's folder: the latest, else (with a warning) the one before.

    Returns:
        (state, path), or None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    candidates = [path for name in (LATEST, PREVIOUS) if (path := Path(output_dir) / name).exists()]
    problems = []
    for path in candidates:
        try:
            return load_checkpoint(path, kind), path
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
    if problems:
        raise CheckpointError(
            "no checkpoint of this run can be read: " + "; ".join(problems) + ". Start over with --resume none"
        )
    return None


def load_strictly(module: torch.nn.Module, state_dict: dict, what: str, path: str | Path) -> None:
    """`load_state_dict(strict=True)` whose error names the file and lists a few keys of each sort.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    if missing or unexpected or misshapen:
        lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        told = "; ".join(f"{len(keys)} {name} ({', '.join(keys[:3])})" for name, keys in lists.items() if keys)
        raise CheckpointError(
            f"{path}: its {what} does not fit the model that the flags describe: {told}. "
            "Check --backbone, --feature_size, the head flags and --casa_variant"
        )
    module.load_state_dict(state_dict, strict=True)
