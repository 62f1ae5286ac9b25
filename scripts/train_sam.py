"""Train SAM's anatomical embeddings on the user's own volumes, without labels or landmarks.

    python scripts/train_sam.py --config configs/sam_quickstart.yaml --data_dir D --json_list F.json \\
        --store_dir STORE --output_dir OUT --landmark_dir D/landmarks        (2 CPU cores, minutes)
    torchrun --nproc_per_node=8 scripts/train_sam.py --config configs/sam_published.yaml --data_dir D \\
        --json_list F.json --store_dir STORE --output_dir OUT                (8 GPUs, hours)

Writes OUT/checkpoint.pth (the latest; resumes), OUT/checkpoint_best.pth (lowest validation error, or the latest where
nothing is validated), log.txt, TensorBoard files and run.json. Both checkpoints load with `load_embedder`. The store is
built when it is missing. Validation takes the list's `validation` section: landmark error with --landmark_dir, else the
cycle error. Training volumes are kept on disk at SAM's grid (1.5 MB each at 4 mm, 12 MB at 2 mm) and memory-mapped.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.signals import EXIT_INTERRUPTED, StopRequest, stop_early_when_asked

if __name__ == "__main__":
    stop_early_when_asked()  # before the imports below, which take seconds

import jsonargparse
import torch
from torch import nn

from datasets.ct.images import CT
from datasets.lists.data_list import Case, load_data_list
from datasets.samples.loader import make_pair_loader
from datasets.samples.random_contrast import IntensityOptions
from datasets.store.format import check_kind
from datasets.store.volumes import VolumeStore, fill_store
from engine import distributed
from engine.checkpoint import describe_resumed, find_wanted, save_checkpoint, set_aside
from engine.device import autocast, make_scaler, pick_precision
from engine.distributed import World, all_max
from engine.flags import DeviceOptions, RunInfo, add_options, add_resume, add_switch, make_parser, options_of, run_main
from engine.logging import Clock, Meters, make_log
from engine.optim import clip_gradients, make_optimizer
from engine.run_folder import claimed
from engine.schedules import CosineSchedule
from models.layers.convolution import use_steady_convolutions
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.judging.evaluate import load_landmarks
from sam_embed.network import AnatomicalEmbedder, NetworkOptions
from sam_embed.training.contrastive import LEVELS, LevelOptions, SamLoss
from sam_embed.training.run import SamRun, Validator, WeightAverage, embed_views, main_error, share_done
from sam_embed.training.training_volumes import TrainingVolumes, default_grid_dir, make_training_volumes
from sam_embed.training.views import ViewOptions, ViewPairDataset

KIND = "sam_embed"
BEST = "checkpoint_best.pth"
SCHEDULE_PARTS = 10_000  # resolution of the learning rate's schedule over the share of the run that is done


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command; `configs/sam_*.yaml` set them."""
    parser = make_parser(__doc__)
    add_data_flags(parser.add_argument_group("data"))
    add_network_flags(parser.add_argument_group("network and its input"))
    add_view_flags(parser.add_argument_group("views"))
    for level in LEVELS:
        add_level_flags(parser.add_argument_group(f"loss, {level} level"), level)
    add_optimiser_flags(parser.add_argument_group("optimiser"))
    add_running_flags(parser.add_argument_group("running"))
    return parser


def add_data_flags(group) -> None:
    add = group.add_argument
    add("--data_dir", type=str, required=True, help="folder that the list's paths are relative to")
    add("--json_list", type=str, required=True, help="data list, see scripts/create_json.py")
    add("--store_dir", type=str, required=True, help="volume store; what is missing in it is built")
    add("--store_spacing_mm", type=str | float, nargs="+", default=["native"], help="of a store built here")
    add("--grid_dir", type=str, default="", help="the volumes on SAM's grid, made once; empty = in the store's folder")
    add("--landmark_dir", type=str, default="", help="<case>.json files that judge held-out cases; none: cycle error")
    add("--output_dir", type=str, required=True, help="checkpoints, log.txt, TensorBoard, run.json")


def add_network_flags(group) -> None:
    small_input = {"spacing_mm": [4.0, 4.0, 4.0], "hu_max": 600.0, "scale_to": 4.0, "offset": -2.0}
    add_options(group, EmbedderInfo, small_input)
    stem = {"stem_kernel": [5, 5, 5], "stem_stride": [2, 2, 2], "pool_stride": [1, 1, 1]}
    add_options(group, NetworkOptions, {"width": 24, "embed_dim": 32, "stage_kernel_depths": [3, 3, 3, 3], **stem})
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    group.add_argument("--stage_strides", type=list[list[int]], default=strides, help="one (D, H, W) stride per stage")


def add_view_flags(group) -> None:
    group.add_argument("--view_shape", type=int, nargs=3, default=[80, 56, 72], help="voxels of a view (D, H, W)")
    add_options(group, ViewOptions)
    add_options(group, IntensityOptions)


def add_level_flags(group, level: str) -> None:
    add, defaults = group.add_argument, LevelOptions()
    ignore_mm = 60.0 if level == "coarse" else 14.0
    add(f"--{level}_weight", type=float, default=1.0, help="of this level in the loss; 0 = off")
    add(f"--{level}_temperature", type=float, default=defaults.temperature, help="of its softmax")
    add(f"--{level}_ignore_mm", type=float, default=ignore_mm, help="voxels nearer than this are no negatives")
    add(f"--{level}_num_keys", type=int, default=6000, help="voxels that may be negatives, at random; 0 = all")
    add(f"--{level}_num_hard", type=int, default=0, help="size of the pool of the hardest of them; 0 = all")
    add(f"--{level}_num_drawn", type=int, default=0, help="negatives drawn from that pool; 0 = all")
    add(f"--{level}_num_other", type=int, default=0, help="negatives from each other volume of the batch; 0 = none")
    add_switch(group, f"--{level}_both_views", False, "negatives from the query's own view too")


def add_optimiser_flags(group) -> None:
    add = group.add_argument
    add("--steps", type=int, default=200, help="length of the run, optimiser steps")
    add("--time_limit_min", type=float, default=0.0, help="end (and lower the learning rate) by then; 0 = no limit")
    add("--batch_size", type=int, default=1, help="volumes per process and step, two views each")
    add("--optimizer", type=str, choices=["adamw", "sgd"], default="adamw", help="sgd has momentum 0.9, as published")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--min_lr", type=float, default=3e-5, help="learning rate at the end")
    add("--warmup_share", type=float, default=0.1, help="share of the run in which the learning rate rises; 0 = none")
    add("--weight_decay", type=float, default=1e-4, help="0 = off")
    add("--clip_grad", type=float, default=1.0, help="largest joint gradient norm; 0 = off")
    add("--ema_momentum", type=float, default=0.98, help="of the averaged weights that the checkpoint holds; 0 = off")
    add("--seed", type=int, default=0, help="decides weights and views")


def add_running_flags(group) -> None:
    add = group.add_argument
    add_options(group, DeviceOptions)
    add("--num_workers", type=int, default=0, help="processes that make views, per rank; 0 = the training process")
    add("--load_threads", type=int, default=2, help="threads that bring the volumes to SAM's grid, once, per rank")
    add("--log_freq", type=int, default=10, help="steps between log lines")
    add("--val_freq", type=int, default=0, help="steps between validations; 0 = at the end only")
    add("--val_cases", type=int, default=4, help="held-out cases to match with each other; 0 = no validation")
    add("--memory_mb", type=float, default=4096.0, help="working memory of a held-out volume's first layers, MB")
    add("--save_freq", type=int, default=200, help="steps between checkpoints; 0 = at the end only")
    add_resume(group)
    add("--dist_timeout_min", type=float, default=30.0, help="minutes that a rank waits for the others")


def view_options(flags: jsonargparse.Namespace) -> ViewOptions:
    """The views that the flags describe."""
    grid = {"shape": tuple(flags.view_shape), "spacing_mm": tuple(flags.spacing_mm)}
    return options_of(flags, ViewOptions, **grid, intensity=options_of(flags, IntensityOptions))


def build_loss(flags: jsonargparse.Namespace, network: AnatomicalEmbedder) -> SamLoss:
    """The loss that the flags describe, for this network's grids."""
    names = [field.name for field in dataclasses.fields(LevelOptions)]
    levels = {level: LevelOptions(**{name: getattr(flags, f"{level}_{name}") for name in names}) for level in LEVELS}
    weights = {level: options.weight for level, options in levels.items()}
    untrained = [level for level in ("fine", "coarse") if weights[level] + weights["joint"] <= 0]
    if min(weights.values()) < 0 or untrained:
        given = ", ".join(f"--{level}_weight {weight:g}" for level, weight in weights.items())
        raise ValueError(
            f"{given}: expected weights of 0 or more that train both outputs, which takes --joint_weight, or both "
            "--fine_weight and --coarse_weight, above 0"
        )
    return SamLoss(levels, network.fine_grid(), network.coarse_grid(), flags.spacing_mm)


def build_run(flags: jsonargparse.Namespace, world: World, info: EmbedderInfo, description: dict) -> SamRun:
    """Network, averaged weights and optimiser on this rank's device, as at step 0."""
    torch.manual_seed(flags.seed)
    options = options_of(flags, NetworkOptions, stage_strides=flags.stage_strides)
    network = AnatomicalEmbedder(**dataclasses.asdict(options))
    use_steady_convolutions(network)  # half precision on CPU: flat views end in maps of two slices
    network = network.to(world.device, memory_format=torch.channels_last_3d)
    if flags.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), flags.lr, momentum=0.9, weight_decay=flags.weight_decay)
    else:
        optimizer = make_optimizer(network, flags.lr, flags.weight_decay, world.device)
    scaler = make_scaler(pick_precision(flags.precision, world.device), world.device)
    return SamRun(network, WeightAverage(network, flags.ema_momentum), optimizer, scaler, info, description)


def resume(run: SamRun, flags: jsonargparse.Namespace, world: World) -> str:
    """Restore the run that `--resume` names, if any; returns a line for the user."""
    found = find_wanted(flags.resume, flags.output_dir, KIND, world)
    if found is None:
        if flags.resume == "none" and world.is_main:
            set_aside(flags.output_dir)
        return "starting anew"
    run.restore(found[0], str(found[1]))
    return describe_resumed(flags.resume, found)


def open_store(flags: jsonargparse.Namespace, world: World, cases: Sequence[Case]) -> VolumeStore:
    """The store's cases among these; rank 0 builds what is missing. What is stored needs no file any more."""
    if world.is_main:
        is_there = (Path(flags.store_dir) / "store.json").exists()
        fill_store(cases, flags.store_dir, None if is_there else flags.store_spacing_mm, flags.num_workers)
    distributed.wait_for_all(world)
    store = VolumeStore(flags.store_dir)
    check_kind(store.store_dir, CT)
    return VolumeStore(flags.store_dir, [case.name for case in cases if case.name in store])


def build_validator(flags: jsonargparse.Namespace, world: World) -> tuple[Validator | None, str]:
    """The judge of held-out cases (on rank 0 only, None where they are fewer than two), and a message for the user."""
    if flags.val_cases < 2:
        return None, f"no validation: it matches pairs of cases, and --val_cases is {flags.val_cases}"
    listed = load_data_list(flags.json_list, flags.data_dir, "validation", must_exist=False)
    store = open_store(flags, world, listed[: flags.val_cases])
    if len(store) < 2:
        return None, (
            f"no validation: it matches pairs of cases, and {len(store)} can be used of the first {flags.val_cases} "
            f"(--val_cases) among the {len(listed)} validation cases of {flags.json_list}"
        )
    if not world.is_main:
        return None, ""
    landmarks = load_landmarks(flags.landmark_dir, store.names) if flags.landmark_dir else None
    validator = Validator({name: store.read(name) for name in store.names}, landmarks, flags.memory_mb)
    return validator, f"{len(store)} cases to validate with, by {'landmarks' if landmarks else 'cycle error'}"


def train(
    run: SamRun,
    wrapped: nn.Module,
    loss: SamLoss,
    batches: Iterable[dict],
    flags: jsonargparse.Namespace,
    validator: Validator | None,
    world: World,
    log,
) -> bool:
    """Train from `run.step` to the end of steps or time; False when a signal ended it after a checkpoint."""
    warmup = round(flags.warmup_share * SCHEDULE_PARTS)
    schedule = CosineSchedule(flags.lr, flags.min_lr, SCHEDULE_PARTS, warmup, flags.lr / 20)
    precision = pick_precision(flags.precision, world.device)
    parameters = list(run.network.parameters())
    meters, clock, started_s = Meters(), Clock(), time.perf_counter() - run.elapsed_s
    if not run.is_judged:
        validate_and_save(run, validator, flags, world, log)
    with StopRequest() as stop:
        for batch in batches:
            # Learning rate; ranks agree on the time
            share = share_done(run.step, flags.steps, time.perf_counter() - started_s, flags.time_limit_min * 60)
            share, is_asked_to_stop = all_max(
                torch.tensor([share, float(stop.requested)], device=world.device)
            ).tolist()
            lr = schedule(round(share * SCHEDULE_PARTS))
            for group in run.optimizer.param_groups:
                group["lr"] = lr

            # Forward and backward
            clock.data_arrived(len(batch["view_a"]) * world.size)
            draws = batch["draw"]
            batch = {name: value.to(world.device, non_blocking=True) for name, value in batch.items()}
            with autocast(precision, world.device):
                fine, coarse = embed_views(wrapped, batch)
            total, terms = loss(fine, coarse, (batch["points_a"], batch["points_b"]), draws)
            run.scaler.scale(total).backward()

            # Clip, finite check over ranks, step, average
            run.scaler.unscale_(run.optimizer)
            grad_norm = clip_gradients(parameters, flags.clip_grad)
            is_broken = all_max((~torch.isfinite(total.detach())).float().view(1)).item()
            if is_broken:
                raise ValueError(f"the loss is not finite at step {run.step}; lower --lr (now {flags.lr:g})")
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.average.update(run.network, run.step)
            run.elapsed_s = time.perf_counter() - started_s
            meters.add({"loss": total.detach(), **terms})

            # Log, validate, save
            is_last = run.step >= flags.steps or share >= 1
            log.advance()
            if run.step % flags.log_freq == 0 or is_last:
                values = meters.read() | {"lr": lr, "grad_norm": float(grad_norm)} | clock.read()
                log.record("train", run.step, 0, values)
            is_val_due = is_last or (flags.val_freq > 0 and run.step % flags.val_freq == 0)
            is_save_due = is_last or is_asked_to_stop or (flags.save_freq > 0 and run.step % flags.save_freq == 0)
            if is_val_due:
                validate_and_save(run, validator, flags, world, log)
            elif is_save_due and world.is_main:
                save_checkpoint(run.as_checkpoint(), flags.output_dir)
            if is_last or is_asked_to_stop:
                distributed.wait_for_all(world)  # launchers end the others when the first one leaves, saving or not
                return bool(is_last)
            clock.wait()
    return True


def validate_and_save(
    run: SamRun, validator: Validator | None, flags: jsonargparse.Namespace, world: World, log
) -> None:
    """Judge the averaged weights, if there is a validator, and save them, perhaps as the best ones; all ranks wait.

    They are saved before too, as not yet judged, so that a validation that fails loses nothing.
    """
    if world.is_main:
        is_best = True
        if validator is not None:
            run.is_judged = False
            save_checkpoint(run.as_checkpoint(), flags.output_dir)
            measured = validator(run.average.network, run.info)
            log.record("validation", run.step, 0, measured)
            error = main_error(measured)
            is_best = run.best is None or error < run.best
            run.best = error if is_best else run.best
        run.is_judged = True
        save_checkpoint(run.as_checkpoint(), flags.output_dir, BEST if is_best else None)
    distributed.wait_for_all(world)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    world = distributed.start(flags.device, flags.dist_timeout_min)
    try:
        with (
            claimed(flags.output_dir, world),
            distributed.explained_lost_rank(world, flags.dist_timeout_min),
        ):
            is_complete = run_training(flags, world)
    finally:
        distributed.stop()
    if not is_complete:
        raise SystemExit(EXIT_INTERRUPTED)


def run_training(flags: jsonargparse.Namespace, world: World) -> bool:
    """Set everything up, train, and say where the result is; False when a signal ended the training."""
    run_info = RunInfo.collect(flags)
    info = options_of(flags, EmbedderInfo)
    options = view_options(flags)
    description = {"flags": run_info.flags, "commit": run_info.commit, "versions": run_info.versions}
    run = build_run(flags, world, info, description)
    loss = build_loss(flags, run.network)
    resumed = resume(run, flags, world)
    cases = load_data_list(flags.json_list, flags.data_dir, "training", must_exist=False)
    store = open_store(flags, world, cases)
    if not store.names:
        raise ValueError(
            f"{flags.json_list}: none of its {len(cases)} training cases could be read; its paths are relative to "
            f"--data_dir, which is {flags.data_dir}"
        )
    validator, message = build_validator(flags, world)
    grid_dir = flags.grid_dir or default_grid_dir(flags.store_dir, info.spacing_mm)
    make_training_volumes(store, info, grid_dir, flags.load_threads, world.rank, world.size)
    distributed.wait_for_all(world)
    volumes = TrainingVolumes(store, info, grid_dir, world.rank)
    dataset = ViewPairDataset(volumes, options, info, flags.seed)
    steps, is_cuda = {"start_step": run.step, "num_steps": flags.steps}, world.device.type == "cuda"
    batches = make_pair_loader(
        dataset, flags.batch_size, world.rank, world.size, flags.num_workers, **steps, pin_memory=is_cuda
    )
    wrapped = nn.parallel.DistributedDataParallel(run.network) if distributed.has_group() else run.network
    if world.is_main:
        run_info.write(flags.output_dir)
    log = make_log(world, flags.output_dir, flags.steps, run.step)
    log.say(f"{len(dataset.volumes)} training volumes, {resumed}, {world.size} process(es) on {world.device.type}")
    log.say(message)
    try:
        is_complete = train(run, wrapped, loss, batches, flags, validator, world, log)
    finally:
        log.close()
    return is_complete


if __name__ == "__main__":
    run_main(main)
