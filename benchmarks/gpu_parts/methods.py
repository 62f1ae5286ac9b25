"""A short pretraining of every method, by main_ddp.py on phantoms, and where the time of its step goes."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import main_ddp
from benchmarks.corpus import corpus_flags
from benchmarks.data_wait import SPACING_MM, read_log
from benchmarks.gpu_parts.apart import Workplace
from benchmarks.pretrain_step import GB, clock, training
from benchmarks.results import reset_peak_resident, resident_bytes, words
from datasets.samples.dataset import CutSamples
from datasets.samples.loader import make_pair_loader
from engine.distributed import World
from engine.flags import REPOSITORY, available_cpus
from engine.optim import make_optimizer
from engine.pretrain_data import open_data

# A method without a recipe here runs with its defaults.
RECIPES = {
    "alice": "alice_figures.yaml",  # all its terms
    "simsiam": "simsiam_iou.yaml",
    "dino": "dino_iou.yaml",
    "voco": "voco.yaml",
    "caid": "caid.yaml",
}
BATCH_SIZES = {"voco": 2}  # samples a step; VoCo takes eleven crops of each
BATCH_SIZE = 4
# Lengths and what is left out. The recipes' own are for long runs.
RUN = {
    **{"epochs": 10, "steps_per_epoch": 20, "warmup_epochs": 1, "log_freq": 10, "accumulate_steps": 1},
    **{"saveckp_freq": 10, "keep_freq": 0, "val_freq": 0, "picture_freq": 0},
}
# Of these a method takes those that it has. CAiD's loss grows while its queue fills, so the queue is short.
OF_METHOD = {"warmup_teacher_temp_epochs": 0, "freeze_last_layer": 0, "queue_size": 16}
TOY_RUN = {"epochs": 2, "steps_per_epoch": 1, "log_freq": 1, "num_workers": 0, "backbone": "unet", "feature_size": 6}
TOY_OF_METHOD = {
    **{"head_hidden_dim": 32, "head_bottleneck_dim": 8, "out_dim": 16, "casa_heads": 2, "casa_head_dim": 8},
    **{"casa_hidden_dim": 16, "projector_hidden_dim": 32, "projector_dim": 16, "predictor_dim": 8, "voco_dim": 16},
    **{"queue_size": 8, "caid_dim": 8},
}
SIDE, TOY_SIDE = 64, 32
PROFILED_STEPS, TOY_PROFILED_STEPS = 5, 1
NUM_OPERATORS = 10
FIRST_LINES = 2  # of the log, and as many of its end: their means are compared


def method_words(name: str, place: Workplace, output_dir: Path) -> list[str]:
    """main_ddp.py's command line for a method, on the corpus in `place.folder`."""
    recipe = {"config": REPOSITORY / "configs" / RECIPES[name]} if name in RECIPES else {}
    flags = RUN | {"batch_size": BATCH_SIZES.get(name, BATCH_SIZE), "num_workers": min(12, available_cpus())}
    optional = OF_METHOD
    if place.is_rehearsal:
        flags |= TOY_RUN | {"batch_size": 2}
        optional = OF_METHOD | TOY_OF_METHOD
    known = {action.dest for action in main_ddp.make_flags(name)._actions}
    flags |= {flag: value for flag, value in optional.items() if flag in known}
    flags |= corpus_flags(place.folder, TOY_SIDE if place.is_rehearsal else SIDE) | {"output_dir": output_dir}
    flags |= {"precision": place.precision, "device": place.device.type}
    return list(words(**recipe, method=name, spacing_mm=SPACING_MM, **flags))


def method_run(name: str, place: Workplace) -> None:
    """Train a method for a while; keep its losses, pairs a second and memory, then its profile.

    A run that is asked to end before its last step leaves what it has, without a profile.

    Raises:
        RuntimeError: the loss did not fall over a run of full length.
    """
    device = place.device
    reset_peak_resident()
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        words = method_words(name, place, Path(folder))
        is_complete = True
        try:
            main_ddp.main(words)
        except SystemExit:
            is_complete = False
        found = run_figures(read_log(Path(folder), "train")) | sizes(words) | peak_gigabytes(device)
        place.keep(found | {"is_complete": is_complete, "command": " ".join(words)})
        if is_complete:
            num_steps = TOY_PROFILED_STEPS if place.is_rehearsal else PROFILED_STEPS
            place.keep({"profile": step_profile(make_step(words, device), device, num_steps)})
    if not place.is_rehearsal and not found["loss_last"] < found["loss_first"]:
        raise RuntimeError(f"the loss of {name} did not fall: {found['loss_first']:.4g} -> {found['loss_last']:.4g}")


def run_figures(lines: list[dict]) -> dict:
    """Losses at both ends, and speed, of a run's log lines; the first period starts processes and chooses kernels."""
    losses = [line["loss"] for line in lines]
    return {
        "num_steps": lines[-1]["step"],
        "losses": losses,
        "loss_first": statistics.mean(losses[:FIRST_LINES]),
        "loss_last": statistics.mean(losses[-FIRST_LINES:]),
        "samples_per_s": statistics.median(line["samples_per_s"] for line in lines[1:]),
        "data_wait_share": statistics.mean(line["data_wait_share"] for line in lines[1:]),
    }


def sizes(words: list[str]) -> dict:
    """What a step of a run consists of."""
    flags = main_ddp.make_flags(main_ddp.chosen_method(words)).parse_args(words)
    crop = f"{flags.roi_z}x{flags.roi_y}x{flags.roi_x}"
    return {"crop": crop, "batch_size": flags.batch_size, "backbone": flags.backbone}


def peak_gigabytes(device: torch.device) -> dict[str, float | None]:
    """The most memory that this process took: on a GPU of PyTorch's, else of the system's."""
    if device.type == "cuda":
        reserved, allocated = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return {"reserved_gb": reserved / GB, "tensors_gb": allocated / GB}
    peak = resident_bytes(peak=True)
    return {"reserved_gb": None if peak is None else peak / GB}


def make_step(words: list[str], device: torch.device) -> Callable[[int], object]:
    """A function that trains so many further steps on one batch of the run's own samples, from new weights."""
    flags = main_ddp.make_flags(main_ddp.chosen_method(words)).parse_args(words)
    method = main_ddp.check_and_build(flags)
    samples = open_data(flags, method, World()).training
    batch = samples.make_views(next(iter(make_pair_loader(CutSamples(samples), flags.batch_size))), device)
    method = method.to(device)
    optimizer = make_optimizer(
        method.student,
        flags.lr,
        flags.weight_decay,
        device,
        kind=flags.optimizer,
        momentum=flags.sgd_momentum,
        constant_parts=method.constant_lr,
    )
    return training(method, optimizer, batch, flags.precision, device)


def step_profile(train: Callable[[int], object], device: torch.device, num_steps: int) -> dict:
    """Milliseconds of a step and of its costliest operators: of the GPU's time, on a CPU of its own.

    Returns:
        `step_ms`, wall time while recording, which is longer than without; `operators_ms`, of all operators;
        `operators`, the first `NUM_OPERATORS` with `name`, `ms` and `calls` in a step, and `share` of all operators.
    """
    train(2)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        started = clock(device)
        train(num_steps)
        step_ms = 1000 * (clock(device) - started) / num_steps
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # Kernels stand beside the operators that started them; their time is in these already.
    operators = [event for event in recorded.key_averages() if event.device_type == DeviceType.CPU]
    ms = {event.key: getattr(event, column) / 1000 / num_steps for event in operators}
    calls = {event.key: event.count / num_steps for event in operators}
    total = sum(ms.values())
    costliest = sorted(ms, key=ms.get, reverse=True)[:NUM_OPERATORS]
    named = [{"name": key, "ms": ms[key], "calls": calls[key], "share": ms[key] / total} for key in costliest]
    return {"step_ms": step_ms, "operators_ms": total, "operators": named}
