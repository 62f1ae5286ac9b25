"""A run on many GPUs, rehearsed on one CPU: does it start, share its samples, follow its schedules, save and resume?

    python -m benchmarks.scale_check --num_ranks 32

main_ddp.py runs twice as rank 0 of so many, with the default recipe and everything but the networks' arithmetic: a
stand-in gives every weight a gradient, and PyTorch's process group "fake" answers every exchange at once. Samples are
loaded, DDP is built, the optimiser moves all weights, the checkpoint is written, and the second run resumes it.
What arrives over a real network is the business of the tests with two processes.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jsonargparse
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

import main_ddp
from benchmarks.data_wait import make_phantom_corpus, read_log, run_words
from benchmarks.pretrain_step import QUICK
from benchmarks.results import Rows, benchmark_parser, command, table, words
from datasets.samples.loader import StepSampler
from datasets.store.volumes import VolumeStore
from engine import distributed
from engine.checkpoint import LATEST
from engine.distributed import World
from engine.flags import options_of
from engine.pretrain_flags import OptimiserOptions
from models.methods import Alice
from sam_embed.embeddings.opened import open_embeddings

WRAP = distributed.wrap
NUM_CASES, COARSEN = 4, 3.0
NUM_STEPS = 2  # of each of the two runs


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this check."""
    parser = benchmark_parser(__doc__, "a tiny network and crops of 64 voxels a side")
    add = parser.add_argument
    add("--num_ranks", type=int, default=32, help="processes that are simulated")
    add("--roi", type=int, default=96, help="side of a crop, voxels; --quick: 64")
    add("--feature_size", type=int, default=48, help="of SwinUNETR; --quick: 12")
    add("--batch_size", type=int, default=8, help="pairs per rank and step; --quick: 2")
    add("--flags", type=str, default="", help="further flags of main_ddp.py")
    return parser


def run(flags: jsonargparse.Namespace) -> dict:
    """The figures of both runs."""
    if flags.quick:
        flags.roi, flags.feature_size, flags.batch_size = 64, QUICK["feature_size"], 2
    flags.device, flags.num_workers, flags.num_steps = "cpu", 0, 10
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_phantom_corpus(folder, NUM_CASES, COARSEN)
        open_embeddings(folder / "embeddings", VolumeStore(folder / "store").names)  # the other ranks' share, too
        given = (*run_words(folder, flags), *words(log_freq=1, steps_per_epoch=NUM_STEPS))
        return check(given, folder / "run", flags.num_ranks)


def check(given: tuple[str, ...], output_dir: Path, num_ranks: int) -> dict:
    """Run main_ddp.py with these words, and again for one epoch more."""
    seconds = []
    for epochs in (1, 2):
        started = time.perf_counter()
        with (
            simulated_ranks(num_ranks),
            mock.patch.object(Alice, "forward", stand_in),
            mock.patch.object(distributed, "wrap", wrap_without_exchange),
        ):
            main_ddp.main([*given, *words(epochs=epochs)])
        seconds.append(time.perf_counter() - started)
    parsed = main_ddp.make_flags().parse_args([*given, *words(epochs=2)])
    optimiser, lines = options_of(parsed, OptimiserOptions), read_log(output_dir, "train")
    return {
        "num_ranks": num_ranks,
        "first_run_s": seconds[0],
        "resumed_run_s": seconds[1],
        "checkpoint_gb": (output_dir / LATEST).stat().st_size / 1e9,
        "effective_batch": optimiser.effective_batch(num_ranks),
        "peak_lr": optimiser.peak_lr(num_ranks),
        "steps": [line["step"] for line in lines],
        "lr": [line["lr"] for line in lines],
        "shares_are_whole": shares_are_whole(optimiser, num_ranks),
    }


@contextlib.contextmanager
def simulated_ranks(num_ranks: int) -> Iterator[None]:
    """Inside the block this process is rank 0 of a process group that answers without the others."""
    described = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks)}
    with mock.patch.dict(os.environ, described):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def wrap_without_exchange(module: nn.Module, world: World, reduce_in_bf16: bool = False) -> nn.Module:
    """DDP that keeps its own gradients: the fake group's exchanges give DDP no result to wait for."""
    wrapped = WRAP(module, world)
    wrapped.register_comm_hook(None, noop_hook)
    return wrapped


def stand_in(method: Alice, batch: dict[str, Tensor], now: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that gives every trained weight a gradient, and the teacher's outputs to the centres."""
    rows = batch["crop"].shape[0] * batch["crop"].shape[1]
    outputs = torch.zeros(rows, method.options.out_dim, device=batch["crop"].device)
    method.loss.targets("cls", outputs, now["teacher_temp"])
    total = torch.stack(
        [weight.square().mean() for weight in method.student.parameters() if weight.requires_grad]
    ).sum()
    return total, {"loss_cls": total.detach()}


def shares_are_whole(optimiser: OptimiserOptions, num_ranks: int) -> bool:
    """Whether the ranks' batches of some steps are all samples of these steps, each once."""
    per_step = optimiser.effective_batch(num_ranks)
    drawn = [
        index
        for rank in range(num_ranks)
        for batch in StepSampler(
            optimiser.batch_size, rank, num_ranks, NUM_STEPS, accumulation=optimiser.accumulate_steps
        )
        for index in batch
    ]
    return sorted(drawn) == list(range(NUM_STEPS * per_step))


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted."""
    ours = (
        f"{found['num_ranks']} simulated ranks, effective batch {found['effective_batch']}, "
        f"{found['checkpoint_gb']:.2f} GB a checkpoint: {found['first_run_s']:.0f} s"
    )
    is_right = found["shares_are_whole"] and found["steps"] == list(range(1, 2 * NUM_STEPS + 1))
    state = "shares whole, steps in order" if is_right else "SHARES OR STEPS ARE WRONG"
    return [("start, train, save", ours, f"resumed {found['resumed_run_s']:.0f} s", state, "< 60 s")]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))
