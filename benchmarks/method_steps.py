"""A step of every method beside the form of its public code: time and memory, in one process, turn about.

    python -m benchmarks.method_steps --output results/benchmarks/method_steps.json
    python -m benchmarks.method_steps --methods "[voco,voco_v1]" --roi "[64,64,64]"
    python -m benchmarks.method_steps --device cuda --feature_size 48 --roi "[96,96,96]" --slice 224 --num_rounds 20

A step is that of `engine.loop.pretrain` on random crops that already lie on the device. `benchmarks.public_forms` says
what the public forms are. Both sides start from the same weights and must give the same loss; both run in fp32 on a CPU
and in half precision on a GPU. The C library's allocator is as it comes, unless --keep_memory gives both sides what
`main_ddp.py` does on a CPU (`engine.device.keep_freed_memory`).

After a first step that does not count, rounds follow: a step of each side, the other side first in every second round.
The speed-up is the median of the rounds' ratios, so that a busy machine matters less; on a CPU the ratio of CPU time
stands beside it. The default sizes take some minutes on two cores.

Memory of a side is its weights, the optimiser's state, and the most that tensors of a step took at one time.

VoCo takes 11 crops of each volume, 9 on a grid and 2 random ones; `voco_v1` is its first version, whose teacher is a
whole network. Its dropout is off.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jsonargparse
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.pretrain_step import GB, NOW, QUICK, clock, step_parser, synthetic_batch, training
from benchmarks.public_forms import public_form
from benchmarks.results import Rows, chosen, command, table
from engine.device import keep_freed_memory, pick_device, pick_precision
from engine.flags import add_switch
from engine.optim import make_optimizer
from models.backbones import BACKBONES
from models.methods import METHODS
from models.methods.caid import CAiD
from models.methods.method import Method

NUM_BASES, NUM_RANDOM = 9, 2  # VoCo's crops of a volume
ELSEWHERE = 10**6  # a case that no batch shows
SAME_LOSS = 1e-3  # relative; half precision on a GPU
QUICK_SLICE = 32
AS_RELEASED = {"voco_dropout": 0.0, "voco_even_bases": False}


@dataclass(frozen=True)
class Case:
    """What is timed of one method.

    Attributes:
        method: a name of `models.methods.METHODS`.
        num_crops: of a sample.
        num_samples: a step; CAiD and SimSiam need more than one, VoCo's second version another volume.
        optimizer: see `engine.optim.make_optimizer`.
        options: of the method; `quick` replaces some of them for a tiny step.
    """

    method: str
    backbone: str
    num_crops: int = 2
    num_samples: int = 2
    optimizer: str = "adamw"
    options: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)

    def make(self, roi: tuple[int, int, int], feature_size: int, use_checkpoint: bool, is_quick: bool) -> Method:
        """Our method, with random weights."""

        def make_backbone(decoder_stride: int | None, with_masks: bool = False, with_skips: bool = False):
            kind = BACKBONES[self.backbone]
            return kind(feature_size, roi, decoder_stride, use_checkpoint, with_masks, with_skips)

        kind = METHODS[self.method]
        return kind(kind.Options(**self.options | (self.quick if is_quick else {})), make_backbone)


HEAD_QUICK = {name: QUICK[name] for name in ("out_dim", "head_hidden_dim", "head_bottleneck_dim")}
ALICE_QUICK = {name: value for name, value in QUICK.items() if name != "feature_size"}
CASES = {
    "alice": Case("alice", "swin_unetr", num_samples=1, quick=ALICE_QUICK),
    "caid": Case("caid", "resnet50_unet", num_samples=4, optimizer="sgd"),
    "dino": Case("dino", "swin_unetr", quick=HEAD_QUICK),
    "simsiam": Case("simsiam", "swin_unetr", optimizer="sgd", quick={"projector_dim": 32, "projector_hidden_dim": 32}),
    "voco": Case("voco", "swin_unetr_v2", NUM_BASES + NUM_RANDOM, options=AS_RELEASED, quick={"voco_dim": 16}),
    "voco_v1": Case(
        *("voco", "swin_unetr_v2", NUM_BASES + NUM_RANDOM),
        num_samples=1,
        options=AS_RELEASED | {"voco_variant": "v1"},
        quick={"voco_dim": 16},
    ),
}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = step_parser(__doc__, "tiny heads and slices, one round: do both sides run and agree?")
    parser.set_defaults(feature_size=12)
    add = parser.add_argument
    add("--methods", type=list[str], default=list(CASES), help=f"some of {', '.join(CASES)}")
    add("--roi", type=tuple[int, int, int], default=(64, 32, 32), help="crop D H W, voxels (VoCo published: 64 each)")
    add("--slice", type=int, default=128, help="side of CAiD's slices, pixels (published: 224)")
    add("--num_rounds", type=int, default=4, help="timed steps of each side; an even number is fair")
    add_switch(parser, "--keep_memory", False, "keep freed memory in the process, on both sides (CPU)")
    add_switch(parser, "--use_checkpoint", False, "recompute activations on both sides (CAiD's network cannot)")
    return parser


# One method


def compare(case: Case, flags: jsonargparse.Namespace, device: torch.device, precision: str) -> dict:
    """Seconds of each round, gigabytes and ratios of both sides.

    Raises:
        RuntimeError: the two sides do not give the same loss.
    """
    torch.manual_seed(0)
    is_2d = case.backbone == "resnet50_unet"
    side = QUICK_SLICE if flags.quick else flags.slice
    roi = (1, side, side) if is_2d else flags.roi
    ours = case.make(roi, 12 if flags.quick else flags.feature_size, flags.use_checkpoint and not is_2d, flags.quick)
    if isinstance(ours, CAiD):
        fill_queue(ours)
    sides = {"ours": ours, "public": public_form(ours)}
    batch = {name: value.to(device) for name, value in make_batch(case, roi, device).items()}
    losses = [loss_of(method.to(device), batch) for method in sides.values()]
    if abs(losses[0] - losses[1]) > SAME_LOSS * abs(losses[1]):
        raise RuntimeError(f"{case.method}: our loss is {losses[0]:.6g}, that of the public form {losses[1]:.6g}")
    steps, states = {}, {}
    for name, method in sides.items():
        parts = {"kind": case.optimizer, "constant_parts": method.constant_lr}
        states[name] = make_optimizer(method.student, NOW["lr"], NOW["weight_decay"], device, **parts)
        steps[name] = training(method, states[name], batch, precision, device)
        steps[name](1)
    seconds, cpu_seconds = alternate(steps, 1 if flags.quick else flags.num_rounds, device)
    gigabytes = {
        name: (kept_bytes(method, states[name]) + step_bytes(steps[name], device)) / GB
        for name, method in sides.items()
    }
    return {
        "crop": list(roi),
        "num_samples": case.num_samples,
        "num_crops": case.num_crops,
        "seconds": seconds,
        "speedup": median_ratio(seconds),
        "cpu_speedup": median_ratio(cpu_seconds),
        "gb": gigabytes,
        "memory_ratio": gigabytes["ours"] / gigabytes["public"],
    }


def make_batch(case: Case, roi: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Random crops with the names, shapes and types of a training batch of the method."""
    if case.method == "alice":
        return synthetic_batch(case.num_samples, roi, device)
    shape = (case.num_samples, case.num_crops)
    batch = {name: torch.rand(*shape, 1, *roi) for name in ("crop", "view", "view_target")}
    batch |= {"case": torch.arange(case.num_samples)[:, None].expand(shape)}
    batch |= {"score": torch.ones(case.num_samples), "is_fallback": torch.zeros(case.num_samples, dtype=torch.bool)}
    if case.method == "voco":
        num_bases = case.num_crops - NUM_RANDOM
        batch["overlap"] = torch.rand(case.num_samples, NUM_RANDOM, num_bases).softmax(-1)
    return batch


def fill_queue(method: CAiD) -> None:
    """Random keys of volumes that no batch shows, as in the middle of a run."""
    method.queue.keys.copy_(torch.nn.functional.normalize(torch.randn_like(method.queue.keys)))
    method.queue.owners.fill_(ELSEWHERE)


@torch.no_grad()
def loss_of(method: Method, batch: dict[str, Tensor]) -> float:
    """The loss of a batch; the method forgets that it saw it."""
    total, _ = method(batch, NOW)
    method.after_step(NOW, was_skipped=torch.tensor(True, device=total.device))
    return total.item()


def alternate(
    steps: dict[str, Callable[[int], object]], num_rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of a step of each side in each round; the order changes with every round."""
    seconds, cpu_seconds = ({name: [] for name in steps} for _ in range(2))
    for number in range(num_rounds):
        for name in list(steps)[:: 1 - 2 * (number % 2)]:
            started, started_cpu = clock(device), time.process_time()
            steps[name](1)
            seconds[name].append(clock(device) - started)
            cpu_seconds[name].append(time.process_time() - started_cpu)
    return seconds, cpu_seconds


def median_ratio(seconds: dict[str, list[float]]) -> float:
    """How often our step fits into the other side's: the median over rounds."""
    return statistics.median(public / ours for ours, public in zip(seconds["ours"], seconds["public"]))


def kept_bytes(method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what stays from step to step: weights, buffers, the optimiser's state."""
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in (*method.parameters(), *method.buffers(), *states))


def step_bytes(step: Callable[[int], object], device: torch.device) -> int:
    """The most bytes that tensors made in a step take at one time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(1)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


# All methods


def run(flags: jsonargparse.Namespace) -> dict:
    """The figures of each method, by its name, and what they were measured on."""
    device = pick_device(flags.device, 0)
    if flags.keep_memory:
        keep_freed_memory()
    precision = "fp32" if device.type == "cpu" else pick_precision("auto", device)
    found = {}
    for name in tqdm(chosen(flags.methods, list(CASES), "--methods"), unit="method", disable=not sys.stderr.isatty()):
        found[name] = figures = compare(CASES[name], flags, device, precision)
        print(f"{name}: {figures['speedup']:.2f}x as fast, {figures['memory_ratio']:.2f}x the memory", flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
        "feature_size": 12 if flags.quick else flags.feature_size,
        "use_checkpoint": flags.use_checkpoint,
        "keep_memory": flags.keep_memory,
        "methods": found,
    }


def rows(found: dict) -> Rows:
    """Two lines a method: time and memory."""
    lines = []
    for name, figures in found["methods"].items():
        crop = "x".join(map(str, figures["crop"]))
        what = f"{name} step, {figures['num_samples']} x {figures['num_crops']} crops of {crop}"
        ours, public = (f"{statistics.median(figures['seconds'][side]):.2f} s" for side in ("ours", "public"))
        ratio = f"{figures['speedup']:.2f}x"
        if found["device"] == "CPU":
            ratio += f", CPU time {figures['cpu_speedup']:.2f}x"
        lines.append((what, ours, f"{public}, public form", ratio, ">= 1x"))
        ours, public = (f"{figures['gb'][side]:.2f} GB" for side in ("ours", "public"))
        lines.append((f"{name}, memory", ours, public, f"{figures['memory_ratio']:.2f}x", "<= 1x"))
    return lines


main = command(__name__, make_flags, run, lambda found: table(rows(found)))
