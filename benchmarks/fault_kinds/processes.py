"""Entry points in processes of their own; they start in a moment, forked from a server that has the imports."""

import functools
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

HUNG = "hung"
PRELOADED = (
    *("main_ddp", "extract_backbone_weights", "scripts.create_json", "scripts.prepare_volumes", "scripts.mine_pairs"),
    *("scripts.generate_sam_embeddings", "scripts.import_embeddings", "scripts.train_sam", "scripts.predict"),
    *("scripts.finetune_segmentation", "scripts.make_phantom_dataset"),
    *("benchmarks.fault_kinds.processes", "torch.utils.tensorboard", "models.backbones.unet"),
)


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """Where processes come from; it starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def start(
    module: str,
    words: Sequence[str],
    output: Path,
    prepare: Callable[[], None] | None = None,
    **environment: str,
) -> BaseProcess:
    """`python -m MODULE WORDS` in another process, with one thread.

    Args:
        output: file that all it prints is added to.
        prepare: called there before the entry point; a function of a module, or a `functools.partial` of one.
        environment: variables to set there.
    """
    process = server().Process(target=_run, args=(module, list(words), str(output), prepare, environment))
    process.start()
    return process


def start_ranks(
    words: Sequence[str], output: Path, prepare: Sequence[Callable[[], None] | None] = (None, None)
) -> list[BaseProcess]:
    """`main_ddp.py WORDS` on as many ranks as `prepare` has entries."""
    shared = {"WORLD_SIZE": str(len(prepare)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start("main_ddp", words, output, ready, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, ready in enumerate(prepare)
    ]


def wait_for(processes: Sequence[BaseProcess], limit_s: float) -> list[int | str]:
    """Exit codes (-9 = by SIGKILL) once all have ended; `HUNG` for those that had to be killed after `limit_s`."""
    ends = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    hung = [process.exitcode is None for process in processes]
    for process, is_hung in zip(processes, hung):
        if is_hung:
            process.kill()
            process.join()
    return [HUNG if is_hung else process.exitcode for process, is_hung in zip(processes, hung)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(
    module: str, words: list[str], output: str, prepare: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    """What the other process does: what its `__main__` block would."""
    import torch

    from engine.flags import run_main
    from engine.signals import stop_early_when_asked

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which then ends this
    os.environ |= environment
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    stop_early_when_asked()
    sys.argv = [module, *words]
    run_main(lambda: importlib.import_module(module).main(words))
