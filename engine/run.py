"""Everything of a run that changes while it trains, and how it becomes a checkpoint and comes back.

The checkpoint's layout (see also engine/checkpoint.py):
    kind: the method's name · one state dict for each of the method's parts (student, teacher, ...) · optimizer, scaler
    step, epoch · random: {"seed", "rule"} · flags, commit, versions · effective_batch, steps_per_epoch
    data: digests of what samples are cut from · preprocessing, backbone: what a user of the weights must know
No random state is stored: torch's is set from (seed, step, rank) before each step, and data are a function of
(seed, sample index).
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.checkpoint import CheckpointError, load_checkpoint, load_strictly, require, require_types
from engine.optim import load_optimizer
from models.methods import METHODS, Method

# Flags that may differ between a run and its continuation without changing what is trained. Files are compared by
# their content, see `warn_of_changed_data`.
FREE_FLAGS = {
    *("data_dir", "json_list", "embed_dir", "table_file", "store_dir", "output_dir", "checkpoint_file", "resume"),
    *("saveckp_freq", "keep_freq", "val_freq", "num_val_pairs", "picture_freq", "log_freq", "nan_policy"),
    *("probe_freq", "probe_json_list", "probe_voxels", "probe_cases"),
    *("num_workers", "device", "dist_timeout_min", "use_checkpoint", "compile", "channels_last", "cudnn_benchmark"),
}


# What a run needs to go on, and what else it reads of a checkpoint
STATE_TYPES = {"optimizer": dict, "scaler": dict, "step": int}
DESCRIPTION_TYPES = {"flags": dict, "data": dict, "effective_batch": int, "steps_per_epoch": int}


@dataclass
class RunState:
    """The method (not wrapped by DDP), optimiser, scaler, the number of steps done, and a description in plain values.

    `description["kind"]` is the method's name.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    description: dict = field(default_factory=dict)
    step: int = 0

    def as_checkpoint(self, steps_per_epoch: int) -> dict:
        """The checkpoint of this moment: tensors and plain values only."""
        return {
            **{name: part.state_dict() for name, part in self.method.named_children()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.step // steps_per_epoch,
            **self.description,
        }

    def restore(self, state: dict, path: str | Path) -> None:
        """Go on where `state` was written.

        Raises:
            CheckpointError: it belongs to another model, or to a run that this one cannot continue.
        """
        parts = dict(self.method.named_children())
        require(state, [*parts, *STATE_TYPES], path, f"a checkpoint of --method {self.description.get('kind', '')}")
        require_types(state, dict.fromkeys(parts, dict) | STATE_TYPES | DESCRIPTION_TYPES, path)
        if state["step"] < 0:
            raise CheckpointError(f"{path}: its step is {state['step']}, expected 0 or more; the file is damaged")
        for name, part in parts.items():
            load_strictly(part, state[name], name, path)
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{path}: its optimiser state does not fit this run ({error})") from error
        self.step = state["step"]
        warn_of_changed_flags(state.get("flags", {}), self.description.get("flags", {}), path)
        warn_of_changed_steps(state, self.description, path)
        warn_of_changed_data(state, self.description, path)


def load_pretraining(path: str | Path) -> dict:
    """A checkpoint of pretraining, by whatever method.

    Raises:
        CheckpointError: unreadable, or of another kind (finetuning, SAM).
    """
    return load_checkpoint(path, METHODS)


def warn_of_changed_flags(before: dict, now: dict, path: str) -> None:
    """Say which flags differ from those that the checkpoint was trained with."""
    changed = [line for name, line in changed_flags(before, now).items() if name not in FREE_FLAGS]
    if changed:
        warnings.warn(f"{path} was trained with other flags: {', '.join(changed)}", stacklevel=2)


def changed_flags(before: dict, now: dict) -> dict[str, str]:
    """Flags that differ, each with both values for people; a flag that only one side knows counts for nothing."""
    names = sorted(before.keys() & now.keys())
    return {name: f"--{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name]}


# What decides the content of "data" in a checkpoint
FLAGS_OF_DATA = {
    "cases": "other cases (--json_list, --data_dir, --store_dir)",
    "table": "another correspondence table (--table_file, --embed_dir)",
    "anatomy": "embeddings of another SAM (--embed_dir)",
}


def warn_of_changed_data(before: dict, now: dict, path: str | Path) -> None:
    """Say when samples are cut from other data: sample i is then another one, as when a corpus has grown.

    Args:
        before, now: descriptions; older checkpoints have no "data".
    """
    old, new = before.get("data", {}), now.get("data", {})
    changed = [text for name, text in FLAGS_OF_DATA.items() if name in old and old[name] != new.get(name)]
    if not changed:
        return
    counts = [side.get("num_training_cases") for side in (before, now)]
    warnings.warn(
        f"{path} was trained on {' and '.join(changed)}: {counts[0]} cases then, {counts[1]} now. The run goes on with "
        "the new data; it does not end where it would have ended with those of before",
        stacklevel=3,
    )


def warn_of_changed_steps(before: dict, now: dict, path: str) -> None:
    """Say when a step or an epoch is no longer what it was (another number of processes), and how to have it back.

    Args:
        before, now: descriptions; `effective_batch` and `steps_per_epoch` are compared where both have them (older
            checkpoints do not).
    """
    names = ("effective_batch", "steps_per_epoch")
    if not all(name in values for name in names for values in (before, now)):
        return
    (batch, steps), (batch_now, steps_now) = ([values[name] for name in names] for values in (before, now))
    if (batch, steps) == (batch_now, steps_now):
        return
    flags = now["flags"]
    num_processes = batch_now // (flags["batch_size"] * flags["accumulate_steps"])
    if batch % num_processes:
        cure = f"a number of processes that divides {batch}, and --steps_per_epoch {steps}"
    else:
        share = batch // num_processes
        size = max(n for n in range(1, min(share, flags["batch_size"]) + 1) if share % n == 0)  # fits into memory
        cure = f"--batch_size {size} --accumulate_steps {share // size} --steps_per_epoch {steps}"
    warnings.warn(
        f"{path} was trained with an effective batch of {batch} and {steps} steps an epoch; this run has {batch_now} "
        f"and {steps_now}, so that its schedules and its length are other ones. To go on as before: {cure}",
        stacklevel=3,
    )
