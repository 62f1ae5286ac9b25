"""Checkpoints are written while training goes on: a thread writes a copy of the state, one checkpoint at a time.

A checkpoint of the default networks is 1.1 GB and takes seconds to write, as long as many steps on a GPU.
"""

import copy
import threading
from pathlib import Path

import torch

from engine.checkpoint import save_checkpoint


class BackgroundSaver:
    """`save_checkpoint` for one folder, from a thread. Use it on rank 0 only.

    The program's end waits for the thread, so that a run which fails later still leaves a complete checkpoint.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = output_dir
        self.thread: threading.Thread | None = None
        self.is_saved = True

    def save(self, state: dict, keep_as: str | None = None) -> None:
        """Begin to write the state as it is now; waits for the checkpoint before it. Arguments as `save_checkpoint`."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(copied_to_cpu(state), keep_as), name="checkpoint")
        self.thread.start()

    def wait(self) -> bool:
        """Wait until nothing is being written; whether the last checkpoint was written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return self.is_saved

    def _write(self, state: dict, keep_as: str | None) -> None:
        self.is_saved = False
        self.is_saved = save_checkpoint(state, self.output_dir, keep_as)


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
