"""Checkpoints: tensors and plain values only, written aside and renamed, with a fallback to the one before.

A run's folder holds `checkpoint.pth` (the latest), `checkpoint_previous.pth` (the one before) and, where asked for,
numbered ones (`checkpoint0010.pth`) that stay. At every moment at least one complete checkpoint exists once the first
was written: the new file is complete and on disk before any name changes, and a damaged one that a resumed run met is
set aside as `checkpoint.pth.damaged`, so that it does not push the good one out. A new run in an old run's folder sets
the old one's files aside as `<name>.before`, those of a further run as `<name>.before2`. Everything loads with
`weights_only=True`, so that a checkpoint can carry no code, and with the checksums of its parts compared, which
`torch.load` does not do.
"""

import contextlib
import copy
import itertools
import os
import shutil
import textwrap
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from engine.distributed import World, main_decides, was_restarted
from models.hub import local_weights
from models.weights_file import WeightsError, check_finite, first_line, read_plain, read_weights_file

LATEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
DAMAGED = LATEST + ".damaged"
# What a run writes into its folder, and the next one would replace or go on with (patterns of `Path.glob`).
OF_ONE_RUN = ("checkpoint*.pth", DAMAGED, "best.pth", "log.txt", "run.json", "tensorboard", "evaluation")


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
        if (folder / LATEST).exists():
            (folder / LATEST).replace(folder / PREVIOUS)
        aside.replace(folder / LATEST)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            for leftover in folder.glob("*.pth.tmp"):
                leftover.unlink(missing_ok=True)
        kept = [path for name in (LATEST, PREVIOUS) if (path := folder / name).exists()]
        warnings.warn(
            f"could not write a checkpoint to {folder} ({first_line(error)}); "
            + (f"{kept[0]} from before is kept" if kept else "there is none from before"),
            stacklevel=2,
        )
        return False
    return True


def write_synced(state: dict, path: Path) -> None:
    """Write `state` to `path` and wait until the disk has it."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's zip writer hides why it could not write
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names too (a rename alone may be lost in a power cut)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: str | Path, kinds: str | Collection[str] | None = None) -> dict:
    """Read one checkpoint onto the CPU, with `weights_only=True`.

    Args:
        path: the file, or `hf://owner/name` (see `models.hub`). A .safetensors is a finetuned network as
            scripts/push_to_hub.py writes it.
        kinds: what its "kind" entry must be, one word or several to choose from; None = any file that holds a dict.

    Raises:
        CheckpointError: missing, truncated, corrupt, holding objects that only code can rebuild, or of another kind.
    """
    path = local_weights(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        state = published_state(path) if path.suffix == ".safetensors" else read_plain(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    wanted, kind = (kinds,) if isinstance(kinds, str) else kinds, state.get("kind")
    if wanted is not None and not (isinstance(kind, str) and kind in wanted):
        found = f"kind {state['kind']!r}" if "kind" in state else f"keys {', '.join(map(str, list(state)[:5]))} ..."
        raise CheckpointError(f"{path}: not a checkpoint of kind {' or '.join(map(repr, wanted))} (found {found})")
    return state


def published_state(path: Path) -> dict:
    """The checkpoint that a .safetensors stands for: what its header says, and its tensors under "model"."""
    file = read_weights_file(path)
    return file.description | {"model": file.tensors}


def require(state: dict, names: Collection[str], path: str | Path, expected: str) -> None:
    """Check that a checkpoint has the entries `names`.

    Args:
        expected: which file has them, for the message.

    Raises:
        CheckpointError: naming those that are missing.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"{path}: holds no {', '.join(map(repr, missing))}; expected {expected}")


def require_types(state: dict, types: dict[str, type], path: str | Path) -> None:
    """Check the types of a checkpoint's entries; those that it lacks are left to `require`.

    Raises:
        CheckpointError: naming one of another type.
    """
    for name, wanted in types.items():
        if name in state and type(state[name]) is not wanted and not (wanted is dict and isinstance(state[name], dict)):
            received = textwrap.shorten(repr(state[name]), 80)
            raise CheckpointError(f"{path}: its {name} is {received}, expected {wanted.__name__}; the file is damaged")


def find_resumable(output_dir: str | Path, kind: str) -> tuple[dict, Path] | None:
    """The newest readable checkpoint of a run's folder: the latest, else (with a warning) the one before.

    Where the one before is used, the damaged latest is renamed to `DAMAGED`. Call it on rank 0 only.

    Returns:
        (state, path), or None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    candidates = [path for name in (LATEST, PREVIOUS) if (path := Path(output_dir) / name).exists()]
    problems = []
    for path in candidates:
        try:
            state = load_checkpoint(path, kind)
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
            continue
        if problems:
            with contextlib.suppress(OSError):
                (Path(output_dir) / LATEST).replace(Path(output_dir) / DAMAGED)
        return state, path
    if problems:
        raise CheckpointError(
            "no checkpoint of this run can be read: " + "; ".join(problems) + ". Start over with --resume none"
        )
    return None


def find_wanted(resume: str, output_dir: str | Path, kind: str, world: World) -> tuple[dict, Path] | None:
    """The checkpoint that a run with `--resume` goes on from and its path; None to begin anew.

    Rank 0 chooses for all ranks, so that no two of them go on from different steps.

    Args:
        resume: "auto" = the folder's own; "none" = none, until Slurm or torchrun restarts the run; or a file, until the
            folder has a checkpoint that is further. A restarted run has the words of its first start.

    Raises:
        CheckpointError: the file of `resume`, or without one any of the folder's, cannot be read; or a rank cannot read
            the file that rank 0 chose.
    """
    if resume == "none" and not was_restarted():
        return None
    found = []

    def choose() -> str | None:
        given = None if resume in ("auto", "none") else (load_checkpoint(resume, kind), Path(resume))
        try:
            own = find_resumable(output_dir, kind)
        except CheckpointError:
            if given is None:  # else it is the way out
                raise
            own = None
        is_own_further = given is None or (own is not None and own[0]["step"] > given[0]["step"])
        found.append(own if is_own_further else given)
        return None if found[0] is None else str(found[0][1])

    path = main_decides(world, choose)
    if found or path is None:
        return found[0] if found else None
    try:
        return load_checkpoint(path, kind), Path(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"rank {world.rank} cannot read what rank 0 resumes from: {error}. Every node needs --output_dir, and the "
            "file of --resume, on a disk that all of them see"
        ) from error


def describe_resumed(resume: str, found: tuple[dict, Path]) -> str:
    """One line about what `find_wanted` found."""
    message = f"resumed at step {found[0]['step']} from {found[1]}"
    if resume == "none":
        return message + ": the job was restarted, --resume none held for its first start"
    if resume != "auto" and found[1] != Path(resume):
        return message + f", which is further than --resume {resume}"
    return message


def set_aside(output_dir: str | Path) -> None:
    """Rename the files of an old run to `<name>.before`, so that a new one starts in a clean folder. On rank 0 only.

    Where files have been set aside before, the ending is `.before2`, `.before3`, ...: the same for all files of a run.
    """
    folder = Path(output_dir)
    old = [path for pattern in OF_ONE_RUN for path in folder.glob(pattern)]
    endings = (f".before{number if number > 1 else ''}" for number in itertools.count(1))
    ending = next(ending for ending in endings if not any(folder.glob("*" + ending)))
    for path in old:
        path.rename(path.with_name(path.name + ending))


def load_strictly(module: torch.nn.Module, state_dict: dict, what: str, path: str | Path) -> None:
    """`load_state_dict(strict=True)` whose error names the file and the first keys that do not fit.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape, or values are not finite.
    """
    try:
        module.load_state_dict(state_dict, strict=True)
        check_finite({name: value for name, value in state_dict.items() if torch.is_tensor(value)}, path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its {what} does not fit the model that the flags describe: {textwrap.shorten(str(error), 600)}. "
            "Check --method, --backbone, --feature_size and the method's flags"
        ) from error


# Checkpoints are written while training goes on: a thread writes a copy of the state, one checkpoint at a time.
#
# A checkpoint of the default networks is 1.1 GB and takes seconds to write, as long as many steps on a GPU.


class BackgroundSaver:
    """`save_checkpoint` for one folder, from a thread. Use it on rank 0 only.

    The program's end waits for the thread, so that a run which fails later still leaves a complete checkpoint.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = output_dir
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.last: Future[bool] | None = None

    def save(self, state: dict, keep_as: str | None = None) -> None:
        """Begin to write the state as it is now; waits for the checkpoint before it. Arguments as `save_checkpoint`."""
        self.wait()
        self.last = self.thread.submit(save_checkpoint, copied_to_cpu(state), self.output_dir, keep_as)

    def wait(self) -> bool:
        """Wait until nothing is being written; whether the last checkpoint was written."""
        return self.last is None or self.last.result()


def copied_to_cpu(state):
    """Nested dicts, lists and tuples with a copy of every tensor in CPU memory; types and attributes stay."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        new = copy.copy(state)
        new.update({key: copied_to_cpu(value) for key, value in state.items()})
        return new
    if isinstance(state, list | tuple):
        return type(state)(copied_to_cpu(value) for value in state)
    return state
