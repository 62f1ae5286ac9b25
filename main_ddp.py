"""Pretrain a network on unlabelled CT, MR or radiographs: Alice, or another --method (models/methods/).

One process, on a CPU or one GPU:

    python main_ddp.py --config configs/alice_swinunetr.yaml --data_dir DATA --json_list DATA.json \\
        --embed_dir EMBEDDINGS --output_dir results/run

Eight GPUs (or eight CPU processes, with --device cpu):

    torchrun --nproc_per_node=8 main_ddp.py --config configs/alice_swinunetr.yaml --data_dir DATA \\
        --json_list DATA.json --embed_dir EMBEDDINGS --output_dir results/run

The same command again goes on where the run stopped (--resume auto or FILE; --resume none in a job that its launcher
restarts). SIGTERM and SIGUSR1 write a checkpoint and end the run with exit code 75; a complete run ends with 0.
--method X --help shows the flags of method X. --pairing iou and random need no --embed_dir. A --store_dir of MR comes
from scripts/prepare_volumes.py --modality mr.
"""

import logging
import sys
from pathlib import Path

from engine.signals import EXIT_INTERRUPTED, stop_early_when_asked

if __name__ == "__main__":
    stop_early_when_asked()  # before the imports below, which take seconds

import torch

from datasets.ct.geometry import CANONICAL_AXCODES
from datasets.ct.images import CT
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CutSamples
from datasets.samples.loader import make_pair_loader
from datasets.samples.masks import MaskOptions
from datasets.samples.pairings import PairingOptions
from datasets.store.volumes import parse_spacing, spacing_text
from engine import distributed
from engine.anatomy import method_options
from engine.checkpoint import BackgroundSaver, describe_resumed, find_wanted, set_aside
from engine.device import (
    compile_networks,
    explained_out_of_memory,
    make_scaler,
    on_gpus,
    pick_device,
    pick_precision,
    use_channels_last,
)
from engine.distributed import World
from engine.flags import RunInfo, check_all, options_of, run_main
from engine.logging import RunLog, SilentLog, make_log
from engine.loop import Hooks, LoopOptions, Schedules, pretrain, validate, values_at
from engine.optim import make_optimizer
from engine.pretrain_data import Data, held_out_batches, open_data, probe_cases
from engine.pretrain_flags import (
    DEFAULT_METHOD,
    GROUPS,
    OptimiserOptions,
    check_mask_block,
    check_paths,
    chosen_method,
    make_pretrain_flags,
)
from engine.profiler import profiled
from engine.run import RunState
from engine.run_folder import claimed
from engine.schedules import CosineSchedule
from engine.watch.pictures import draw_pictures
from engine.watch.probe import ProbeOptions, watch_probe
from engine.weights import start_from
from losses.collapse import CollapseWatch
from models.backbones import BACKBONES
from models.backbones.interface import MakeBackbone
from models.layers.batch_norm import synchronise_batch_norms
from models.methods import METHODS, Method

MEMORY_FLAGS = (
    "batch_size accumulate_steps roi_z roi_y roi_x feature_size precision use_checkpoint",
    "halve --batch_size and double --accumulate_steps (the same training), use --use_checkpoint or --precision bf16, "
    "or make the crops smaller",
)


def make_flags(method: str = DEFAULT_METHOD):
    """The command line of one method."""
    return make_pretrain_flags(__doc__, method)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    flags = make_flags(chosen_method(argv)).parse_args(argv)
    method = check_and_build(flags)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    world = distributed.start(flags.device, flags.dist_timeout_min)
    with (
        claimed(flags.output_dir, world),
        explained_out_of_memory(flags, *MEMORY_FLAGS),
        distributed.explained_lost_rank(world, flags.dist_timeout_min),
    ):
        is_complete = start_and_train(flags, method, world)
    distributed.stop()
    if not is_complete:
        raise SystemExit(EXIT_INTERRUPTED)


def start_and_train(flags, method: Method, world: World) -> bool:
    """Open the data, find where to start, and train; True when the run is complete."""
    data = open_data(flags, method, world)
    # run.json and checkpoints name the window that was used
    flags.a_min, flags.a_max = data.store.window(flags.a_min, flags.a_max)
    info = RunInfo.collect(flags)
    options = make_options(flags, data, world)
    run = make_run(flags, method, data, options, world, info)
    start = find_start(flags, run, world)
    if world.is_main:
        info.write(flags.output_dir)
    log = make_log(world, flags.output_dir, options.num_steps, run.step)
    log.say(describe_start(flags, data, options, run, world, start))
    if run.step >= options.num_steps:
        log.say(f"nothing left to train: {run.step} of {options.num_steps} steps are done (--epochs)")
    is_complete = train(flags, run, data, options, world, log)
    log.close()
    return is_complete


# Method, optimiser, schedules


def check_and_build(flags) -> Method:
    """Check all flags, then build the method on the CPU; nothing has been written or started before."""
    built, world_size = [], distributed.planned_size()

    def build() -> None:
        torch.manual_seed(flags.seed)
        built.append(build_method(flags))
        if isinstance(built[0].options, MaskOptions):
            check_mask_block(flags.mask_block, built[0], flags.backbone)

    def check_masks() -> None:
        if issubclass(METHODS[flags.method].Options, MaskOptions):
            options_of(flags, MaskOptions).check((flags.roi_z, flags.roi_y, flags.roi_x))

    check_all(
        [
            lambda: check_paths(flags),
            *(lambda Options=Options: options_of(flags, Options) for Options in [*GROUPS.values(), PairingOptions]),
            lambda: options_of(flags, OptimiserOptions).peak_lr(world_size),
            lambda: flags.spacing_mm is None or parse_spacing(flags.spacing_mm),
            lambda: pick_precision(*precision_request(flags)),
            lambda: Path(flags.probe_json_list or flags.json_list).is_file() and probe_cases(flags),
            check_masks,
            build,
            lambda: built or backbone_maker(flags)(None, with_masks=False),  # sizes, where the method refused first
        ]
    )
    # run.json and checkpoints name what was used
    flags.weight_decay_end = options_of(flags, OptimiserOptions).weight_decay_end
    return built[0]


def precision_request(flags) -> tuple[str, torch.device]:
    """What is asked for with --precision and --use_fp16, and the device it has to run on."""
    return "fp16" if flags.use_fp16 else flags.precision, pick_device(flags.device, 0)


def build_method(flags) -> Method:
    """The method that the flags describe; torch's seed decides its weights."""
    kind = METHODS[flags.method]
    return kind(method_options(flags, kind.Options), backbone_maker(flags))


def backbone_maker(flags) -> MakeBackbone:
    """The flags' backbone, with the parts that a method asks for."""
    roi = flags.roi_z, flags.roi_y, flags.roi_x

    def make_backbone(decoder_stride: int | None, with_masks: bool, with_skips: bool = False):
        kind, size = BACKBONES[flags.backbone], flags.feature_size
        return kind(size, roi, decoder_stride, flags.use_checkpoint, with_masks, with_skips)

    return make_backbone


def make_run(flags, method: Method, data: Data, options: LoopOptions, world: World, info: RunInfo) -> RunState:
    """Everything that changes while training, on this rank's device."""
    method = method.to(world.device)
    if world.size > 1 and flags.sync_batchnorm:
        synchronise_batch_norms(method)
    if flags.channels_last:
        use_channels_last(method)
    torch.backends.cudnn.benchmark = on_gpus(flags.cudnn_benchmark, world.device)
    crops, optimiser = options_of(flags, CropOptions), options_of(flags, OptimiserOptions)
    description = {
        "kind": flags.method,
        "flags": info.flags,
        "commit": info.commit,
        "versions": info.versions,
        "random": {"seed": flags.seed, "rule": "torch is seeded from (seed, step, rank) before each step"},
        "preprocessing": {
            "axcodes": CANONICAL_AXCODES,
            "spacing_mm": list(data.store.spacing_mm) if data.store.spacing_mm else "native",
            "hu_min": crops.a_min,
            "hu_max": crops.a_max,
            "roi": list(crops.roi),
            **({} if data.store.kind == CT else {"images": data.store.kind}),
            **({"mr_percentiles": list(data.store.mr_percentiles)} if data.store.mr_percentiles else {}),
        },
        "backbone": {"name": flags.backbone, "feature_size": flags.feature_size, "in_channels": 1},
        "num_training_cases": len(data.training),
        "data": data.digests(),
        "effective_batch": optimiser.effective_batch(world.size),
        "steps_per_epoch": options.steps_per_epoch,
    }
    return RunState(
        method=method,
        optimizer=make_optimizer(
            method.student,
            optimiser.peak_lr(world.size),
            flags.weight_decay,
            world.device,
            kind=flags.optimizer,
            momentum=flags.sgd_momentum,
            constant_parts=method.constant_lr,
        ),
        scaler=make_scaler(options.precision, world.device),
        description=description,
    )


def find_start(flags, run: RunState, world: World) -> str:
    """Resume, start from given weights, or start afresh; returns one line that says which."""
    found = find_wanted(flags.resume, flags.output_dir, flags.method, world)
    if found is not None:
        run.restore(*found)
        return describe_resumed(flags.resume, found)
    message = "started from random weights"
    if flags.checkpoint_file:
        report = start_from(run.method, flags.checkpoint_file)
        message = f"started from the weights of {report.describe()}"
    if flags.resume == "none":
        distributed.wait_for_all(world)  # --checkpoint_file may be one of those
        if world.is_main:
            set_aside(flags.output_dir)
    return message


def make_options(flags, data: Data, world: World) -> LoopOptions:
    """Lengths in steps, from flags in epochs."""
    batch = options_of(flags, OptimiserOptions).effective_batch(world.size)
    steps_per_epoch = flags.steps_per_epoch or max(1, len(data.training) // batch)
    return LoopOptions(
        num_steps=flags.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        num_parts=flags.accumulate_steps,
        precision=pick_precision(*precision_request(flags)),
        clip_grad=flags.clip_grad,
        clip_each=flags.clip_each,
        nan_policy=flags.nan_policy,
        log_freq=flags.log_freq,
        val_freq=flags.val_freq if data.validation is not None else 0,
        probe_freq=flags.probe_freq,
        picture_freq=flags.picture_freq,
        save_freq=flags.saveckp_freq,
        keep_freq=flags.keep_freq,
        seed=flags.seed,
    )


def make_schedules(flags, method: Method, num_steps: int, steps_per_epoch: int, world_size: int) -> Schedules:
    """Learning rate, weight decay, and the method's own values, per step."""
    optimiser = options_of(flags, OptimiserOptions)
    num_warmup_steps = round(optimiser.warmup_epochs * steps_per_epoch)
    return {
        "lr": CosineSchedule(optimiser.peak_lr(world_size), optimiser.min_lr, num_steps, num_warmup_steps),
        "weight_decay": CosineSchedule(optimiser.weight_decay, optimiser.weight_decay_end, num_steps),
        **method.schedules(num_steps, steps_per_epoch),
    }


# The run


def describe_start(flags, data: Data, options: LoopOptions, run: RunState, world: World, start: str) -> str:
    """What a user should see before the first step."""
    optimiser = options_of(flags, OptimiserOptions)
    batch, peak = optimiser.effective_batch(world.size), optimiser.peak_lr(world.size)
    num_trained = sum(parameter.numel() for parameter in run.method.parameters() if parameter.requires_grad)
    num_held_out = len(data.validation) if data.validation is not None else 0
    facts = ", ".join(f"{name} {value}" for name, value in data.training.statistics().items() if value != [])
    scaling = f" = {flags.lr:g} x {batch} / {flags.lr_reference_batch}" if flags.lr_reference_batch else ""
    return "\n".join(
        [
            start,
            f"cases: {len(data.training)} to train with, {num_held_out} held out, spacing "
            f"{spacing_text(data.store.spacing_mm)}",
            f"samples: --pairing {flags.pairing}: {facts}",
            f"effective batch: {batch} = {flags.batch_size} a process x {world.size} processes x "
            f"{flags.accumulate_steps} accumulated",
            f"length: {options.steps_per_epoch} steps an epoch, {options.num_steps} in all",
            f"learning rate: peak {peak:g}{scaling}, floor {flags.min_lr:g}",
            f"method: {flags.method}, {num_trained / 1e6:.1f} M trained parameters, {options.precision} on "
            f"{world.device}",
        ]
    )


def train(flags, run: RunState, data: Data, options: LoopOptions, world: World, log: RunLog | SilentLog) -> bool:
    """Compose loader and hooks, and run the loop; True when it is complete."""
    method, output_dir = run.method, Path(flags.output_dir)
    schedules = make_schedules(flags, method, options.num_steps, options.steps_per_epoch, world.size)
    if flags.compile:
        compile_networks(*method.networks().values())
    loader = make_pair_loader(
        CutSamples(data.training), flags.batch_size, world.rank, world.size, flags.num_workers, run.step,
        options.num_steps, flags.accumulate_steps, pin_memory=world.device.type == "cuda",
    )  # fmt: skip
    held_out, judged_at = held_out_batches(flags, data, world), values_at(schedules, options.num_steps)
    saver = BackgroundSaver(output_dir)
    probing = ProbeOptions(options_of(flags, CropOptions).roi, flags.a_min, flags.a_max, precision=options.precision)

    def validate_now() -> dict[str, float]:
        made = (data.validation.make_views(batch, world.device) for batch in held_out)
        return validate(method, made, judged_at, options.precision, world)

    hooks = Hooks(
        validate=validate_now,
        draw=lambda batch, step: draw_pictures(method, data.training, batch, step, options.precision, output_dir, log),
        save=lambda epoch: saver.save(
            run.as_checkpoint(options.steps_per_epoch), None if epoch is None else f"checkpoint{epoch:04d}.pth"
        ),
        saved=saver.wait,
        watch=CollapseWatch(),
        probe=lambda: watch_probe(method, data.probe, probing, world),
        prepare=data.training.make_views,
    )
    if flags.probe_freq and run.step == 0:
        log.record("probe", 0, 0, hooks.probe())  # what random weights can do: the numbers to beat
    batches = iter(loader)
    if flags.profile_steps and world.is_main:
        trace = output_dir / "trace.json.gz"
        batches = profiled(batches, flags.profile_steps, flags.accumulate_steps, trace, log.say)
    wrapped = distributed.wrap(method, world, flags.allreduce_bf16)
    return pretrain(run, wrapped, data.training, batches, schedules, options, hooks, world, log)


if __name__ == "__main__":
    run_main(main)
