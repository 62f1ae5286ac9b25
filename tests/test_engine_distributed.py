"""Process groups and what they set up: a CPU run repeats itself."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine import distributed
from tests.launched import free_port, run_ranks


def gradient_of_gathering() -> torch.Tensor:
    """The gradient of a small table that many rows are gathered from, as with relative position biases."""
    torch.manual_seed(0)
    table = torch.randn(50, 3, requires_grad=True)
    rows = torch.randint(0, 50, (200_000,))
    (table[rows] * torch.randn(200_000, 3)).sum().backward()
    return table.grad


def test_gathering_repeats_exactly_on_the_cpu():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        world = distributed.start("cpu")
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.are_deterministic_algorithms_enabled()
        first = gradient_of_gathering()
        assert all(torch.equal(first, gradient_of_gathering()) for _ in range(10))
    finally:
        distributed.stop()
        torch.use_deterministic_algorithms(before)


def test_every_step_of_every_rank_and_seed_draws_its_own_numbers_again():
    def drawn(*place: int) -> tuple[float, ...]:
        distributed.seed_step(*place)
        return tuple(torch.rand(3).tolist())

    places = list(itertools.product((0, 1), (0, 1, 2), (0, 1)))  # seed, step, rank
    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [drawn(*place) for place in places] == first


@pytest.fixture
def agent_store(monkeypatch):
    """The store that torchrun keeps over restarts of its workers."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def start_three(order: list[int]) -> dict[int, dist.Store]:
    with ThreadPoolExecutor(3) as pool:
        waiting = {r: pool.submit(distributed.store_of_this_start, r, 3, timedelta(seconds=60)) for r in order}
        return {rank: future.result() for rank, future in waiting.items()}


def test_a_restarted_rank_never_meets_what_the_start_before_left_behind(agent_store):
    seen = []
    for attempt, order in enumerate(([0, 1, 2], [2, 1, 0], [0, 2, 1])):
        stores = start_three(order)
        assert not any(stores[rank].check(["address"]) for rank in order)
        stores[1].set("address", f"of start {attempt}")
        seen.append([stores[rank].get("address").decode() for rank in order])
    assert seen == [[f"of start {attempt}"] * 3 for attempt in range(3)]


def test_a_rank_that_never_starts_is_named(agent_store):
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not start within .*--dist_timeout_min"):
        distributed.store_of_this_start(0, 3, timedelta(seconds=0.1))


def in_a_group(rank: int, port: int, act, *arguments) -> None:
    """`act(world, *arguments)` as one of two ranks."""
    described = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= described | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.start("cpu")
    act(world, *arguments)
    distributed.leave_together(world)
    distributed.stop()


def wait_three_times(world: distributed.World, folder: Path) -> None:
    dist.new_group = dist.barrier = None  # no other backend is asked for
    for number in range(3):
        time.sleep(0.3 * (number % 2 == world.rank))
        (folder / f"{number}_{world.rank}").touch()
        distributed.wait_for_all(world)
        assert (folder / f"{number}_{1 - world.rank}").exists()


def test_ranks_wait_for_the_last_one_again_and_again(tmp_path):
    run_ranks(in_a_group, (free_port(), wait_three_times, tmp_path))


def reduce_gradients(world: distributed.World) -> None:
    found = []
    for in_bf16 in (False, True):
        torch.manual_seed(0)
        module = distributed.wrap(nn.Linear(5, 3), world, in_bf16)
        module(torch.randn(4, 5, generator=torch.Generator().manual_seed(world.rank))).square().sum().backward()
        found.append(module.module.weight.grad.clone())
        both = [torch.empty_like(found[-1]) for _ in range(2)]
        dist.all_gather(both, found[-1])
        assert torch.equal(*both)
    exact, rounded = found
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, exact.bfloat16().float())


def test_gradients_are_exchanged_in_bf16_where_asked_for():
    run_ranks(in_a_group, (free_port(), reduce_gradients))


@pytest.mark.parametrize(
    ("counts", "expected"), [((None, None), False), (("0", "0"), False), (("1", None), True), (("0", "2"), True)]
)
def test_restarts_by_slurm_and_torchrun_are_known(monkeypatch, counts, expected):
    for name, count in zip(("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"), counts):
        monkeypatch.delenv(name, raising=False)
        if count is not None:
            monkeypatch.setenv(name, count)
    assert distributed.was_restarted() is expected
