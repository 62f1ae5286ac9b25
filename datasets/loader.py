"""The data loader of paired crops: one endless, resumable stream of batches, from worker processes with manners."""

import os
import signal
import threading

import torch
from torch.utils.data import DataLoader, Dataset

from datasets.sampler import StepSampler


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
        dataset: gives a dict of tensors for any index from 0 on (`PairedCropDataset`).
        batch_size: samples per rank and micro-batch.
        rank, world_size: this process among all.
        num_workers: loading processes (0 = load in this process).
        start_step: first optimiser step to deliver (a resumed run's next step).
        num_steps: optimiser steps of the whole run counted from step 0 (None = without an end).
        accumulation: micro-batches per optimiser step.
        pin_memory: page-locked batches, for CUDA.
        prefetch_factor: batches that each worker prepares ahead; a sample of 96^3 voxels takes 21 MB of /dev/shm.
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
    """One thread per worker (more would fight with the other workers), and no dying before the training process."""
    torch.set_num_threads(1)
    _leave_signals_to_parent()


def _leave_signals_to_parent() -> None:
    """Ignore what job managers and terminals send to the whole process group; the training process ends its workers.

    Otherwise a worker dies of Slurm's SIGTERM or SIGUSR1, or of Ctrl-C, while the training process still needs batches
    to reach its checkpoint. SIGTERM from the parent itself still ends the worker: that is how PyTorch stops stuck ones.
    """
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
