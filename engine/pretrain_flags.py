"""The flags of main_ddp.py and the check that reports every mistake in them together, before anything starts.

Names follow the published project where it has one. Sizes are in voxels of the volume store, roi_x along W (towards the
patient's left), roi_y along H (posterior), roi_z along D (superior).
"""

from collections.abc import Callable
from pathlib import Path

from engine.flags import add_resume, add_switch, make_parser
from engine.schedules import peak_lr
from losses.distillation import CENTRING_CHOICES, RECON_CHOICES

WEIGHT_DECAY_END = 0.4


def make_pretrain_flags(
    description: str,
    pairings: list[str],
    backbones: list[str],
    casa_variants: list[str],
    trusted: tuple[float, float],
):
    """The parser of main_ddp.py; the registries' names become choices, `trusted` min_score and max_cycle_mm."""
    parser = make_parser(description)
    add_data_flags(parser.add_argument_group("Data"))
    add_view_flags(parser.add_argument_group("Views"), pairings, *trusted)
    add_model_flags(parser.add_argument_group("Networks"), backbones, casa_variants)
    add_loss_flags(parser.add_argument_group("Losses"))
    add_optimiser_flags(parser.add_argument_group("Optimisation"))
    add_running_flags(parser.add_argument_group("Running"))
    add_output_flags(parser.add_argument_group("Output"))
    add_probe_flags(parser.add_argument_group("Frozen probes"))
    return parser


def add_data_flags(group) -> None:
    add = group.add_argument
    add("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    add("--json_list", type=str, default="", help="data list (scripts/create_json.py): training, validation")
    add("--embed_dir", type=str, default="", help="folder of the correspondence table; needed by --pairing sam")
    add("--table_file", type=str, default="", help="correspondences.npy; empty = the one in --embed_dir")
    add("--store_dir", type=str, default="", help="volume store, made when missing; empty = OUTPUT_DIR/store")
    add(
        "--spacing_mm",
        type=float | str,
        nargs="+",
        default=None,
        help="voxel size in mm of the store: D H W, one number, or native; unset = the store's, 2 1.5 1.5 if made here",
    )
    add("--num_workers", type=int, default=4, help="loading processes per rank; 0 = load in the training process")


def add_view_flags(group, pairings: list[str], min_score: float, max_cycle_mm: float) -> None:
    add = group.add_argument
    add("--pairing", type=str, choices=pairings, default="sam", help="how two views are paired")
    add("--roi_x", type=int, default=96, help="crop size along W, voxels (multiple of 32 for swin_unetr, else 16)")
    add("--roi_y", type=int, default=96, help="crop size along H, voxels")
    add("--roi_z", type=int, default=96, help="crop size along D, voxels")
    add("--a_min", type=float, default=-125.0, help="HU that becomes 0")
    add("--a_max", type=float, default=225.0, help="HU that becomes 1")
    add("--mask_ratio", type=float, default=0.75, help="share of blocks hidden from the student; 0 = off")
    add("--mask_block", type=int, default=16, help="side of a mask block, voxels")
    add(
        "--min_score",
        type=float,
        default=min_score,
        help="lowest score of a matched pair, -1 to 1; -1 = any",
    )
    add(
        "--max_cycle_mm",
        type=float,
        default=max_cycle_mm,
        help="largest cycle error of one, mm; 1e6 = any",
    )
    add("--iou_range", type=float, nargs=2, default=[0.3, 0.6], help="IoU of two crops of one volume, low high")
    add(
        "--jitter_mm",
        type=float,
        default=30.0,
        help="how far the crops of a matched pair may lie off its points along each axis, mm; 0 = centred at them",
    )
    add_switch(group, "--augment", True, "intensity augmentation, another one for every view")


def add_model_flags(group, backbones: list[str], casa_variants: list[str]) -> None:
    add = group.add_argument
    add("--backbone", type=str, choices=backbones, default="swin_unetr", help="network to pretrain")
    add("--feature_size", type=int, default=48, help="channels at stride 2 (multiple of 12; nnformer: of 6)")
    add("--casa_variant", type=str, choices=casa_variants, default="figure", help="CASA as drawn, or as released")
    add("--casa_heads", type=int, default=8, help="attention heads of CASA")
    add("--casa_head_dim", type=int, default=64, help="width of one head")
    add("--casa_hidden_dim", type=int, default=2048, help="width of CASA's feed-forward block")
    add(
        "--casa_cosine_scale",
        type=float,
        default=0.0,
        help="compare CASA's queries and keys by cosine, times a trained scale that starts here; 0 = off",
    )
    add("--query_stride", type=int, default=16, help="stride of the encoder tokens that CASA asks with, voxels")
    add("--key_stride", type=int, default=8, help="stride of the tokens that CASA asks, voxels")
    add(
        "--cls_features",
        type=str,
        choices=["deepest", "multiscale"],
        default="deepest",
        help="what cls is: pooled tokens of the deepest stage, or of all stages joined",
    )
    add("--out_dim", type=int, default=512, help="width of the compared distributions")
    add("--head_hidden_dim", type=int, default=2048, help="width of the head's hidden layers")
    add("--head_bottleneck_dim", type=int, default=256, help="width before the head's last layer")
    add_switch(group, "--shared_head", False, "student: tokens share the last layer of cls")
    add_switch(group, "--shared_head_teacher", True, "teacher: tokens share the last layer of cls")
    add_switch(group, "--norm_last_layer", True, "keep the gains of the last layers at 1")
    add(
        "--checkpoint_file",
        type=str,
        default="",
        help="weights to start from (any of ours, or MONAI names) that fit this encoder; empty = none",
    )


def add_loss_flags(group) -> None:
    add = group.add_argument
    add("--lambda1", type=float, default=1.0, help="weight of loss_cls, between patients; 0 = off")
    add("--lambda2", type=float, default=1.0, help="weight of loss_tokens, through CASA; 0 = off")
    add("--lambda3", type=float, default=10.0, help="weight of loss_recon; 0 = off")
    add("--recon_on", type=str, choices=list(RECON_CHOICES), default="masked", help="voxels that are reconstructed")
    add("--student_temp", type=float, default=0.1, help="temperature of the student's softmax")
    add("--teacher_temp", type=float, default=0.07, help="temperature of the teacher's softmax after its warm-up")
    add("--warmup_teacher_temp", type=float, default=0.04, help="temperature of the teacher's softmax at the start")
    add("--warmup_teacher_temp_epochs", type=int, default=30, help="epochs from the one to the other; 0 = none")
    add(
        "--centring",
        type=str,
        choices=list(CENTRING_CHOICES),
        default="mean",
        help="against collapse: take a running mean off the teacher's logits (DINO), or balance the rows of every "
        "forward pass (SwAV): for few views a step",
    )
    add("--centre_momentum", type=float, default=0.9, help="momentum of the centres, per step; with --centring mean")
    add("--momentum_teacher", type=float, default=0.996, help="EMA momentum at the start; rises to 1 along a cosine")


def add_optimiser_flags(group) -> None:
    add = group.add_argument
    add("--epochs", type=int, default=1000, help="length of the run")
    add("--steps_per_epoch", type=int, default=0, help="optimiser steps; 0 = training cases / effective batch")
    add("--batch_size", type=int, default=8, help="pairs per process and forward pass")
    add(
        "--accumulate_steps",
        type=int,
        default=1,
        help="forward passes per optimiser step; losses, gradients and centres are the big batch's, monitors that "
        "compare its rows (feature_std, casa_cos_*) see one pass each; 1 = off",
    )
    add("--lr", type=float, default=1e-4, help="peak learning rate, used as given (see --lr_reference_batch)")
    add(
        "--lr_reference_batch",
        type=int,
        default=0,
        help="multiply --lr by effective batch / this; 0 = off, 256 = DINO's rule",
    )
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end; must not exceed the peak")
    add("--warmup_epochs", type=float, default=10.0, help="linear warm-up of the learning rate, epochs; 0 = off")
    add("--weight_decay", type=float, default=0.04, help="at the start; 0 = off")
    add(
        "--weight_decay_end",
        type=float | None,
        default=None,
        help=f"at the end, along a cosine; unset = {WEIGHT_DECAY_END}, or 0 with --weight_decay 0",
    )
    add("--clip_grad", type=float, default=3.0, help="largest joint gradient norm of all trained modules; 0 = off")
    add("--freeze_last_layer", type=float, default=1.0, help="epochs that the head's last layers stand still; 0 = off")
    add("--seed", type=int, default=0, help="decides weights, pairs, masks and augmentation")


def add_running_flags(group) -> None:
    add = group.add_argument
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one")
    add(
        "--precision",
        type=str,
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto = bf16 on CUDA that has it, else fp32",
    )
    add_switch(group, "--use_fp16", False, "short for --precision fp16")
    add_switch(group, "--use_checkpoint", False, "recompute activations instead of keeping them: less memory, slower")
    add_switch(group, "--channels_last", False, "3-D convolutions in channels-last layout: same numbers, other speed")
    add_switch(group, "--cudnn_benchmark", False, "cuDNN tries its algorithms at the first step, and keeps the fastest")
    add_switch(group, "--compile", False, "torch.compile: a slow first step, then faster ones; needs a C++ compiler")
    add(
        "--nan_policy",
        type=str,
        choices=["stop", "skip"],
        default="stop",
        help="on a non-finite loss: stop all ranks, or skip the step",
    )
    add(
        "--profile_steps",
        type=int,
        default=0,
        help="record so many steps after the first: OUTPUT_DIR/trace.json.gz for ui.perfetto.dev, a table; 0 = off",
    )
    add("--dist_timeout_min", type=float, default=30.0, help="minutes that a rank waits for the others")


def add_output_flags(group) -> None:
    add = group.add_argument
    add("--output_dir", type=str, default="", help="checkpoints, log.txt, TensorBoard, pictures, run.json")
    add_resume(group)
    add("--saveckp_freq", type=int, default=1, help="epochs between checkpoints")
    add("--keep_freq", type=int, default=0, help="epochs between numbered checkpoints that stay; 0 = none")
    add("--log_freq", type=int, default=10, help="steps between log lines")
    add("--picture_freq", type=int, default=500, help="steps between pictures; 0 = none")
    add("--val_freq", type=int, default=10, help="epochs between validations; 0 = none")
    add("--num_val_pairs", type=int, default=32, help="held-out pairs of a validation, rounded up to whole batches")


def add_probe_flags(group) -> None:
    add = group.add_argument
    add(
        "--probe_freq",
        type=int,
        default=0,
        help="epochs between frozen probes of organs; 0 = none",
    )
    add(
        "--probe_json_list",
        type=str,
        default="",
        help="list of labelled cases to probe with, paths from --data_dir; empty = those of --json_list",
    )
    add("--probe_voxels", type=int, default=50, help="voxels per organ and case that a probe reads")
    add("--probe_cases", type=int, default=10, help="most cases that teach a probe, and that judge it; 0 = all")


def roi_of(flags) -> tuple[int, int, int]:
    """The crop as (D, H, W) in voxels."""
    return flags.roi_z, flags.roi_y, flags.roi_x


def weight_decay_end(flags) -> float:
    """Weight decay at the end of the run: as given, or by default off where it begins switched off."""
    if flags.weight_decay_end is not None:
        return flags.weight_decay_end
    return WEIGHT_DECAY_END if flags.weight_decay else 0.0


def effective_batch(flags, world_size: int) -> int:
    """Pairs per optimiser step over all ranks and forward passes."""
    return flags.batch_size * flags.accumulate_steps * world_size


def check_flags(flags, world_size: int, further: list[Callable[[], object]]) -> None:
    """Report every mistake in the flags in one error.

    Args:
        world_size: number of processes.
        further: functions that raise ValueError for mistakes that only the rooms know (sizes of networks, masks).

    Raises:
        ValueError: lists all of them.
    """
    problems = [*path_problems(flags), *number_problems(flags, world_size)]
    for check in further:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} flags need a change:\n  - " + "\n  - ".join(problems))


def path_problems(flags) -> list[str]:
    """Missing or unsuitable files and folders."""
    problems = []
    for name in ("data_dir", "json_list", "output_dir"):
        if not getattr(flags, name):
            problems.append(f"--{name} is not given")
    if flags.data_dir and not Path(flags.data_dir).is_dir():
        problems.append(f"--data_dir {flags.data_dir} is not a folder")
    for name in ("json_list", "table_file", "checkpoint_file", "probe_json_list"):
        if getattr(flags, name) and not Path(getattr(flags, name)).is_file():
            problems.append(f"--{name} {getattr(flags, name)}: no such file")
    if flags.resume not in ("auto", "none") and not Path(flags.resume).is_file():
        problems.append(f"--resume {flags.resume}: no such file (expected auto, none or a checkpoint)")
    if flags.pairing == "sam" and not flags.table_file:
        problems += table_problems(flags)
    return problems


def table_problems(flags) -> list[str]:
    """`--pairing sam` without a correspondence table, and the two commands that make one."""
    if flags.embed_dir and (Path(flags.embed_dir) / "correspondences.npy").is_file():
        return []
    where = (
        f"--embed_dir {flags.embed_dir} holds no correspondences.npy" if flags.embed_dir else "--embed_dir is not given"
    )
    folder = flags.embed_dir or "EMBED_DIR"
    return [
        f"{where}, which --pairing sam needs. Make it with `python scripts/generate_sam_embeddings.py "
        f"--checkpoint_file SAM.pth --data_dir {flags.data_dir} --json_list {flags.json_list} --embed_dir {folder}` "
        f"and then `python scripts/mine_pairs.py --embed_dir {folder} --json_list {flags.json_list}`; or choose "
        "--pairing iou or random"
    ]


def number_problems(flags, world_size: int) -> list[str]:
    """Numbers out of range, alone or against each other."""
    problems = []

    def expect(is_right: bool, names: str, expected: str) -> None:
        if not is_right:
            received = ", ".join(f"--{name} {getattr(flags, name)}" for name in names.split())
            problems.append(f"{received}: expected {expected}")

    one_or_more = "epochs batch_size accumulate_steps out_dim log_freq saveckp_freq num_val_pairs probe_voxels"
    for name in one_or_more.split():
        expect(getattr(flags, name) >= 1, name, "1 or more")
    zero_or_more = "num_workers steps_per_epoch lr_reference_batch min_lr warmup_epochs weight_decay"
    zero_or_more += " clip_grad freeze_last_layer warmup_teacher_temp_epochs keep_freq picture_freq val_freq seed"
    zero_or_more += " probe_freq probe_cases profile_steps"
    for name in zero_or_more.split():
        expect(getattr(flags, name) >= 0, name, "0 (off) or more")
    expect(weight_decay_end(flags) >= 0, "weight_decay_end", "0 (off) or more")
    for name in ("lr", "student_temp", "teacher_temp", "warmup_teacher_temp", "dist_timeout_min"):
        expect(getattr(flags, name) > 0, name, "more than 0")
    expect(0 <= flags.momentum_teacher <= 1, "momentum_teacher", "a momentum between 0 and 1")
    expect(flags.a_min < flags.a_max, "a_min a_max", "a window whose low end is below its high end (HU)")
    expect(flags.warmup_epochs <= flags.epochs, "warmup_epochs epochs", "a warm-up no longer than the run")
    recon_needs_mask = flags.lambda3 > 0 and flags.recon_on == "masked" and flags.mask_ratio <= 0
    expect(not recon_needs_mask, "mask_ratio lambda3 recon_on", "masked voxels to reconstruct, or --recon_on all")
    expect(
        not (flags.use_fp16 and flags.precision not in ("auto", "fp16")), "use_fp16 precision", "one number format only"
    )
    peak = peak_lr(flags.lr, effective_batch(flags, world_size), flags.lr_reference_batch)
    if flags.min_lr > peak:
        problems.append(
            f"--min_lr {flags.min_lr:g} is above the peak learning rate {peak:g} (--lr {flags.lr:g}, effective batch "
            f"{effective_batch(flags, world_size)}, --lr_reference_batch {flags.lr_reference_batch}): the rate would "
            "rise instead of decay; lower --min_lr or raise --lr"
        )
    return problems
