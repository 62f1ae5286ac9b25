"""The data loader of paired crops: one endless, resumable stream of batches, from worker processes with manners."""

import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def make_pair_loader(
    dataset: Dataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    accumulation: int = 1,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> DataLoader:
    """A loader whose batches depend on the dataset's seed, the step and the rank alone, whatever the number of workers.

    Iterate it once for the whole run: there is no epoch at which workers would start anew.

    Args:
        dataset: gives a dict of tensors for any index from 0 on (`CropDataset`).
        batch_size: samples per rank and micro-batch.
        rank, world_size: this process among all.
        num_workers: loading processes (0 = load in this process).
        start_step: first optimiser step to deliver (a resumed run's next step).
        num_steps: optimiser steps of the whole run counted from step 0 (None = without an end).
        accumulation: micro-batches per optimiser step.
        pin_memory: page-locked batches, for CUDA.
        prefetch_factor: batches that each worker prepares ahead; a cut sample of two crops of
            96^3 voxels takes 3.6 MB of /dev/shm.
    """
    return ShelteredLoader(
        dataset,
        batch_sampler=StepSampler(batch_size, rank, world_size, num_steps, start_step, accumulation),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
        worker_init_fn=_set_up_worker if num_workers > 0 else None,
    )


class ShelteredLoader(DataLoader):
    """A loader whose workers are born with the launcher's signals blocked, until they know what to do with them.

    Workers inherit what is blocked. Otherwise a signal to the whole process group that arrives between a worker's birth
    and `_set_up_worker` kills it, and the training process with it, before it has written its checkpoint.
    """

    def __iter__(self):
        if self.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_up_worker(worker_id: int) -> None:
    """One thread per worker (more would fight with the other workers), and no dying before the training process.

    What job managers and terminals send to the whole process group is ignored. Otherwise a worker dies of Slurm's
    SIGTERM or SIGUSR1, or of Ctrl-C, while the training process still needs batches to reach its checkpoint. SIGTERM
    from the parent itself still ends the worker: that is how PyTorch stops stuck ones.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows cannot tell who sent a signal
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


# Which samples a rank sees at which step: a rule of (step, rank) alone, so that a run can stop and go on anywhere.
#
# Sample i of the paired-crop dataset is a pure function of (seed, i). Giving step s of rank r the indices
# `s * B * W + r * B + j` (B = batch size per rank, W = world size) makes the joined batch of all ranks equal to the
# batch of one process with batch B * W; resuming is a matter of the first step alone, at any world size with the same
# joined batch.


class StepSampler(Sampler[list[int]]):
    """Yields one list of global sample indices per micro-batch; use it as a DataLoader's `batch_sampler`.

    With gradient accumulation A, one optimiser step takes A micro-batches in a row, and micro-batch a of step s counts
    as step s * A + a of the rule above, so that accumulating A batches of B equals one batch of A * B.

    Args:
        batch_size: samples per rank and micro-batch.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes.
        num_steps: optimiser steps of the whole run, counted from step 0; None = never ends.
        start_step: first optimiser step to yield (a resumed run's next step).
        accumulation: micro-batches per optimiser step (1 = off).
    """

    def __init__(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_steps: int | None = None,
        start_step: int = 0,
        accumulation: int = 1,
    ) -> None:
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"--batch_size {batch_size} and --accumulation {accumulation} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in a world of {world_size} processes")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}, expected 0 or more")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_steps = num_steps
        self.start_step = start_step
        self.accumulation = accumulation

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start_step * self.accumulation
        while self.num_steps is None or micro < self.num_steps * self.accumulation:
            first = (micro * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            micro += 1

    def __len__(self) -> int:
        """Micro-batches that are left; a sampler without an end has no length."""
        if self.num_steps is None:
            raise TypeError("this sampler never ends")
        return max(self.num_steps - self.start_step, 0) * self.accumulation
