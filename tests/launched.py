"""Runs of main_ddp.py in processes of their own, small and quick to start: for tests that kill and signal them."""

import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import LATEST
from tests.tiny_run import arguments

# The smallest network and crop that go through every part: about 0.1 s a step, 3 MB a checkpoint.
SMALLEST = {
    **{"backbone": "unet", "feature_size": 6, "roi_z": 32, "roi_y": 32, "roi_x": 16, "head_hidden_dim": 32},
    **{"head_bottleneck_dim": 8, "epochs": 4, "steps_per_epoch": 2},
}
WEIGHTS = ("student", "teacher", "loss", "optimizer")


def smallest(corpus: Path, output_dir: Path, **changed) -> list[str]:
    """The command line of the smallest run: 4 epochs of 2 steps."""
    return arguments(corpus, output_dir, **(SMALLEST | changed))


@functools.cache
def forkserver():
    """Starts processes that have imported main_ddp.py already: a restart takes a moment instead of its imports."""
    context = multiprocessing.get_context("forkserver")
    backbones = [f"models.backbones.{name}" for name in ("swin_unetr", "unet")]  # which runs import late
    context.set_forkserver_preload(["main_ddp", "tests.launched", "torch.utils.tensorboard", *backbones])
    return context


def run_ranks(function: Callable[..., None], args: tuple = (), num_ranks: int = 2) -> None:
    """`function(rank, *args)` in a process for each rank, to its end; an error there is raised here."""
    forkserver()
    torch.multiprocessing.start_processes(function, args, num_ranks, start_method="forkserver")


def start(argv: list[str], told: Path, prepare: Callable[[], None] | None = None, **environment: str):
    """`python main_ddp.py ARGV` in another process, with one thread.

    Args:
        argv: the command line.
        told: file that its output is added to.
        prepare: called there before the run starts; a function of a module, or a `functools.partial` of one.
        environment: variables to set there.
    """
    process = forkserver().Process(target=run_here, args=(argv, str(told), prepare, environment))
    process.start()
    return process


def run_here(argv: list[str], told: str, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    """What runs in the other process."""
    import main_ddp
    from engine.flags import run_main
    from engine.signals import stop_early_when_asked

    handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    os.environ |= environment
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    stop_early_when_asked()
    run_main(lambda: main_ddp.main(argv))


def two_ranks(argv: list[str], told: Path, prepare: Callable[[], None] | None = None) -> list[int]:
    """The run on two ranks, to its end; returns their exit codes."""
    ranks = start_two_ranks(argv, told, prepare)
    for process in ranks:
        process.join(300)
    return [process.exitcode for process in ranks]


def start_two_ranks(argv: list[str], told: Path, prepare: Callable[[], None] | None = None) -> list:
    """The two processes of a run on two ranks."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(argv, told, prepare, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], object], timeout_s: float = 300.0):
    """The first true value of `condition()`, which may raise FileNotFoundError until then."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        try:
            if value := condition():
                return value
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise TimeoutError(f"not within {timeout_s:g} s")


def assert_same_weights(one: Path, other: Path) -> None:
    """Two runs' latest checkpoints are the same, bit for bit, but for the flags that they were started with."""
    ours, theirs = (torch.load(folder / LATEST, weights_only=True) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for part in ours.keys() - {"flags"}:
        flat_ours, flat_theirs = flat(ours[part]), flat(theirs[part])
        assert flat_ours.keys() == flat_theirs.keys()
        for name, value in flat_ours.items():
            same = torch.equal(value, flat_theirs[name]) if torch.is_tensor(value) else value == flat_theirs[name]
            assert same, f"{part}{name} differs"


def flat(state, prefix: str = "") -> dict:
    """Nested dicts and lists -> {dotted name: leaf}."""
    if not isinstance(state, dict | list):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}.{key}").items()}


# What happens to a run: each is called in its process, before it starts


def die_at_save(number: int, moment: str) -> None:
    """SIGKILL at the process's save `number` (from 1), at a moment: "writing" (half of the new file is written),
    "written" (whole, under its name aside), "between" (the old one is renamed, the new one not yet) or "renamed"."""
    import engine.checkpoint as ck

    write, replace, counted = ck.write_synced, Path.replace, []

    def write_and_die(state: dict, path: Path) -> None:
        counted.append(path)
        write(state, path)
        if len(counted) == number and moment == "writing":
            os.truncate(path, path.stat().st_size // 2)
        if len(counted) == number and moment in ("writing", "written"):
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_die(self: Path, target: Path) -> Path:
        done = replace(self, target)
        if len(counted) == number and Path(target).name == {"between": ck.PREVIOUS, "renamed": LATEST}.get(moment):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    ck.write_synced, Path.replace = write_and_die, replace_and_die


def write_slowly(seconds: float) -> None:
    """Checkpoints take this long to write, in 20 pieces, so that a kill at random falls into one often."""
    import engine.checkpoint as ck

    write = ck.write_synced

    def write_in_pieces(state: dict, path: Path) -> None:
        write(state, path)
        content = path.read_bytes()
        with path.open("wb") as file:
            for piece in range(20):
                file.write(content[len(content) * piece // 20 : len(content) * (piece + 1) // 20])
                file.flush()
                time.sleep(seconds / 20)

    ck.write_synced = write_in_pieces


def signal_at_step_and_write_slowly(step: int, seconds: float) -> None:
    """An interruption whose checkpoint takes a while."""
    signal_at_step(step)
    write_slowly(seconds)


def signal_at_step(step: int, number: int = signal.SIGTERM) -> None:
    """The process signals itself at the start of a step."""
    import engine.loop

    plain = engine.loop.seed_step

    def seed_and_signal(seed: int, now: int, rank: int) -> None:
        plain(seed, now, rank)
        if now == step:
            os.kill(os.getpid(), number)

    engine.loop.seed_step = seed_and_signal


def poison_sample(index: int) -> None:
    """The reconstruction target of one sample holds a NaN."""
    from datasets.samples.dataset import CropDataset

    plain = CropDataset.cut

    def poisoned(self: CropDataset, now: int) -> dict:
        sample = plain(self, now)
        if now == index:
            sample["draws"]["window"] *= float("nan")
        return sample

    CropDataset.cut = poisoned
