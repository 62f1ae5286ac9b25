"""Process groups: who am I, which device is mine, and the few collectives that the loop needs.

The same program runs under `python` (one process, no group) and under `torchrun` (one process per device). Every
collective here tolerates a missing group and then returns what one process alone would get. Only this module and the
losses' own reductions touch `torch.distributed`.
"""

import contextlib
import inspect
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from engine.device import keep_freed_memory, make_cpu_repeatable, pick_device
from engine.signals import stop_with_torchrun

LONG_WAIT = timedelta(days=2)
# What gloo says of a rank that is gone or late; its errors have no class of their own.
GLOO_LOST = re.compile("gloo|connection (closed|reset) by peer|timed out waiting|broken pipe", re.IGNORECASE)


class LostRankError(ValueError):
    """Another rank is gone, or did not come in time."""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its rank on this machine, the number of processes, and its device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0


def planned_size() -> int:
    """The number of processes that torchrun's environment announces, before any group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(wanted_device: str = "auto", timeout_min: float = 30.0) -> World:
    """Join the process group that torchrun's environment describes, or stand alone without one.

    The backend follows the device: nccl on CUDA, gloo on CPU. A failed start raises; no rank carries on alone.

    Args:
        wanted_device: auto, cpu or cuda.
        timeout_min: minutes after which a collective that other ranks never join raises.
    """
    stop_with_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = planned_size()
    rank = int(os.environ.get("RANK", 0))
    device = pick_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        make_cpu_repeatable()
        keep_freed_memory()
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_min)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store_of_this_start(rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    elif size > 1 and not dist.is_initialized():
        raise ValueError("WORLD_SIZE is set without RANK and MASTER_ADDR; start several processes with torchrun")
    return World(rank, local_rank, size, device)


def store_of_this_start(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store through which ranks find each other, without what a start before this one left in it.

    After a restart (`--max-restarts`) torchrun's store still holds the addresses of the processes that are gone, and a
    quick rank would call those. The ranks of one start therefore agree on a name that none had before: each asks under
    a name of its own, rank 0 answers all it finds, old ones too, until every rank of this start has heard it.
    (torchrun's count of restarts will not do: it differs between nodes.)
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store  # made by rank 0 of this start
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        store.wait([f"answer/{own}"], timeout)
        start_name = store.get(f"answer/{own}").decode()
        store.set(f"heard/{start_name}/{rank}", "")
        return dist.PrefixStore(start_name, store)
    missing, ends = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"heard/{own}/{other}"])}
        if time.monotonic() > ends:
            raise TimeoutError(f"ranks {sorted(missing)} did not start within {timeout} (--dist_timeout_min)")
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def has_group() -> bool:
    """Whether several processes (or a group of one) work together."""
    return dist.is_available() and dist.is_initialized()


def wrap(module: nn.Module, world: World, reduce_in_bf16: bool = False) -> nn.Module:
    """DDP around a module where there is a process group, else the module itself.

    DDP reads `requires_grad` once: wrap again after freezing or unfreezing parameters. Buffers are not synchronised.

    Args:
        reduce_in_bf16: ranks send their gradients rounded to bfloat16, half of the bytes.
    """
    if not has_group():
        return module
    # Newer PyTorch calls the switch for buffers by another name.
    names = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **{switch: False})
    if reduce_in_bf16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def wait_for_all(world: World) -> None:
    """Ranks wait here for the last one, however long its work takes (the usual timeout does not apply).

    They meet in the store through which they found each other: no backend has to work but the run's own.
    """
    if not has_group() or world.size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    num_arrived = store.add("waits/arrived", 1)  # of all waits so far; nobody begins the next before the last one came
    door = f"waits/{(num_arrived - 1) // world.size}"
    if num_arrived % world.size == 0:
        store.set(door, "open")
    store.wait([door], LONG_WAIT)


def leave_together(world: World) -> None:
    """Ranks whose work is done wait here for the last one: launchers end the others when the first one leaves.

    Where torchrun is gone, the store that ranks meet through went with it, and nobody ends the others.
    """
    with contextlib.suppress(dist.DistNetworkError):
        wait_for_all(world)


@contextlib.contextmanager
def explained_lost_rank(world: World, timeout_min: float) -> Iterator[None]:
    """Inside the block, an exchange that another rank left or never joined ends in one line, not in a traceback.

    Args:
        timeout_min: of `start`.

    Raises:
        LostRankError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_group() or not (isinstance(error, dist.DistError) or GLOO_LOST.search(str(error))):
            raise
        reason = str(error).splitlines()[0][:300]
        raise LostRankError(
            f"rank {world.rank} waited for another rank in vain ({reason}). What that rank printed last says why; if "
            f"it was only late, raise --dist_timeout_min {timeout_min:g}. Then start the same command again"
        ) from error


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Largest of each element over all ranks; works in place on `values` (any shape, same on every rank)."""
    if has_group():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of each element over all ranks; works in place on `values` (any shape, same on every rank)."""
    if has_group():
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        values /= dist.get_world_size()
    return values


def gather_objects(value: object) -> list:
    """One picklable value of every rank, in rank order, on every rank. For rare events: it pickles."""
    if not has_group():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def main_decides(world: World, decide: Callable[[], object]) -> object:
    """What `decide()` returns on rank 0 (a picklable value), on every rank; a ValueError is raised on all of them."""
    if not has_group():
        return decide()
    answer: list = [None, None]
    if world.is_main:
        try:
            answer[0] = decide()
        except ValueError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def was_restarted() -> bool:
    """Whether Slurm or torchrun has started this run before.

    One rank that knows is enough, and all agree: torchrun's count differs between nodes.
    """
    counts = [os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    return any(gather_objects(any(count not in ("", "0") for count in counts)))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's random numbers a function of (seed, step, rank): a resumed run draws what it would have drawn.

    With it no random state has to be stored, and a run can go on with another number of ranks.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)
