"""Pretrain with Alice: anatomical invariance and semantic alignment between patients (Jiang et al., ICCV 2023).

One process, on a CPU or one GPU:

    python main_ddp.py --config configs/alice_swinunetr.yaml --data_dir DATA --json_list DATA.json \\
        --embed_dir EMBEDDINGS --output_dir results/run

Eight GPUs (or eight CPU processes, with --device cpu):

    torchrun --nproc_per_node=8 main_ddp.py --config configs/alice_swinunetr.yaml --data_dir DATA \\
        --json_list DATA.json --embed_dir EMBEDDINGS --output_dir results/run

The same command again goes on where the run stopped (--resume auto or FILE; --resume none in a job that its launcher
restarts). SIGTERM and SIGUSR1 write a checkpoint and end the run with exit code 75; a complete run ends with 0.
--pairing iou and random need no --embed_dir.
"""

import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets.ct.geometry import CANONICAL_AXCODES
from datasets.lists.data_list import Case, load_data_list
from datasets.lists.label_classes import read_classes
from datasets.samples.augment import AugmentOptions
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.dataset import PairedCropDataset
from datasets.samples.loader import make_pair_loader
from datasets.samples.masks import mask_grid, num_masked_blocks
from datasets.samples.pairings import PAIRINGS, PairingOptions
from datasets.samples.probe_voxels import ProbeVoxels, choose_probe_voxels, split_probe_cases
from datasets.store.volumes import VolumeStore, build_store, parse_spacing, spacing_text
from engine import distributed
from engine.checkpoint import BackgroundSaver, find_wanted, set_aside, tell_resumed
from engine.device import autocast, compile_networks, make_scaler, pick_device, pick_precision, use_channels_last
from engine.distributed import World
from engine.flags import RunInfo, run_main
from engine.logging import RunLog, SilentLog, make_log
from engine.loop import Hooks, LoopOptions, Objective, Schedules, pretrain, validate
from engine.optim import make_optimizer
from engine.pretrain_flags import check_flags, effective_batch, make_pretrain_flags, roi_of, weight_decay_end
from engine.profiler import profiled
from engine.run import KIND, RunState
from engine.run_folder import claimed
from engine.schedules import CosineSchedule, LinearSchedule, peak_lr
from engine.signals import EXIT_INTERRUPTED, stop_early_when_asked
from engine.watch.pictures import draw_pictures
from engine.watch.probe import ProbeOptions, watch_probe
from engine.watch.sample_sheet import pair_figure, samples_of
from engine.weights import start_from
from losses.collapse import CollapseWatch
from losses.distillation import AliceLoss
from models.backbones import BACKBONES
from models.methods.alice import build_alice
from models.methods.casa import CASA_VARIANTS

DEFAULT_SPACING_MM = (2.0, 1.5, 1.5)
VALIDATION_SEED = 1_000_003


def make_flags():
    """The command line."""
    trusted = (PairingOptions.min_score, PairingOptions.max_cycle_mm)
    return make_pretrain_flags(__doc__, sorted(PAIRINGS), sorted(BACKBONES), sorted(CASA_VARIANTS), trusted)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    flags.weight_decay_end = weight_decay_end(flags)  # run.json and checkpoints name what was used
    student, teacher = check_and_build(flags)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    world = distributed.start(flags.device, flags.dist_timeout_min)
    with claimed(flags.output_dir, world):
        is_complete = start_and_train(flags, student, teacher, world)
    distributed.stop()
    if not is_complete:
        raise SystemExit(EXIT_INTERRUPTED)


def start_and_train(flags, student: nn.Module, teacher: nn.Module, world: World) -> bool:
    """Open the data, find where to start, and train; True when the run is complete."""
    info = RunInfo.collect(flags)
    if world.is_main:
        info.write(flags.output_dir)
    data = open_data(flags, world)
    options = make_options(flags, data, world)
    run = make_run(flags, student, teacher, data, options, world, info)
    state = find_start(flags, run, world)
    log = make_log(world, flags.output_dir, options.num_steps, run.step)
    log.say(describe_start(flags, data, options, run, world, state))
    is_complete = train(flags, run, data, options, world, log)
    log.close()
    return is_complete


# Data


@dataclass(frozen=True)
class Data:
    """The volumes of a run: the store, the pairs to train and to validate with (None without held-out cases), and the
    voxels to probe."""

    store: VolumeStore
    training: PairedCropDataset
    validation: PairedCropDataset | None
    probe: ProbeVoxels | None = None  # on rank 0, with --probe_freq


def open_data(flags, world: World) -> Data:
    """Open the volume store, building what is missing of it on rank 0, and make the datasets."""
    cases = {
        section: load_data_list(flags.json_list, flags.data_dir, section, must_exist=False)
        for section in ("training", "validation")
    }
    store_dir = Path(flags.store_dir or Path(flags.output_dir) / "store")
    probed = probe_cases(flags)
    if world.is_main:
        fill_store(cases["training"] + cases["validation"] + probed[0] + probed[1], store_dir, flags)
    distributed.wait_for_all(world)
    spacing = None if flags.spacing_mm is None else parse_spacing(flags.spacing_mm) or "native"
    store = VolumeStore(store_dir, expected_spacing_mm=spacing)
    names = {section: [case.name for case in listed if case.name in store] for section, listed in cases.items()}
    table = None
    if flags.pairing == "sam":
        table = CorrespondenceTable.load(flags.table_file or flags.embed_dir)
    training = make_dataset(flags, store, table, names["training"], flags.seed)
    validation = None
    if names["validation"] and flags.val_freq:
        validation = make_dataset(flags, store, table, names["validation"], flags.seed + VALIDATION_SEED)
    probe = None
    if flags.probe_freq and world.is_main:
        classes = read_classes(flags.probe_json_list or flags.json_list)
        probe = choose_probe_voxels(store, classes, *probed, flags.probe_voxels)
    return Data(store, training, validation, probe)


def probe_cases(flags) -> tuple[list[Case], list[Case]]:
    """Labelled cases to teach and to judge the frozen probes of --probe_freq; none without it."""
    if not flags.probe_freq:
        return [], []
    return split_probe_cases(flags.probe_json_list or flags.json_list, flags.data_dir, max_cases=flags.probe_cases)


def fill_store(cases: list[Case], store_dir: Path, flags) -> None:
    """Store the cases that are not stored yet; say which cannot be read."""
    spacing_mm = DEFAULT_SPACING_MM if flags.spacing_mm is None else parse_spacing(flags.spacing_mm)
    if (store_dir / "store.json").exists():
        store = VolumeStore(store_dir)
        spacing_mm = store.spacing_mm if flags.spacing_mm is None else spacing_mm
        cases = [case for case in cases if case.name not in store]
    if not cases:
        return
    print(f"volume store {store_dir}: {len(cases)} cases to add at {spacing_text(spacing_mm)}", flush=True)
    report = build_store(cases, store_dir, spacing_mm, num_workers=max(1, flags.num_workers))
    for name, reason in report.failed.items():
        print(f"left out: {name}: {reason}", flush=True)


def pairing_options(flags) -> dict:
    """What the pairing rules need to know, as arguments of `PairingOptions`."""
    names = ("min_score", "max_cycle_mm", "iou_range", "jitter_mm")
    return {"roi": roi_of(flags), **{name: getattr(flags, name) for name in names}}


def make_dataset(
    flags, store: VolumeStore, table: CorrespondenceTable | None, names: list[str], seed: int
) -> PairedCropDataset:
    """Paired crops of the cases `names`."""
    return PairedCropDataset(
        store,
        table,
        flags.pairing,
        **pairing_options(flags),
        hu_min=flags.a_min,
        hu_max=flags.a_max,
        mask_ratio=flags.mask_ratio,
        mask_block=flags.mask_block,
        augment=AugmentOptions() if flags.augment else AugmentOptions.off(),
        seed=seed,
        case_names=names,
    )


# Networks, objective, schedules


def check_and_build(flags) -> tuple[nn.Module, nn.Module]:
    """Check all flags, then build student and teacher on the CPU; nothing has been written or started before."""
    built = []

    def build() -> None:
        torch.manual_seed(flags.seed)
        built.append(build_networks(flags))
        check_mask_block(flags, min(built[0][0].backbone.channels))

    further = [
        lambda: num_masked_blocks(mask_grid(roi_of(flags), flags.mask_block), flags.mask_ratio),
        lambda: PairingOptions(**pairing_options(flags)),
        lambda: flags.spacing_mm is None or parse_spacing(flags.spacing_mm),
        lambda: pick_precision(*precision_request(flags)),
        lambda: make_loss(flags),
        lambda: Path(flags.probe_json_list or flags.json_list).is_file() and probe_cases(flags),
        build,
    ]
    check_flags(flags, distributed.planned_size(), further)
    return built[0]


def check_mask_block(flags, token_vox: int) -> None:
    """Raise ValueError where mask blocks would cut through the backbone's finest tokens, `token_vox` voxels a side."""
    if flags.mask_block % token_vox:
        raise ValueError(
            f"--mask_block {flags.mask_block} cuts through the tokens of --backbone {flags.backbone}, which are "
            f"{token_vox} voxels a side: give a multiple of {token_vox}"
        )


def precision_request(flags) -> tuple[str, torch.device]:
    """What is asked for with --precision and --use_fp16, and the device it has to run on."""
    return "fp16" if flags.use_fp16 else flags.precision, pick_device(flags.device, 0)


def build_networks(flags) -> tuple[nn.Module, nn.Module]:
    """The student and its EMA teacher; flags and arguments share their names."""
    shared = (
        "backbone feature_size casa_variant casa_heads casa_head_dim casa_hidden_dim casa_cosine_scale "
        "query_stride key_stride cls_features out_dim head_hidden_dim head_bottleneck_dim shared_head "
        "shared_head_teacher norm_last_layer lambda1 lambda2 lambda3 use_checkpoint"
    )
    return build_alice(roi=roi_of(flags), **{name: getattr(flags, name) for name in shared.split()})


def make_loss(flags) -> AliceLoss:
    """The objective and its centres."""
    shared = "lambda1 lambda2 lambda3 out_dim student_temp centre_momentum recon_on centring"
    return AliceLoss(**{name: getattr(flags, name) for name in shared.split()})


def make_run(
    flags, student: nn.Module, teacher: nn.Module, data: Data, options: LoopOptions, world: World, info: RunInfo
) -> RunState:
    """Everything that changes while training, on this rank's device."""
    student, teacher = student.to(world.device), teacher.to(world.device)
    if flags.channels_last:
        use_channels_last(student, teacher)
    torch.backends.cudnn.benchmark = flags.cudnn_benchmark
    description = {
        "flags": info.flags,
        "commit": info.commit,
        "versions": info.versions,
        "random": {"seed": flags.seed, "rule": "torch is seeded from (seed, step, rank) before each step"},
        "preprocessing": {
            "axcodes": CANONICAL_AXCODES,
            "spacing_mm": list(data.store.spacing_mm) if data.store.spacing_mm else "native",
            "hu_min": flags.a_min,
            "hu_max": flags.a_max,
            "roi": list(roi_of(flags)),
        },
        "backbone": {"name": flags.backbone, "feature_size": flags.feature_size, "in_channels": 1},
        "num_training_cases": len(data.training),
        "effective_batch": effective_batch(flags, world.size),
        "steps_per_epoch": options.steps_per_epoch,
    }
    return RunState(
        student=student,
        teacher=teacher,
        loss=make_loss(flags).to(world.device),
        optimizer=make_optimizer(student, flags.lr, flags.weight_decay, world.device),
        scaler=make_scaler(pick_precision(*precision_request(flags)), world.device),
        description=description,
    )


def find_start(flags, run: RunState, world: World) -> str:
    """Resume, start from given weights, or start afresh; returns one line that says which."""
    found = find_wanted(flags.resume, flags.output_dir, KIND, world)
    if found is not None:
        run.restore(*found)
        return tell_resumed(flags.resume, found)
    told = "started from random weights"
    if flags.checkpoint_file:
        report = start_from(run.student, flags.checkpoint_file)
        run.teacher.update(run.student, 0.0)
        told = f"started from the weights of {report.describe()}"
    if flags.resume == "none":
        distributed.wait_for_all(world)  # --checkpoint_file may be one of those
        if world.is_main:
            set_aside(flags.output_dir)
    return told


def make_objective(run: RunState, student: nn.Module, precision: str, device: torch.device) -> Objective:
    """One part of a batch -> total loss and terms.

    Args:
        student: `run.student`, or DDP around it.
    """

    def objective(batch: dict, teacher_temp: float, is_last_part: bool) -> tuple[torch.Tensor, dict]:
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with autocast(precision, device):
            student_out = student(batch["query_student"], batch["query_mask"], batch["key_student"], batch["key_mask"])
            teacher_out = run.teacher(batch["query_teacher"], batch["key_teacher"], student_out)
        total, terms = run.loss(student_out, teacher_out, batch, teacher_temp, update_centres=is_last_part)
        if student_out.casa_entropy is not None:
            terms["casa_entropy"] = student_out.casa_entropy
        return total, terms

    return objective


def make_options(flags, data: Data, world: World) -> LoopOptions:
    """Lengths in steps, from flags in epochs."""
    steps_per_epoch = flags.steps_per_epoch or max(1, len(data.training) // effective_batch(flags, world.size))
    return LoopOptions(
        num_steps=flags.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        num_parts=flags.accumulate_steps,
        clip_grad=flags.clip_grad,
        num_freeze_steps=round(flags.freeze_last_layer * steps_per_epoch),
        nan_policy=flags.nan_policy,
        log_freq=flags.log_freq,
        val_freq=flags.val_freq if data.validation is not None else 0,
        probe_freq=flags.probe_freq,
        picture_freq=flags.picture_freq,
        save_freq=flags.saveckp_freq,
        keep_freq=flags.keep_freq,
        seed=flags.seed,
    )


def make_schedules(flags, options: LoopOptions, world: World) -> Schedules:
    """Learning rate, weight decay, EMA momentum and teacher temperature per step."""
    peak = peak_lr(flags.lr, effective_batch(flags, world.size), flags.lr_reference_batch)
    num_steps, epoch = options.num_steps, options.steps_per_epoch
    return Schedules(
        lr=CosineSchedule(peak, flags.min_lr, num_steps, round(flags.warmup_epochs * epoch)),
        weight_decay=CosineSchedule(flags.weight_decay, weight_decay_end(flags), num_steps),
        momentum_teacher=CosineSchedule(flags.momentum_teacher, 1.0, num_steps),
        teacher_temp=LinearSchedule(
            flags.warmup_teacher_temp, flags.teacher_temp, flags.warmup_teacher_temp_epochs * epoch
        ),
    )


# The run


def describe_start(flags, data: Data, options: LoopOptions, run: RunState, world: World, state: str) -> str:
    """What a user should see before the first step."""
    batch, precision = effective_batch(flags, world.size), pick_precision(*precision_request(flags))
    num_trained = sum(parameter.numel() for parameter in run.student.parameters() if parameter.requires_grad)
    num_held_out = len(data.validation) if data.validation is not None else 0
    spacing = spacing_text(data.store.spacing_mm)
    facts = ", ".join(f"{name} {value}" for name, value in data.training.statistics().items() if value != [])
    peak = peak_lr(flags.lr, batch, flags.lr_reference_batch)
    scaling = f" = {flags.lr:g} x {batch} / {flags.lr_reference_batch}" if flags.lr_reference_batch else ""
    return "\n".join(
        [
            state,
            f"cases: {len(data.training)} to train with, {num_held_out} held out, spacing {spacing}",
            f"pairs: --pairing {flags.pairing}: {facts}",
            f"effective batch: {batch} = {flags.batch_size} a process x {world.size} processes x "
            f"{flags.accumulate_steps} accumulated",
            f"length: {options.steps_per_epoch} steps an epoch, {options.num_steps} in all",
            f"learning rate: peak {peak:g}{scaling}, floor {flags.min_lr:g}",
            f"networks: {num_trained / 1e6:.1f} M trained parameters, {precision} on {world.device}",
        ]
    )


def train(flags, run: RunState, data: Data, options: LoopOptions, world: World, log: RunLog | SilentLog) -> bool:
    """Compose loaders, objective and hooks, and run the loop; True when it is complete."""
    precision = pick_precision(*precision_request(flags))
    schedules = make_schedules(flags, options, world)
    if flags.compile:
        compile_networks(run.student, run.teacher)
    student = wrap(run.student, world)
    loader = make_pair_loader(
        data.training,
        flags.batch_size,
        world.rank,
        world.size,
        flags.num_workers,
        start_step=run.step,
        num_steps=options.num_steps,
        accumulation=flags.accumulate_steps,
        pin_memory=world.device.type == "cuda",
    )
    unwrapped = make_objective(run, run.student, precision, world.device)
    held_out = held_out_batches(flags, data, world)

    def case_names(batch: dict) -> list[str]:
        return [data.store.names[int(index)] for side in ("query_case", "key_case") for index in batch[side]]

    def draw_pairs(batch: dict):
        return pair_figure(samples_of(batch), data.store, "student")

    saver = BackgroundSaver(flags.output_dir)
    probing = ProbeOptions(roi_of(flags), flags.a_min, flags.a_max, precision=precision)
    hooks = Hooks(
        validate=lambda: validate(unwrapped, [run.student, run.teacher, run.loss], held_out, flags.teacher_temp, world),
        draw=lambda batch, step: draw_pictures(
            run, batch, step, data.store, precision, Path(flags.output_dir), log, draw_pairs
        ),
        save=lambda epoch: saver.save(
            run.as_checkpoint(options.steps_per_epoch), None if epoch is None else f"checkpoint{epoch:04d}.pth"
        ),
        saved=saver.wait,
        case_names=case_names,
        watch=CollapseWatch(flags.out_dim),
        probe=lambda: watch_probe(run.student, run.teacher, data.probe, probing, world),
    )
    if flags.probe_freq and run.step == 0:
        log.record("probe", 0, 0, hooks.probe())  # what random weights can do: the numbers to beat
    objective = make_objective(run, student, precision, world.device)
    batches = iter(loader)
    if flags.profile_steps and world.is_main:
        trace = Path(flags.output_dir) / "trace.json.gz"
        batches = profiled(batches, flags.profile_steps, flags.accumulate_steps, trace, log.say)
    return pretrain(run, student, objective, batches, schedules, options, hooks, world, log)


def wrap(student: nn.Module, world: World) -> nn.Module:
    """DDP around the student where there is a process group; the teacher stays outside."""
    if not distributed.has_group():
        return student
    # No buffer changes while training. Newer PyTorch calls the switch by another name.
    names = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True, **{switch: False})


def held_out_batches(flags, data: Data, world: World) -> Iterable[dict]:
    """This rank's share of the validation pairs: the same pairs every time, as many on every rank."""
    if data.validation is None:
        return []
    num_steps = -(-flags.num_val_pairs // (flags.batch_size * world.size))
    return make_pair_loader(
        data.validation, flags.batch_size, world.rank, world.size, min(flags.num_workers, 2), num_steps=num_steps
    )


if __name__ == "__main__":
    stop_early_when_asked()
    run_main(main)
