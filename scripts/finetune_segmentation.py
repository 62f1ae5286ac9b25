"""Finetune pretrained weights to segment organs (or train from scratch), and evaluate: FLARE22, BTCV, Decathlon lists.

Images are CT, or radiographs as PNG with PNG masks, for which networks are 2-D. They are MR where --store_dir holds MR:
make it first with scripts/prepare_volumes.py --modality mr. An MR may have several channels: a 4-D file, or a list of
files as the "image" of a case.

    python scripts/finetune_segmentation.py --weights alice_teacher.safetensors --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --output_dir results/finetune
    torchrun --nproc_per_node=4 scripts/finetune_segmentation.py --config configs/finetune_flare22.yaml \\
        --weights alice_teacher.safetensors --data_dir FLARE22 --json_list flare_labelled.json --output_dir results/all
    python scripts/finetune_segmentation.py --weights simsiam_2d.safetensors --batch_size 64 --window_batch 64 \\
        --data_dir FLARE22 --json_list flare_labelled.json --store_dir store --output_dir results/slices
    python scripts/finetune_segmentation.py --weights none --num_labelled 1 --fold 0 --seed 0 --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --output_dir results/scratch_1shot

Voxel size, HU window, crop, backbone and feature size come from the weights' own description; flags that differ win
with a warning. Weights that were pretrained on slices (--roi_z 1) are finetuned on slices, in 2-D; volumes are then
segmented slice by slice, and results have the slice-wise Dice that is published for 2-D networks beside organ Dice per
volume. The same command again resumes the run where it stopped (--resume auto); it is refused where flags
that decide the result have changed. SIGTERM and SIGUSR1 write a checkpoint and end the run with exit code 75. best.pth
is for scripts/predict.py and scripts/evaluate_segmentation.py.
"""

import functools
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.signals import EXIT_INTERRUPTED, StopRequest, exiting_when_asked, stop_early_when_asked

if __name__ == "__main__":
    stop_early_when_asked()  # before the imports below, which take seconds

import torch
from torch import nn

from datasets.ct.images import CT, NAMES
from datasets.lists.data_list import Case, load_data_list
from datasets.lists.label_classes import LabelClasses, read_classes
from datasets.lists.splits import choose_labelled, split_held_out
from datasets.samples.labelled import SegmentationAugment, SegmentationCropDataset
from datasets.samples.loader import make_pair_loader
from datasets.store.build import build_store, kind_to_store
from datasets.store.format import checksum_of, spacing_text, stored_mr_percentiles
from datasets.store.volumes import VolumeStore
from engine import distributed
from engine.checkpoint import describe_resumed, find_wanted, load_checkpoint, set_aside
from engine.device import explained_out_of_memory, make_scaler, pick_precision, use_channels_last
from engine.distributed import World, main_decides
from engine.flags import RunInfo, add_options, add_resume, make_parser, options_of, run_main
from engine.logging import make_log
from engine.optim import decays
from engine.run_folder import claimed
from engine.segmentation.evaluation import (
    EVALUATION,
    check_pixel_sizes,
    ct_reader,
    evaluate,
    file_cases,
    labelled_cases,
    stored_cases,
)
from engine.segmentation.flags import GROUPS, FinetuneOptions, check_continuation
from engine.segmentation.loop import BEST, FinetuneRun, finetune, holds_best
from engine.segmentation.memory import Memory, Recall, RecallOptions, Sam, Scan, check_can_remember
from engine.segmentation.remembering import learn_memory, remember_cases
from engine.segmentation.report import TABLE
from engine.segmentation.segmenter import Segmenter, open_segmenter
from engine.segmentation.setup import KIND, Setup, channels_of, given_by, resolve_setup
from engine.segmentation.sliding_window import WindowOptions
from losses.segmentation import make_dice_ce, rare_class_weights
from models.layers.batch_norm import synchronise_batch_norms
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS, count_parameters, freeze, layer_groups
from models.weights_file import WeightsFile, read_weights_file

MEMORY_FLAGS = (
    "batch_size window_batch roi_z roi_y roi_x feature_size precision use_checkpoint",
    "lower --batch_size (or --window_batch, if it happened in a validation), use --use_checkpoint or --precision bf16, "
    "or make the crops smaller",
)


def make_flags():
    """The command line."""
    parser = make_parser(__doc__)
    for title, kind in GROUPS.items():
        group = parser.add_argument_group(title)
        add_options(group, kind)
    add_resume(group)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    options = options_of(flags, FinetuneOptions)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    plan = make_plan(options)
    world = distributed.start(options.device, options.dist_timeout_min)
    with (
        claimed(options.output_dir, world),
        explained_out_of_memory(options, *MEMORY_FLAGS),
        distributed.explained_lost_rank(world, options.dist_timeout_min),
    ):
        is_complete = start_and_train(plan, RunInfo.collect(flags), world)
    distributed.stop()
    if not is_complete:
        raise SystemExit(EXIT_INTERRUPTED)


# What will be done, decided before anything starts


@dataclass(frozen=True)
class Plan:
    """The flags, the cases, the classes, how volumes are prepared, and the network with the weights it starts from."""

    options: FinetuneOptions
    training: list[Case]
    held_out: list[Case]
    judged: list[Case]
    classes: LabelClasses
    setup: Setup
    weights: WeightsFile  # without tensors: from scratch
    in_channels: int


def make_plan(options: FinetuneOptions) -> Plan:
    """Read the data list and the weights' description, and resolve what flags leave open; nothing is written."""
    training, held_out = split_list(options)
    judged = held_out
    if options.evaluate and options.section != "validation":
        judged = labelled_cases(options.json_list, options.data_dir, options.section)
    weights = WeightsFile("none", {})
    if options.weights != "none":
        weights = read_weights_file(options.weights, options.checkpoint_key)
    classes = read_classes(options.json_list, options.classes)
    mr_percentiles = stored_mr_percentiles(store_folder(options))
    setup = resolve_setup(
        weights.description,
        given_by(options),
        SEGMENTERS,
        store_folder(options),
        kind_to_store(training + held_out, mr_percentiles),
        mr_percentiles,
    )
    if options.evaluate:
        check_pixel_sizes(judged, options.tolerance_mm(classes.names))
    if options.memory:
        check_can_remember(setup.preprocessing)
    if options.random_contrast and setup.preprocessing.images != CT:
        kind = NAMES[setup.preprocessing.images]
        raise ValueError(f"--random_contrast changes CT by HU, and these cases are {kind}; expected 0")
    SEGMENTERS[setup.backbone].check_sizes(setup.feature_size, setup.preprocessing.roi)
    in_channels = channels_of([*training, *held_out, *judged], setup.preprocessing.images, options.in_channels)
    return Plan(options, training, held_out, judged, classes, setup, weights, in_channels)


def split_list(options: FinetuneOptions) -> tuple[list[Case], list[Case]]:
    """Training cases (few-shot) and held-out ones, all with labels."""
    sections = [load_data_list(options.json_list, options.data_dir, name) for name in ("training", "validation")]
    training, held_out = ([case for case in cases if case.label is not None] for cases in sections)
    if not held_out and training:
        training, held_out = split_held_out(training, options.held_out_share, options.fold)
    return choose_labelled(training, options.num_labelled, options.fold), held_out


def store_folder(options: FinetuneOptions) -> Path:
    return Path(options.store_dir or Path(options.output_dir) / "store")


def open_store(plan: Plan, world: World) -> VolumeStore:
    """The volume store with all cases of the run; rank 0 adds those that are missing."""
    known, store_dir = plan.setup.preprocessing, store_folder(plan.options)
    cases = list({case.name: case for case in plan.training + plan.held_out + plan.judged}.values())
    if world.is_main:
        num_workers, mr_percentiles = max(1, plan.options.num_workers), known.mr_percentiles
        report = build_store(cases, store_dir, known.spacing_mm, num_workers, mr_percentiles=mr_percentiles)
        if report.failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in report.failed.items())
            raise ValueError(f"{store_dir}: {len(report.failed)} cases cannot be used: {reasons}")
    distributed.wait_for_all(world)
    return VolumeStore(store_dir, [case.name for case in cases], expected_spacing_mm=known.spacing_mm or "native")


# The network and everything that changes


def start_run(
    plan: Plan, description: dict, resumed: tuple[dict, Path] | None, world: World
) -> tuple[FinetuneRun, str]:
    """Build the network, load what it starts from, and resume from `resumed` where there is such a checkpoint.

    Returns:
        The run, and one line that says where it starts.
    """
    options = plan.options
    torch.manual_seed(options.seed)
    kind = SEGMENTERS[plan.setup.backbone]
    spatial_dims = plan.setup.preprocessing.spatial_dims
    sizes = plan.in_channels, len(plan.classes), plan.setup.feature_size
    network = kind.build(*sizes, options.use_checkpoint, spatial_dims, options.hypercolumns)
    if world.size > 1:
        synchronise_batch_norms(network)
    keys, started = list(network.state_dict()), "started from random weights"
    if plan.weights.tensors:
        report = load_pretrained(network, plan.weights, options.min_share, options.weights_part)
        if plan.in_channels > 1 and report.misshapen:
            raise ValueError(
                f"--weights {options.weights}: {', '.join(report.misshapen[:3])}: they do not fit an input of "
                f"{plan.in_channels} channels; weights of one channel are adapted, of the same number taken as they are"
            )
        keys, started = report.loaded, f"started from {report.describe()}"
    elif options.freeze_encoder_steps:
        started += "; the encoder is frozen all the same: a control, what freezing alone does (no --weights)"
    encoder = [key for key in keys if key.startswith(kind.encoder_key_prefixes)]
    if options.freeze_encoder_steps == -1:
        freeze(network, encoder)
    network.to(world.device)
    if options.channels_last:
        use_channels_last(network)
    run = FinetuneRun(
        network,
        make_optimizer(network, plan),
        make_scaler(pick_precision(options.precision, world.device), world.device),
        description,
        frozen_keys=encoder if options.freeze_encoder_steps > 0 else [],
    )
    if resumed is not None:
        run.restore(*resumed)
        started = describe_resumed(options.resume, resumed)
        run.is_stopped = 0 < options.patience <= run.num_without_gain  # more --patience goes on
        if run.best_step and not main_decides(world, lambda: holds_best(options.output_dir, resumed[1])):
            run.forget_best()
            started += f"; its {BEST} is not in {options.output_dir}: the best weights are those from here on"
    return run, started


def make_optimizer(network: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW with a group per depth; biases, norms and other 1-D weights do not decay."""
    groups = layer_groups(network, SEGMENTERS[plan.setup.backbone], plan.options.layer_decay, decays)
    for group in groups:
        group["weight_decay"] = plan.options.weight_decay if group["is_decayed"] else 0.0
    return torch.optim.AdamW(groups, lr=plan.options.lr, fused=True)


def describe_run(plan: Plan, info: RunInfo) -> dict:
    """What a user of the finetuned network must know, and where it comes from, in plain values."""
    options, described = plan.options, plan.weights.description
    content = json.loads(Path(options.json_list).read_text())
    return {
        "backbone": {"name": plan.setup.backbone, "feature_size": plan.setup.feature_size}
        | {"in_channels": plan.in_channels, "hypercolumns": options.hypercolumns},
        "classes": plan.classes.as_dict(),
        "preprocessing": plan.setup.preprocessing.as_dict(),
        "pretrained": {"path": options.weights}
        | {name: described[name] for name in ("method", "step", "commit") if name in described},
        "training_cases": [case.name for case in plan.training],
        "validation_cases": [case.name for case in plan.held_out],
        "contents": {
            "weights": checksum_of(Path(plan.weights.path).read_bytes()) if plan.weights.tensors else None,
            "sam_checkpoint": checksum_of(Path(options.sam_checkpoint).read_bytes()) if options.memory else None,
            # Of what a run takes from the list; other sections and its layout do not count.
            "json_list": checksum_of(json.dumps([content.get(name) for name in ("training", "validation")]).encode()),
        },
        "flags": info.flags,
        "commit": info.commit,
        "versions": info.versions,
    }


def describe_start(plan: Plan, run: FinetuneRun, started: str, world: World) -> str:
    """What a user should see before the first step."""
    num_trained, num_all = count_parameters(run.network)
    setup, known = plan.setup, plan.setup.preprocessing
    precision = pick_precision(plan.options.precision, world.device)
    head = " with a head on hypercolumns" if plan.options.hypercolumns else ""
    shown = ", ".join(case.name for case in plan.training[:8]) + (", ..." if len(plan.training) > 8 else "")
    return "\n".join(
        [
            *(f"warning: {note}" for note in setup.notes),
            started,
            f"cases: {len(plan.training)} to train with ({shown}), {len(plan.held_out)} held out, fold "
            f"{plan.options.fold}",
            f"organs: {len(plan.classes) - 1} ({', '.join(plan.classes.names[1:])})",
            f"volumes: spacing {spacing_text(known.spacing_mm)}, {known.window_text}, crops of "
            f"{' x '.join(map(str, known.roi))} voxels (D, H, W)",
            f"network: {known.spatial_dims}-D {setup.backbone}{head}, feature size {setup.feature_size}, "
            f"input channels {plan.in_channels}, "
            f"{num_trained / 1e6:.1f} of {num_all / 1e6:.1f} M parameters trained, {precision} on {world.device}",
        ]
    )


# The run


def start_and_train(plan: Plan, info: RunInfo, world: World) -> bool:
    """Open the volumes, find where to start, train, and judge; True when the run is complete."""
    options, description = plan.options, describe_run(plan, info)
    resumed = find_wanted(options.resume, options.output_dir, KIND, world)
    if resumed is not None:
        check_continuation(resumed[0], description, resumed[1])
    store = open_store(plan, world)
    sam = Sam(options.sam_checkpoint, world.device) if options.memory else None
    if sam is not None:
        description["memory"] = memory_of(plan, store, sam, resumed, world)
    run, started = start_run(plan, description, resumed, world)
    if resumed is None and options.resume == "none":
        distributed.wait_for_all(world)  # --weights may be one of those
        if world.is_main:
            set_aside(options.output_dir)
    if world.is_main:
        info.write(options.output_dir)
    log = make_log(world, options.output_dir, options.steps, run.step)
    log.say(describe_start(plan, run, started, world))
    if run.step >= options.steps or run.is_stopped:
        log.say(f"nothing left to train: {run.step} of {options.steps} steps are done (--steps, --patience)")
    recall = None
    if sam is not None:
        recall = Recall(Memory(**description["memory"]), sam)
        log.say(recall.memory.describe())
    is_complete = train(plan, store, run, recall, world, log)
    log.close()
    with exiting_when_asked():  # the same command learns and evaluates again
        if is_complete and options.memory:
            main_decides(world, lambda: learn_memory(store, options, world.device))
        if is_complete and options.evaluate:
            evaluate_best(plan, store, world)
    return is_complete


def memory_of(plan: Plan, store: VolumeStore, sam: Sam, resumed: tuple[dict, Path] | None, world: World) -> dict:
    """What the run remembers, for its checkpoints: as the one has it that it goes on from, or made on rank 0."""
    if resumed is not None:
        return resumed[0]["memory"]
    made = main_decides(world, lambda: remember_cases(plan.training, store, plan.classes, sam, plan.options))
    return made.as_dict()


def train(plan: Plan, store: VolumeStore, run: FinetuneRun, recall: Recall | None, world: World, log) -> bool:
    """Compose data, loss and validation, and run the loop; True when it is complete."""
    options, known = plan.options, plan.setup.preprocessing
    augment = SegmentationAugment() if options.augment else SegmentationAugment.off()
    augment = replace(augment, random_contrast=options.random_contrast)
    names, case_weights = zip(*((case.name, case.weight) for case in plan.training))
    window = known.roi, known.hu_min, known.hu_max
    dataset = SegmentationCropDataset(
        store, names, plan.classes, *window, options.foreground_share, augment, options.seed, case_weights
    )
    steps, is_cuda = {"start_step": run.step, "num_steps": options.steps}, world.device.type == "cuda"
    loader = make_pair_loader(
        dataset, options.batch_size, world.rank, world.size, options.num_workers, **steps, pin_memory=is_cuda
    )
    precision = pick_precision(options.precision, world.device)
    windows = WindowOptions(
        known.roi, overlap=options.val_overlap, window_batch=options.window_batch, precision=precision
    )
    segmenter = Segmenter(run.network, plan.classes, known, windows, world.device, recall, plan.in_channels)
    held_out = [case.name for case in plan.held_out][: options.num_val_cases or None]
    read = ct_reader(plan.held_out, store)

    @functools.cache  # of every validation the same
    def scan_of(name: str) -> Scan | None:
        return None if recall is None else recall.scan(read(name), name)

    def validate(stop: StopRequest) -> dict[str, float] | None:
        judged = evaluate(segmenter, stored_cases(store, plan.classes, scan_of), held_out, world, stop=stop)
        return None if judged is None else judged.means()

    weights = rare_class_weights(dataset.count_voxels()).to(world.device) if options.class_weights == "rare" else None
    return finetune(run, make_dice_ce(weights), iter(loader), validate, options, world, log)


def evaluate_best(plan: Plan, store: VolumeStore, world: World) -> None:
    """Judge best.pth on the original grids; tables and picture go to OUTPUT_DIR/evaluation."""
    distributed.wait_for_all(world)
    options = plan.options
    best, folder = Path(options.output_dir) / BEST, Path(options.output_dir) / EVALUATION
    recall = RecallOptions(options.memory, options.sam_checkpoint)
    segmenter = open_segmenter(best, world.device, options.overlap, options.window_batch, options.precision, recall)
    load, names = file_cases(plan.judged, segmenter, store), [case.name for case in plan.judged]
    tolerance_mm = options.tolerance_mm(segmenter.classes.names)
    judged = evaluate(segmenter, load, names, world, tolerance_mm, progress=len(names) > 1)
    if world.is_main:
        trained = load_checkpoint(best, KIND)
        description = {
            "checkpoint": str(best),
            "section": options.section,
            "weights": trained["pretrained"]["path"],
            "labelled training cases": len(trained["training_cases"]),
            "fold": trained["flags"]["fold"],
            "seed": trained["flags"]["seed"],
            "NSD tolerance in mm": options.described_tolerance(),
        } | ({} if segmenter.recall is None else {"memory": segmenter.recall.memory.describe()})
        judged.write(folder, segmenter.classes.names, description)
        print((folder / TABLE).read_text(), flush=True)


if __name__ == "__main__":
    run_main(main)
