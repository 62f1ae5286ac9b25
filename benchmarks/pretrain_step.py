"""Alice's step: milliseconds, crop pairs per second and peak memory, one speed flag after the other.

    python -m benchmarks.pretrain_step --output results/benchmarks/pretrain_step.json --markdown results/step.md
    python -m benchmarks.pretrain_step --quick --device cpu

One step is that of `engine.loop.pretrain`: student on both masked views, teacher, CASA, all three losses, backward,
clipping, finite check, AdamW, moving average (figure 2 of Alice, ICCV 2023), on random crops that already lie on the
device. The first table starts from the naive composition (`benchmarks.naive_step`): MONAI's SwinUNETR as it comes, in
fp32 (convolutions in TF32, PyTorch's default), once for every view of student and teacher; and adds one change a line.
The second says what fits on which GPU: peak memory against crop and batch size, with and without --use_checkpoint.
Memory is what PyTorch reserved at its peak, and what it had given to tensors; the CUDA context (about 0.5 GB) and other
programs come on top. On a CPU fewer and smaller settings are taken, in bf16 only where it has units for that (one that
emulates it took thirty times as long). Memory is then what is resident of the whole process at its peak (Linux). A
setting that runs out of memory or fails is told as such, and the next one runs; torch.compile runs in a process of its
own with a time limit.
"""

import copy
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import jsonargparse
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.naive_step import take_views_apart
from benchmarks.results import (
    Rows,
    benchmark_parser,
    command,
    measure_apart,
    reset_peak_resident,
    resident_bytes,
    table,
)
from engine.device import (
    compile_networks,
    fast_precision,
    keep_freed_memory,
    make_scaler,
    pick_device,
    use_channels_last,
)
from engine.distributed import World
from engine.flags import git_commit
from engine.logging import SilentLog
from engine.loop import Hooks, LoopOptions, pretrain
from engine.optim import make_optimizer
from engine.run import RunState
from models.backbones import BACKBONES
from models.layers.composed_upsampling import use_composed_upsampling
from models.layers.window_attention import use_fast_window_attention
from models.methods.alice import Alice, AliceOptions
from models.methods.method import Method

GB = 2**30
NOW = {"lr": 1e-4, "weight_decay": 0.04, "teacher_temp": 0.07, "momentum_teacher": 0.996, "last_layer_frozen": 0.0}
LONGEST_TIMING_S = 5.0  # of one line
MASK_BLOCK, MASKED_SHARE = 16, 0.75
SCHEDULES = {name: lambda step, value=value: value for name, value in NOW.items()}
CASES = SimpleNamespace(case_names=lambda batch: ["random crops"])  # for the message about a loss that is not finite
HOOKS = Hooks(validate=dict, draw=lambda batch, step: None, save=lambda epoch: None, saved=lambda: True)
QUICK = {
    "feature_size": 12,
    "out_dim": 16,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "casa_heads": 2,
    "casa_head_dim": 8,
    "casa_hidden_dim": 16,
}
ON_GPUS = {"channels_last": True, "cudnn_benchmark": True}  # flags that are on there
COLUMNS = ("crop", "pairs", "setting", "ms a step", "pairs/s", "speed-up", "reserved GB", "tensors GB", "note")


@dataclass(frozen=True)
class Setting:
    """One line of a table: crop and batch, and the choices that make the step fast or small."""

    name: str
    roi: tuple[int, int, int]
    num_pairs: int
    precision: str = "fp32"
    attention: str = "monai"
    fused_optimizer: bool = False
    channels_last: bool = False
    cudnn_benchmark: bool = False
    use_checkpoint: bool = False
    is_compiled: bool = False
    is_naive: bool = False  # every view by itself, teacher with a decoder
    composed_upsampling: bool = False
    keep_memory: bool = False  # `engine.device`; once on it stays on in this process


def rungs(roi: tuple[int, int, int], num_pairs: int, precision: str, on_cpu: bool = False) -> list[Setting]:
    """From the naive composition up to the default: each line adds one change to the line before.

    What leaves fp32 comes after what does not, so that the lines before it show what is gained at equal settings.
    """
    changes = {
        "naive: view by view, fp32": {"is_naive": True},
        **({"+ freed memory kept": {"keep_memory": True}} if on_cpu else {}),
        "+ views together, teacher without decoder": {"is_naive": False},
        "+ fast window attention": {"attention": "auto"},
        **({f"+ {precision}": {"precision": precision}} if precision != "fp32" else {}),
        "+ composed upsampling": {"composed_upsampling": True},
        "+ fused AdamW": {"fused_optimizer": True},
        **({"+ channels last": {"channels_last": True}} if on_cpu else {"+ channels last, cuDNN's trials": ON_GPUS}),
    }
    lines = [Setting("", roi, num_pairs)]
    for name, change in changes.items():
        lines.append(replace(lines[-1], name=name, **change))
    lines[-1] = replace(lines[-1], name=f"{lines[-1].name} (the default)")
    return lines[1:]


def flagged(default: Setting) -> list[Setting]:
    """The default with one flag changed each."""
    without = {f"--no_{name}": {name: False} for name in ON_GPUS if getattr(default, name)}
    further = without | {"--use_checkpoint": {"use_checkpoint": True}, "--compile": {"is_compiled": True}}
    return [replace(default, name=f"default + {name}", **change) for name, change in further.items()]


def ladder(roi: tuple[int, int, int], num_pairs: int, precision: str, on_cpu: bool = False) -> list[Setting]:
    """`rungs`, and the last one's `flagged`."""
    lines = rungs(roi, num_pairs, precision, on_cpu)
    return [*lines, *flagged(lines[-1])]


def memory_grid(sizes: dict[tuple[int, int, int], list[int]], precision: str, on_cpu: bool = False) -> list[Setting]:
    """The default at growing batch sizes, without and with --use_checkpoint."""
    names = {False: "default", True: "--use_checkpoint"}
    return [
        replace(rungs(roi, n, precision, on_cpu)[-1], name=names[again], use_checkpoint=again)
        for again in (False, True)
        for roi, batch_sizes in sizes.items()
        for n in batch_sizes
    ]


def step_parser(description: str, quick: str) -> jsonargparse.ArgumentParser:
    """A parser with the flags that `make_bench` reads."""
    parser = benchmark_parser(description, quick, device=True)
    parser.add_argument("--feature_size", type=int, default=48, help="channels of SwinUNETR at stride 2")
    return parser


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = step_parser(__doc__, "a tiny network and crop: does every line run?")
    add = parser.add_argument
    add("--num_steps", type=int, default=10, help="timed steps of each line of the first table")
    add("--time_limit_s", type=float, default=225.0, help="all lines; later ones are left out")
    add("--compile_limit_s", type=float, default=120.0, help="longest time of a compiled line")
    add("--only", type=str | None, default=None, help="one setting as JSON (as in the results) and nothing else")
    return parser


# One setting


class Bench:
    """Methods built once on the CPU, copied for each setting, so that no two share weights.

    Args:
        options: of `make_alice`.
    """

    def __init__(self, options: dict, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.methods = {again: make_alice(**options, use_checkpoint=again) for again in (False, True)}

    def measure(self, setting: Setting, num_steps: int) -> dict:
        """Time and memory of a setting; its error where it cannot run."""
        try:
            found = self.run(setting, num_steps)
        except (RuntimeError, ValueError) as error:  # torch's for memory, kernels and compilers
            name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            found = {"error": f"{name}: {error}".splitlines()[0][:300]}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def run(self, setting: Setting, num_steps: int) -> dict:
        """Warm up, then time `num_steps` steps together; their peak memory includes the optimiser's state."""
        train = self.make_training(setting)
        first_s = self.time_steps(train, 1)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()
        step_s = self.time_steps(train, 1)
        if num_steps > 1 and step_s < LONGEST_TIMING_S:  # as many as fit the time that a line may take
            step_s = self.time_steps(train, min(num_steps, max(2, int(LONGEST_TIMING_S / step_s))))
        found = {"step_ms": 1000 * step_s, "pairs_per_s": setting.num_pairs / step_s, "first_step_s": first_s}
        if self.device.type == "cuda":
            found["reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / GB
            found["tensors_gb"] = torch.cuda.max_memory_allocated(self.device) / GB
        elif (peak := resident_bytes(peak=True)) is not None:
            found["reserved_gb"] = peak / GB
        return found

    def time_steps(self, train: Callable[[int], object], num_steps: int) -> float:
        """Seconds of a step, over `num_steps` together."""
        started = self.clock()
        train(num_steps)
        return (self.clock() - started) / num_steps

    def clock(self) -> float:
        return clock(self.device)

    def make_training(self, setting: Setting) -> Callable[[int], object]:
        """A function that trains so many further steps; it raises an error when a loss or gradient is not finite."""
        device = self.device
        torch.backends.cudnn.benchmark = setting.cudnn_benchmark
        if setting.keep_memory:
            keep_freed_memory()
        method = copy.deepcopy(self.methods[setting.use_checkpoint]).to(device)
        use_fast_window_attention(method, setting.attention)
        use_composed_upsampling(method, setting.composed_upsampling)
        if setting.is_naive:
            take_views_apart(method)
        if setting.channels_last:
            use_channels_last(method)
        if setting.is_compiled:
            compile_networks(method.student, method.teacher)
        optimizer = make_optimizer(
            method.student, NOW["lr"], NOW["weight_decay"], device, fused=setting.fused_optimizer
        )
        batch = synthetic_batch(setting.num_pairs, setting.roi, device)
        return training(method, optimizer, batch, setting.precision, device)


def training(
    method: Method, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], precision: str, device: torch.device
) -> Callable[[int], object]:
    """A function that trains so many further steps on one batch, by the loop that real runs take."""
    run = RunState(method, optimizer, make_scaler(precision, device))
    batches = itertools.repeat(batch)
    schedules = method.schedules(num_steps=1000, steps_per_epoch=100) | SCHEDULES

    def train(num_steps: int) -> None:
        options = LoopOptions(run.step + num_steps, steps_per_epoch=sys.maxsize, precision=precision)
        pretrain(run, method, CASES, batches, schedules, options, HOOKS, World(device=device), SilentLog())

    return train


def clock(device: torch.device) -> float:
    """Now in seconds, after the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_alice(
    roi: tuple[int, int, int] = (96, 96, 96), feature_size: int = 48, use_checkpoint=False, **options
) -> Alice:
    """Alice with MONAI's SwinUNETR; `options` are those of `AliceOptions`."""

    def make_backbone(decoder_stride: int | None, with_masks: bool):
        return BACKBONES["swin_unetr"](feature_size, roi, decoder_stride, use_checkpoint, with_masks)

    return Alice(AliceOptions(**options), make_backbone)


def make_bench(flags) -> Bench:
    """The networks that the flags ask for, on their device."""
    return Bench(QUICK if flags.quick else {"feature_size": flags.feature_size}, pick_device(flags.device, 0))


def synthetic_batch(num_pairs: int, roi: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Random crops and block masks with the names, shapes and types of a training batch, on the device."""
    batch = {name: torch.rand(num_pairs, 2, 1, *roi, device=device) for name in ("crop", "student", "teacher")}
    grid = [side // MASK_BLOCK for side in roi]
    order = torch.rand(num_pairs, 2, grid[0] * grid[1] * grid[2], device=device).argsort(dim=2)
    batch["mask"] = (order < MASKED_SHARE * order.shape[2]).view(num_pairs, 2, *grid)
    facts = {"score": torch.ones(num_pairs), "is_fallback": torch.zeros(num_pairs, dtype=torch.bool)}
    return batch | {name: value.to(device) for name, value in facts.items()}


def compiled(setting: Setting, flags, limit_s: float) -> dict:
    """A setting measured in a process of its own that may be ended: compilers can hang, and take their time."""
    try:
        found = measure_apart("benchmarks.pretrain_step", flags, limit_s, only=json.dumps(asdict(setting)))
    except RuntimeError as error:
        return {"error": str(error)[-300:]}
    return found["settings"][0]["found"]


# All settings


def plan(flags, precision: str, device: torch.device) -> tuple[list[Setting], list[Setting]]:
    """The lines of both tables, most telling first."""
    if flags.quick:
        small = (64, 32, 32)
        lines = ladder(small, 1, precision, device.type == "cpu")
        if device.type == "cpu":  # where compiling takes minutes
            lines = [setting for setting in lines if not setting.is_compiled]
        return lines, memory_grid({small: [1, 2]}, precision, device.type == "cpu")
    if device.type == "cpu":  # a step of one pair at 96³ takes a minute on 2 cores
        large = rungs((96,) * 3, 1, precision, True)
        speed = [*large, flagged(large[-1])[0], *ladder((64,) * 3, 1, precision, True)]
        return speed, memory_grid({(64,) * 3: [1, 2], (96,) * 3: [1]}, precision, on_cpu=True)
    sizes = {(96,) * 3: [1, 2, 4, 8, 16], (64,) * 3: [2, 8, 32], (128,) * 3: [1, 2, 4]}
    return [*ladder((96,) * 3, 4, precision), *ladder((64,) * 3, 8, precision)[:-1]], memory_grid(sizes, precision)


def run(flags) -> dict:
    """Measure all settings; returns machine, versions, and a list of {table, setting, found}."""
    started = time.perf_counter()
    bench = make_bench(flags)
    device, num_steps = bench.device, 1 if flags.quick else flags.num_steps
    if flags.only:
        setting = setting_of(json.loads(flags.only))
        only = {"table": "only", "setting": asdict(setting), "found": bench.measure(setting, num_steps)}
        return about(device, flags, started) | {"settings": [only]}
    plans = zip(("speed", "memory"), plan(flags, fast_precision(device), device))
    results = [{"table": table, "setting": setting} for table, settings in plans for setting in settings]

    def lateness(result: dict) -> tuple[bool, bool, bool]:
        """What cannot be undone comes late, and compiling last, since it takes longest."""
        setting, is_memory = result["setting"], result["table"] == "memory"
        return setting.is_compiled, device.type == "cpu" and is_memory, setting.keep_memory

    for result in tqdm(sorted(results, key=lateness), unit="setting", disable=not sys.stderr.isatty()):
        setting, left_s = result["setting"], flags.time_limit_s - (time.perf_counter() - started)
        if left_s < 0:
            found = {"error": f"left out after --time_limit_s {flags.time_limit_s:.0f}"}
        elif setting.is_compiled:
            found = compiled(setting, flags, min(left_s, flags.compile_limit_s))
        else:
            found = bench.measure(setting, num_steps if result["table"] == "speed" else min(3, num_steps))
        result |= {"setting": asdict(setting), "found": found}
        print(f"{time.perf_counter() - started:5.0f} s  {' '.join(line(result, None))}", flush=True)
    return about(device, flags, started) | {"settings": results}


def setting_of(values: dict) -> Setting:
    """A setting as it stands in the results."""
    return Setting(**values | {"roi": tuple(values["roi"])})


def about(device: torch.device, flags, started: float) -> dict:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "commit": git_commit(),
        "feature_size": QUICK["feature_size"] if flags.quick else flags.feature_size,
        "took_s": time.perf_counter() - started,
    }


# Tables


def naive_ms(found: dict) -> dict[tuple, float | None]:
    """Milliseconds of the first line of each crop's ladder; None where it failed."""
    first = {}
    for result in found["settings"]:
        if result["table"] == "speed":
            first.setdefault(tuple(result["setting"]["roi"]), result["found"].get("step_ms"))
    return first


def line(result: dict, base_ms: float | None) -> tuple[str, ...]:
    """One line under `COLUMNS`; `base_ms` is what its speed-up compares with."""
    setting, found = result["setting"], result["found"]

    def shown(name: str, digits: int) -> str:
        return f"{found[name]:,.{digits}f}" if name in found else ""

    faster = f"{base_ms / found['step_ms']:.2f}" if base_ms and "step_ms" in found else ""
    note = found.get("error", "")
    if setting["is_compiled"] and not note:
        note = f"first step {found['first_step_s']:.0f} s"
    figures = (shown("step_ms", 1), shown("pairs_per_s", 2), faster, shown("reserved_gb", 1), shown("tensors_gb", 1))
    return (crop_of(setting), str(setting["num_pairs"]), setting["name"], *figures, note)


def crop_of(setting: dict) -> str:
    return "x".join(map(str, setting["roi"]))


def markdown(found: dict) -> str:
    """Both tables, and the memory table once more as GB against crop and batch."""
    machine = f"{found['device']}, PyTorch {found['torch']}"
    parts = [f"{machine}, feature size {found['feature_size']}, commit {found['commit']}"]
    for kind, bases in (("speed", naive_ms(found)), ("memory", {})):
        results = [result for result in found["settings"] if result["table"] == kind]
        parts.append(table([line(r, bases.get(tuple(r["setting"]["roi"]))) for r in results], COLUMNS))
    return "\n\n".join([*parts, which_gpu(found)])


def which_gpu(found: dict) -> str:
    """GB reserved, without / with --use_checkpoint, one line a crop and one column a batch size."""
    cells: dict[tuple, dict[int, list[str]]] = {}
    for result in found["settings"]:
        if result["table"] == "memory":
            setting, gb = result["setting"], result["found"].get("reserved_gb")
            entry = "-" if gb is None else f"{gb:.0f}"
            cells.setdefault(tuple(setting["roi"]), {}).setdefault(setting["num_pairs"], []).append(entry)
    sizes = sorted({size for by_size in cells.values() for size in by_size})
    lines = [
        ("x".join(map(str, roi)), *(" / ".join(by_size.get(size, [])) for size in sizes))
        for roi, by_size in cells.items()
    ]
    header = ("crop", *(f"{size} pair{'s' * (size > 1)}" for size in sizes))
    return f"GB, without / with --use_checkpoint:\n\n{table(lines, header)}"


def rows(found: dict) -> Rows:
    """The ladders, each line beside the naive step."""
    lines, bases = [], naive_ms(found)
    for result in found["settings"]:
        setting, step_ms = result["setting"], result["found"].get("step_ms")
        base_ms = bases.get(tuple(setting["roi"]))
        if result["table"] == "speed" and step_ms and base_ms:
            what = f"step, {crop_of(setting)}, {setting['num_pairs']} pairs: {setting['name']}"
            naive = f"{base_ms:.0f} ms, naive, fp32"
            lines.append((what, f"{step_ms:.0f} ms", naive, f"{base_ms / step_ms:.2f}x", ""))
    return lines


main = command(__name__, make_flags, run, markdown)
