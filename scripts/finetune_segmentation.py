"""Finetune pretrained weights to segment organs (or train from scratch), and evaluate: FLARE22, BTCV, Decathlon lists.

    python scripts/finetune_segmentation.py --weights alice_teacher.safetensors --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --output_dir results/finetune
    torchrun --nproc_per_node=4 scripts/finetune_segmentation.py --config configs/finetune_flare22.yaml \\
        --weights alice_teacher.safetensors --data_dir FLARE22 --json_list flare_labelled.json --output_dir results/all
    python scripts/finetune_segmentation.py --weights none --num_labelled 1 --fold 0 --seed 0 --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --output_dir results/scratch_1shot

Voxel size, HU window, crop, backbone and feature size come from the weights' own description; flags that differ win
with a warning. The same command again goes on where the run stopped (--resume auto); with other flags that decide the
result it is refused. SIGTERM and SIGUSR1 write a checkpoint and end the run with exit code 75. best.pth serves
scripts/predict.py and scripts/evaluate_segmentation.py.
"""

import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from datasets.lists.data_list import Case, load_data_list
from datasets.lists.label_classes import BUILT_IN, LabelClasses, read_classes
from datasets.lists.splits import choose_labelled, split_held_out
from datasets.samples.labelled import SegmentationAugment, SegmentationCropDataset
from datasets.samples.loader import make_pair_loader
from datasets.store.format import checksum_of
from datasets.store.volumes import VolumeStore, build_store, parse_spacing, spacing_text
from engine import distributed
from engine.checkpoint import find_wanted, load_checkpoint, set_aside, tell_resumed
from engine.device import make_scaler, pick_precision
from engine.distributed import World, main_decides
from engine.flags import RunInfo, run_main
from engine.logging import make_log
from engine.optim import decays
from engine.run_folder import claimed
from engine.schedules import CosineSchedule
from engine.segmentation.evaluation import evaluate
from engine.segmentation.flags import check_continuation, check_finetune_flags, make_finetune_flags
from engine.segmentation.loop import BEST, KIND, FinetuneOptions, FinetuneRun, finetune, holds_best
from engine.segmentation.report import TABLE
from engine.segmentation.segmenter import EVALUATION, StoreGridCases, judge_on_files, labelled_cases, open_segmenter
from engine.segmentation.setup import Preprocessing, settle_network, settle_preprocessing
from engine.segmentation.sliding_window import WindowOptions
from engine.signals import EXIT_INTERRUPTED, stop_early_when_asked
from losses.segmentation import make_dice_ce, rare_class_weights
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS, count_parameters, freeze, layer_groups
from models.weights_file import WeightsFile, read_weights_file


def make_flags():
    """The command line."""
    return make_finetune_flags(__doc__, sorted(SEGMENTERS), sorted(BUILT_IN))


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    check_finetune_flags(flags)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    plan = make_plan(flags)
    world = distributed.start(flags.device, flags.dist_timeout_min)
    with claimed(flags.output_dir, world):
        is_complete = start_and_train(flags, plan, world)
    distributed.stop()
    if not is_complete:
        raise SystemExit(EXIT_INTERRUPTED)


# What will be done, decided before anything starts


@dataclass(frozen=True)
class Plan:
    """The cases, the classes, how volumes are prepared, and the network with the weights it starts from."""

    training: list[Case]
    held_out: list[Case]
    judged: list[Case]
    classes: LabelClasses
    preprocessing: Preprocessing
    backbone: str
    feature_size: int
    weights: WeightsFile | None
    notes: list[str]

    @property
    def all_cases(self) -> list[Case]:
        """Every case of the run, once."""
        return list({case.name: case for case in self.training + self.held_out + self.judged}.values())


def make_plan(flags) -> Plan:
    """Read the data list and the weights' description, and settle what flags leave open; nothing is written."""
    training, held_out = split_list(flags)
    weights = None if flags.weights == "none" else read_weights_file(flags.weights)
    described = {} if weights is None else weights.description
    store_dir = store_folder(flags)
    in_store = None
    if (store_dir / "store.json").exists():
        in_store = plain_spacing(VolumeStore(store_dir, names=()).spacing_mm)
    given = {
        "spacing_mm": None if flags.spacing_mm is None else plain_spacing(parse_spacing(flags.spacing_mm)),
        "hu_min": flags.a_min,
        "hu_max": flags.a_max,
        "roi": [flags.roi_z, flags.roi_y, flags.roi_x],
    }
    preprocessing, notes = settle_preprocessing(given, described.get("preprocessing", {}), in_store)
    backbone, feature_size, more = settle_network(flags.backbone, flags.feature_size, described.get("backbone", {}))
    if backbone not in SEGMENTERS:
        raise ValueError(f"{flags.weights}: is for {backbone!r}; finetuning knows {', '.join(SEGMENTERS)}")
    SEGMENTERS[backbone].check_sizes(feature_size, preprocessing.roi)
    judged = held_out
    if flags.evaluate and flags.section != "validation":
        judged = labelled_cases(flags.json_list, flags.data_dir, flags.section)
    classes = read_classes(flags.json_list, flags.classes)
    return Plan(training, held_out, judged, classes, preprocessing, backbone, feature_size, weights, notes + more)


def split_list(flags) -> tuple[list[Case], list[Case]]:
    """Training cases (few-shot) and held-out ones, all with labels."""
    sections = [load_data_list(flags.json_list, flags.data_dir, name) for name in ("training", "validation")]
    training, held_out = ([case for case in cases if case.label is not None] for cases in sections)
    if not held_out and training:
        training, held_out = split_held_out(training, flags.held_out_share, flags.fold)
    return choose_labelled(training, flags.num_labelled, flags.fold), held_out


def store_folder(flags) -> Path:
    return Path(flags.store_dir or Path(flags.output_dir) / "store")


def plain_spacing(spacing_mm: tuple[float, float, float] | None) -> list[float] | str:
    """Voxel size as checkpoints write it."""
    return "native" if spacing_mm is None else list(spacing_mm)


def open_store(plan: Plan, flags, world: World) -> VolumeStore:
    """The volume store with all cases of the run; rank 0 adds those that are missing."""
    spacing_mm, store_dir = plan.preprocessing.spacing_mm, store_folder(flags)
    if world.is_main:
        report = build_store(plan.all_cases, store_dir, spacing_mm, num_workers=max(1, flags.num_workers))
        if report.failed:
            told = "; ".join(f"{name}: {reason}" for name, reason in report.failed.items())
            raise ValueError(f"{store_dir}: {len(report.failed)} cases cannot be used: {told}")
    distributed.wait_for_all(world)
    names = [case.name for case in plan.all_cases]
    return VolumeStore(store_dir, names, expected_spacing_mm=spacing_mm or "native")


# The network and everything that changes


def find_start(flags, description: dict, world: World) -> tuple[dict, Path] | None:
    """The checkpoint to go on from and its path, None to begin anew; nothing is written.

    Raises:
        CheckpointError: it is of another kind, or flags that decide the result have changed.
    """
    found = find_wanted(flags.resume, flags.output_dir, KIND, world)
    if found is not None:
        check_continuation(found[0], description, found[1])
    return found


def start_run(
    flags, plan: Plan, description: dict, resumed: tuple[dict, Path] | None, world: World
) -> tuple[FinetuneRun, str]:
    """Build the network, load what it starts from, and go on from `resumed` where there is such a checkpoint."""
    torch.manual_seed(flags.seed)
    kind = SEGMENTERS[plan.backbone]
    network = kind.build(1, len(plan.classes), plan.feature_size, flags.use_checkpoint)
    if plan.weights is not None:
        report = load_pretrained(network, plan.weights, flags.min_share, flags.weights_part)
        started, encoder = f"started from {report.tell()}", encoder_keys(report.loaded, plan)
    else:
        started, encoder = "started from random weights", encoder_keys(network.state_dict(), plan)
        if flags.freeze_encoder_steps:
            started += "; the encoder stands still all the same: a control, what freezing alone does (no --weights)"
    if flags.freeze_encoder_steps == -1:
        freeze(network, encoder)
    network.to(world.device)
    run = FinetuneRun(
        network,
        make_optimizer(network, flags, plan, world),
        make_scaler(pick_precision(flags.precision, world.device), world.device),
        description,
        frozen_keys=encoder if flags.freeze_encoder_steps > 0 else [],
    )
    if resumed is not None:
        run.restore(*resumed)
        started = tell_resumed(flags.resume, resumed)
        run.is_stopped = 0 < flags.patience <= run.num_without_gain  # more --patience goes on
        if run.best_step and not main_decides(world, lambda: holds_best(flags.output_dir, resumed[1])):
            run.forget_best()
            started += f"; its {BEST} is not in {flags.output_dir}: the best weights are those from here on"
    return run, started


def encoder_keys(keys: Iterable[str], plan: Plan) -> list[str]:
    """Those of a network's keys that belong to the encoder."""
    return [key for key in keys if key.startswith(SEGMENTERS[plan.backbone].encoder_key_prefixes)]


def make_optimizer(network: nn.Module, flags, plan: Plan, world: World) -> torch.optim.AdamW:
    """AdamW with a group per depth; biases, norms and other 1-D weights do not decay."""
    groups = layer_groups(network, SEGMENTERS[plan.backbone], flags.layer_decay, decays)
    for group in groups:
        group["weight_decay"] = flags.weight_decay if group["is_decayed"] else 0.0
    return torch.optim.AdamW(groups, lr=flags.lr, fused=True if world.device.type != "cpu" else None)


def describe_run(flags, plan: Plan, info: RunInfo) -> dict:
    """What a user of the finetuned network must know, and where it comes from, in plain values."""
    described = {} if plan.weights is None else plan.weights.description
    return {
        "backbone": {"name": plan.backbone, "feature_size": plan.feature_size, "in_channels": 1},
        "classes": plan.classes.as_dict(),
        "preprocessing": plan.preprocessing.as_dict(),
        "pretrained": {
            "path": flags.weights,
            **{k: described[k] for k in ("method", "step", "commit") if k in described},
        },
        "training_cases": [case.name for case in plan.training],
        "validation_cases": [case.name for case in plan.held_out],
        "contents": {
            "weights": None if plan.weights is None else checksum_of(Path(flags.weights).read_bytes()),
            "json_list": list_digest(flags.json_list),
        },
        "flags": info.flags,
        "commit": info.commit,
        "versions": info.versions,
    }


def list_digest(json_list: str) -> str:
    """A digest of what a run takes from a data list; other sections and its layout do not count."""
    content = json.loads(Path(json_list).read_text())
    return checksum_of(json.dumps([content.get(name) for name in ("training", "validation")]).encode())


def describe_start(flags, plan: Plan, run: FinetuneRun, store: VolumeStore, started: str, world: World) -> str:
    """What a user should see before the first step."""
    num_trained, num_all = count_parameters(run.network)
    known, precision = plan.preprocessing, pick_precision(flags.precision, world.device)
    shown = ", ".join(case.name for case in plan.training[:8]) + (", ..." if len(plan.training) > 8 else "")
    return "\n".join(
        [
            *(f"warning: {note}" for note in plan.notes),
            started,
            f"cases: {len(plan.training)} to train with ({shown}), {len(plan.held_out)} held out, fold {flags.fold}",
            f"organs: {len(plan.classes) - 1} ({', '.join(plan.classes.names[1:])})",
            f"volumes: spacing {spacing_text(store.spacing_mm)}, {known.hu_min:g} to {known.hu_max:g} HU, crops of "
            f"{' x '.join(map(str, known.roi))} voxels (D, H, W)",
            f"network: {plan.backbone}, feature size {plan.feature_size}, {num_trained / 1e6:.1f} of "
            f"{num_all / 1e6:.1f} M parameters trained, {precision} on {world.device}",
        ]
    )


# The run


def make_options(flags, world: World) -> FinetuneOptions:
    """Flags for the loop; they share their names."""
    shared = ("val_freq", "save_freq", "log_freq", "patience", "clip_grad", "seed")
    return FinetuneOptions(
        num_steps=flags.steps,
        num_freeze_steps=max(0, flags.freeze_encoder_steps),
        precision=pick_precision(flags.precision, world.device),
        **{name: getattr(flags, name) for name in shared},
    )


def start_and_train(flags, plan: Plan, world: World) -> bool:
    """Open the volumes, find where to start, train, and judge; True when the run is complete."""
    info = RunInfo.collect(flags)
    description = describe_run(flags, plan, info)
    resumed = find_start(flags, description, world)
    if world.is_main:
        info.write(flags.output_dir)
    store = open_store(plan, flags, world)
    run, started = start_run(flags, plan, description, resumed, world)
    if resumed is None and flags.resume == "none":
        distributed.wait_for_all(world)  # --weights may be one of those
        if world.is_main:
            set_aside(flags.output_dir)
    options = make_options(flags, world)
    log = make_log(world, flags.output_dir, options.num_steps, run.step)
    log.say(describe_start(flags, plan, run, store, started, world))
    is_complete = train(flags, plan, store, run, options, world, log)
    log.close()
    if is_complete and flags.evaluate:
        evaluate_best(flags, plan, store, options.precision, world)
    return is_complete


def train(flags, plan: Plan, store: VolumeStore, run: FinetuneRun, options: FinetuneOptions, world: World, log) -> bool:
    """Compose data, loss and validation, and run the loop; True when it is complete."""
    known = plan.preprocessing
    dataset = SegmentationCropDataset(
        store,
        [case.name for case in plan.training],
        plan.classes,
        known.roi,
        known.hu_min,
        known.hu_max,
        flags.foreground_share,
        SegmentationAugment() if flags.augment else SegmentationAugment.off(),
        flags.seed,
    )
    loader = make_pair_loader(
        dataset,
        flags.batch_size,
        world.rank,
        world.size,
        flags.num_workers,
        start_step=run.step,
        num_steps=options.num_steps,
        pin_memory=world.device.type == "cuda",
    )
    windows = WindowOptions(
        known.roi, known.hu_min, known.hu_max, flags.val_overlap, flags.window_batch, options.precision
    )
    names = [case.name for case in plan.held_out][: flags.num_val_cases or None]

    def validate() -> dict[str, float]:
        judged = evaluate(run.network, StoreGridCases(store, plan.classes), names, plan.classes.names, windows, world)
        return {"dice": judged.dice}

    lr = CosineSchedule(flags.lr, flags.min_lr, flags.steps, flags.warmup_steps)
    weights = rare_class_weights(dataset.count_voxels()).to(world.device) if flags.class_weights == "rare" else None
    return finetune(
        run,
        lambda network: distributed.wrap(network, world),
        make_dice_ce(weights),
        iter(loader),
        lr,
        options,
        validate,
        flags.output_dir,
        world,
        log,
    )


def evaluate_best(flags, plan: Plan, store: VolumeStore, precision: str, world: World) -> None:
    """Judge best.pth on the original grids; tables and picture go to OUTPUT_DIR/evaluation."""
    distributed.wait_for_all(world)
    best, folder = Path(flags.output_dir) / BEST, Path(flags.output_dir) / EVALUATION
    segmenter = open_segmenter(best, world.device)
    options = segmenter.window_options(flags.overlap, flags.window_batch, precision)
    trained = load_checkpoint(best, KIND)
    description = {
        "checkpoint": str(best),
        "section": flags.section,
        "weights": trained["pretrained"]["path"],
        "labelled training cases": len(trained["training_cases"]),
        "fold": trained["flags"]["fold"],
        "seed": trained["flags"]["seed"],
    }
    judge_on_files(segmenter, plan.judged, store, options, world, flags.nsd_mm, folder, description)
    if world.is_main:
        print((folder / TABLE).read_text(), flush=True)


if __name__ == "__main__":
    stop_early_when_asked()
    run_main(main)
