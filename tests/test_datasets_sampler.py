"""The order of samples: a rule of step and rank, the same for any world size, accumulation, workers and restart."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from datasets.samples.loader import StepSampler, make_pair_loader


def joined(batch_size: int, world_size: int = 1, accumulation: int = 1, num_steps: int = 3, start_step: int = 0):
    """Per optimiser step the set of samples that all ranks and micro-batches see together."""
    ranks = [
        list(StepSampler(batch_size, rank, world_size, num_steps, start_step, accumulation))
        for rank in range(world_size)
    ]
    steps = []
    for step in range(num_steps - start_step):
        micro = range(step * accumulation, (step + 1) * accumulation)
        steps.append(sorted(itertools.chain(*[ranks[r][m] for m in micro for r in range(world_size)])))
    return steps


def test_one_process_two_ranks_and_accumulation_see_the_same_steps():
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert joined(4) == expected
    assert joined(2, world_size=2) == expected
    assert joined(2, accumulation=2) == expected
    assert joined(1, world_size=2, accumulation=2) == expected
    assert joined(1, world_size=4) == expected


def test_first_rank_comes_first_so_joining_ranks_in_order_gives_the_big_batch():
    big = list(StepSampler(6, num_steps=2))
    ranks = [list(StepSampler(2, rank, 3, num_steps=2)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks)] == big


def test_resume_continues_at_another_world_size():
    whole = joined(4, num_steps=5)
    assert joined(2, world_size=2, num_steps=5, start_step=3) == whole[3:]
    assert joined(1, world_size=2, accumulation=2, num_steps=5, start_step=2) == whole[2:]


def test_length_and_endlessness():
    assert len(StepSampler(2, num_steps=7, start_step=3, accumulation=2)) == 8
    assert len(StepSampler(2, num_steps=3, start_step=5)) == 0 and not list(StepSampler(2, num_steps=3, start_step=5))
    endless = iter(StepSampler(2))
    assert [next(endless) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"start_step": -1}, {"accumulation": 0}]
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        StepSampler(**({"batch_size": 2} | wrong))


class Echo(Dataset):
    """Gives back the index it is asked for, and the worker's number of threads."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index), "num_threads": torch.tensor(torch.get_num_threads())}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_loader_order_does_not_depend_on_workers(num_workers):
    loader = make_pair_loader(Echo(), 2, rank=1, world_size=2, num_workers=num_workers, start_step=2, num_steps=6)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[10, 11], [14, 15], [18, 19], [22, 23]]
    if num_workers:
        assert all((batch["num_threads"] == 1).all() for batch in batches)


# Loads batches while its workers receive what Slurm and a terminal send to a whole process group, then ends. The second
# worker is slow to learn what to do with signals, and receives them before.
UNDER_SIGNALS = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from tests.test_datasets_sampler import Echo
from datasets.samples import loader
from datasets.samples.loader import make_pair_loader
set_up_worker = loader._set_up_worker
loader._set_up_worker = lambda number: (time.sleep(number), set_up_worker(number))
signal.signal(signal.SIGTERM, lambda *a: None); signal.signal(signal.SIGUSR1, lambda *a: None)
signal.signal(signal.SIGINT, lambda *a: None)
batches = iter(make_pair_loader(Echo(), 2, num_workers=2))
next(batches)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(8): last = next(batches)
print(last["index"].tolist(), flush=True)
"""


def test_workers_survive_group_signals_and_end_with_their_parent():
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", UNDER_SIGNALS.format(root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline().strip() == "ready"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(process.pid, number)
    time.sleep(0.3)
    started = time.monotonic()
    out, _ = process.communicate("go\n", timeout=60)
    assert out.strip() == "[16, 17]" and process.returncode == 0
    assert time.monotonic() - started < 30  # the endless loader's workers ended with their parent
    # A worker that has ended still counts until whoever inherited it has noticed.
    while group_exists(process.pid):
        assert time.monotonic() - started < 60
        time.sleep(0.05)


def group_exists(group: int) -> bool:
    """Whether any process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
