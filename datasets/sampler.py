"""Which samples a rank sees at which step: a rule of (step, rank) alone, so that a run can stop and go on anywhere.

Sample i of the paired-crop dataset is a pure function of (seed, i). Giving step s of rank r the indices
`s * B * W + r * B + j` (B = batch size per rank, W = world size) makes the joined batch of all ranks equal to the batch
of one process with batch B * W; resuming is a matter of the first step alone, at any world size with the same joined
batch.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler


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
