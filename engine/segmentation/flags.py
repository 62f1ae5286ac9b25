"""The flags of scripts/finetune_segmentation.py, the check that reports every mistake in them together, and which of
them a run that goes on may change.

Sizes are in voxels of the volume store: roi_x along W (towards the patient's left), roi_y along H (posterior), roi_z
along D (superior). Where a default says "the weights'", the value comes from the description of --weights.
"""

import warnings
from pathlib import Path

from engine.checkpoint import CheckpointError
from engine.flags import add_resume, add_switch, make_parser
from engine.run import changed_flags
from engine.segmentation.setup import FLAG_OF, agree, told

# A run that goes on keeps these: its result would else be told under flags that it was not trained with.
DECISIVE_FLAGS = {
    *("num_labelled", "fold", "held_out_share", "weights_part", "batch_size", "lr", "min_lr", "warmup_steps"),
    *("weight_decay", "layer_decay", "freeze_encoder_steps", "clip_grad", "class_weights", "foreground_share"),
    *("augment", "seed"),
}
# So it does these, but what they come to is compared: a file may have moved, a default may be spelt out.
FILE_FLAGS = ("weights", "json_list")
SETTLED_FLAGS = {"classes", "backbone", "feature_size", "spacing_mm", "a_min", "a_max", "roi_x", "roi_y", "roi_z"}
# These decide neither the weights nor which of them are best. Changes of all others are told.
FREE_FLAGS = {
    *("store_dir", "output_dir", "resume", "save_freq", "log_freq", "num_workers", "device", "dist_timeout_min"),
    *("min_share", "use_checkpoint", "evaluate", "section", "overlap", "nsd_mm", "window_batch"),
}


def make_finetune_flags(description: str, backbones: list[str], class_sets: list[str]):
    """The parser; the registries' names become choices."""
    parser = make_parser(description)
    add_data_flags(parser.add_argument_group("Data"), class_sets)
    add_network_flags(parser.add_argument_group("Network"), backbones)
    add_training_flags(parser.add_argument_group("Training"))
    add_judging_flags(parser.add_argument_group("Validation and evaluation"))
    add_running_flags(parser.add_argument_group("Running and output"))
    return parser


def add_data_flags(group, class_sets: list[str]) -> None:
    add = group.add_argument
    add("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    add("--json_list", type=str, default="", help="Decathlon data list with labels: training, validation")
    add("--store_dir", type=str, default="", help="volume store, made when missing; empty = OUTPUT_DIR/store")
    add("--classes", type=str, choices=["list", *class_sets], default="list", help="organs: the list's, or a known set")
    add("--num_labelled", type=int, default=0, help="labelled cases to train with (few-shot); 0 = all")
    add(
        "--fold",
        type=int,
        default=0,
        help="which of the fixed splits; 0 to 4 share no case while 5 x NUM_LABELLED cases are there",
    )
    add(
        "--held_out_share",
        type=float,
        default=0.2,
        help="share of the labelled cases to validate with where the list has no labelled validation section",
    )
    add(
        "--spacing_mm",
        type=float | str,
        nargs="+",
        default=None,
        help="voxel size in mm: D H W, one number, or native; unset = the weights', else the store's, else 2 1.5 1.5",
    )
    add("--a_min", type=float, default=None, help="HU that becomes 0; unset = the weights', else -125")
    add("--a_max", type=float, default=None, help="HU that becomes 1; unset = the weights', else 225")
    for axis, words in (("x", "W"), ("y", "H"), ("z", "D")):
        add(f"--roi_{axis}", type=int, default=None, help=f"crop along {words}, voxels; unset = the weights', else 96")
    add("--num_workers", type=int, default=4, help="loading processes per rank; 0 = load in the training process")


def add_network_flags(group, backbones: list[str]) -> None:
    add = group.add_argument
    add("--weights", type=str, default="none", help="pretrained weights (.safetensors, .pth); none = from scratch")
    add(
        "--weights_part",
        type=str,
        choices=["encoder", "whole"],
        default="encoder",
        help="what of them to load; whole = the reconstruction decoder too (student weights)",
    )
    add("--min_share", type=float, default=0.9, help="least share of that part's keys that must fit, 0 to 1")
    add("--backbone", type=str, choices=backbones, default=None, help="network; unset = the weights', else swin_unetr")
    add("--feature_size", type=int, default=None, help="channels at stride 2; unset = the weights', else 48")
    add_switch(group, "--use_checkpoint", False, "recompute activations instead of keeping them: less memory, slower")


def add_training_flags(group) -> None:
    add = group.add_argument
    add("--steps", type=int, default=20000, help="optimiser steps")
    add("--batch_size", type=int, default=2, help="crops per process and step")
    add("--lr", type=float, default=3e-4, help="peak learning rate of the last layers")
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end of the cosine")
    add("--warmup_steps", type=int, default=200, help="linear warm-up; 0 = off")
    add("--weight_decay", type=float, default=0.01, help="AdamW's; 0 = off")
    add("--layer_decay", type=float, default=1.0, help="learning rate per layer towards the input times this; 1 = off")
    add(
        "--freeze_encoder_steps",
        type=int,
        default=0,
        help="steps during which the encoder's loaded weights stand still (without --weights its random ones, as a "
        "control); 0 = off, -1 = the whole run",
    )
    add("--clip_grad", type=float, default=1.0, help="largest joint gradient norm; 0 = off")
    add(
        "--class_weights",
        type=str,
        choices=["none", "rare"],
        default="none",
        help="of the cross-entropy; rare = classes with fewer voxels weigh more: small organs appear earlier",
    )
    add("--foreground_share", type=float, default=0.8, help="share of crops centred near an organ, 0 to 1")
    add_switch(group, "--augment", True, "rotation, scaling and intensity augmentation")
    add("--seed", type=int, default=0, help="decides the new layers' weights, crops and augmentation (not the split)")


def add_judging_flags(group) -> None:
    add = group.add_argument
    add("--val_freq", type=int, default=500, help="steps between validations; 0 = none (best.pth is then the last)")
    add("--num_val_cases", type=int, default=0, help="validate with the first so many held-out cases; 0 = all")
    add("--val_overlap", type=float, default=0.25, help="overlap of windows during training, 0 to below 1")
    add("--patience", type=int, default=0, help="end after so many validations without a better Dice; 0 = off")
    add_switch(group, "--evaluate", True, "at the end, judge best.pth on the original grids, with tables and a picture")
    add("--section", type=str, default="validation", help="section of the data list for the evaluation at the end")
    add("--overlap", type=float, default=0.5, help="overlap of windows in the evaluation, 0 to below 1")
    add("--nsd_mm", type=float, default=2.0, help="tolerance of the normalised surface distance, mm; 0 = leave it out")
    add("--window_batch", type=int, default=2, help="windows per forward pass in validation and evaluation")


def add_running_flags(group) -> None:
    add = group.add_argument
    add("--output_dir", type=str, default="", help="checkpoint.pth, best.pth, log.txt, TensorBoard, run.json, results")
    add_resume(group)
    add("--save_freq", type=int, default=500, help="steps between checkpoints")
    add("--log_freq", type=int, default=20, help="steps between log lines")
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one")
    add(
        "--precision",
        type=str,
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto = bf16 on CUDA that has it, else fp32",
    )
    add("--dist_timeout_min", type=float, default=60.0, help="minutes that a rank waits for the others")


def check_finetune_flags(flags) -> None:
    """Raise one ValueError that lists every mistake in the flags."""
    problems = path_problems(flags) + number_problems(flags)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} flags need a change:\n  - " + "\n  - ".join(problems))


def path_problems(flags) -> list[str]:
    """Missing files and folders."""
    problems = [
        f"--{name} is not given" for name in ("data_dir", "json_list", "output_dir") if not getattr(flags, name)
    ]
    if flags.data_dir and not Path(flags.data_dir).is_dir():
        problems.append(f"--data_dir {flags.data_dir} is not a folder")
    if flags.json_list and not Path(flags.json_list).is_file():
        problems.append(f"--json_list {flags.json_list}: no such file")
    if flags.weights != "none" and not Path(flags.weights).is_file():
        problems.append(f"--weights {flags.weights}: no such file (none = from scratch)")
    if flags.resume not in ("auto", "none") and not Path(flags.resume).is_file():
        problems.append(f"--resume {flags.resume}: no such file (expected auto, none or a checkpoint)")
    return problems


def number_problems(flags) -> list[str]:
    """Numbers out of range, alone or against each other."""
    problems = []

    def expect(is_right: bool, names: str, expected: str) -> None:
        if not is_right:
            received = ", ".join(f"--{name} {getattr(flags, name)}" for name in names.split())
            problems.append(f"{received}: expected {expected}")

    for name in ("steps", "batch_size", "save_freq", "log_freq", "window_batch"):
        expect(getattr(flags, name) >= 1, name, "1 or more")
    from_zero = {
        "0 or more": "fold num_workers min_lr seed",
        "0 (all) or more": "num_labelled num_val_cases",
        "0 (off) or more": "warmup_steps weight_decay clip_grad val_freq patience nsd_mm",
    }
    for expected, names in from_zero.items():
        for name in names.split():
            expect(getattr(flags, name) >= 0, name, expected)
    expect(flags.feature_size is None or flags.feature_size >= 1, "feature_size", "1 or more")
    for name in ("lr", "dist_timeout_min"):
        expect(getattr(flags, name) > 0, name, "more than 0")
    for name in ("val_overlap", "overlap"):
        expect(0 <= getattr(flags, name) < 1, name, "0 to below 1")
    expect(0 <= flags.min_share <= 1, "min_share", "a share between 0 and 1")
    expect(0 <= flags.foreground_share <= 1, "foreground_share", "a share between 0 and 1")
    expect(0 < flags.layer_decay <= 1, "layer_decay", "above 0 and up to 1 (1 = off)")
    expect(flags.freeze_encoder_steps >= -1, "freeze_encoder_steps", "-1 (always), 0 (off) or more")
    expect(flags.min_lr <= flags.lr, "min_lr lr", "an end not above the peak")
    expect(flags.warmup_steps <= flags.steps, "warmup_steps steps", "a warm-up no longer than the run")
    expect(not flags.patience or flags.val_freq > 0, "patience val_freq", "validations, without which nothing can stop")
    return problems


# Going on


def check_continuation(before: dict, now: dict, path: str | Path) -> None:
    """Refuse to go on from a checkpoint whose result other flags decided; warn of other changes.

    Args:
        before: the checkpoint, of which "flags", "contents" (digests of files), "backbone", "preprocessing", "classes"
            and "step" are compared.
        now: the same of this run, without "step".
        path: the checkpoint's, for the message.

    Raises:
        CheckpointError: naming every such flag with both values.
    """
    changed = changed_flags(before.get("flags", {}), now["flags"])
    refused = [text for name, text in changed.items() if name in DECISIVE_FLAGS]
    refused += file_changes(before, now) + settled_changes(before, now)
    if now["flags"]["steps"] < before["step"]:
        refused.append(f"--steps {now['flags']['steps']}, of which {before['step']} are done")
    if refused:
        raise CheckpointError(
            f"{path} was trained with other flags: {', '.join(refused)}. Give it those of before to go on, or begin "
            "anew with --resume none (which replaces that run) or another --output_dir"
        )
    compared = DECISIVE_FLAGS | FREE_FLAGS | SETTLED_FLAGS | set(FILE_FLAGS)
    warned = [text for name, text in changed.items() if name not in compared]
    if warned:
        warnings.warn(f"{path} was trained with other flags, and goes on with: {', '.join(warned)}", stacklevel=2)


def file_changes(before: dict, now: dict) -> list[str]:
    """Files whose content differs; where the checkpoint has no digests, files at another path."""
    changes = []
    for name in FILE_FLAGS:
        old, new = before.get("flags", {}).get(name), now["flags"][name]
        if old is None:
            continue
        if "contents" in before:
            is_same = before["contents"].get(name) == now["contents"].get(name)
        else:
            is_same = Path(old).resolve() == Path(new).resolve()
        if not is_same:
            changes.append(f"--{name} {old} (its content has changed)" if old == new else f"--{name} {old} -> {new}")
    return changes


def settled_changes(before: dict, now: dict) -> list[str]:
    """What flags, weights and store together have settled otherwise."""
    names = {"--backbone": "name", "--feature_size": "feature_size"}
    pairs = [(flag, *(side.get("backbone", {}).get(name) for side in (before, now))) for flag, name in names.items()]
    pairs += [
        (flag, *(side.get("preprocessing", {}).get(name) for side in (before, now))) for name, flag in FLAG_OF.items()
    ]
    changes = [
        f"{flag} {told(old)} -> {told(new)}" for flag, old, new in pairs if old is not None and not agree(old, new)
    ]
    organs = [side.get("classes", {}).get("names") for side in (before, now)]
    if organs[0] is not None and before["classes"] != now["classes"]:
        changes.append("--classes " + " -> ".join(", ".join(names[1:]) for names in organs))
    return changes
