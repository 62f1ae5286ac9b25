"""The flags of scripts/finetune_segmentation.py, and which of them a resumed run may change.

Sizes are in voxels of the volume store: roi_x along W (towards the patient's left), roi_y along H (posterior), roi_z
along D (superior). Where a default says "the weights'", the value comes from the description of --weights.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets.ct.images import CT
from datasets.lists.label_classes import BUILT_IN
from engine.checkpoint import CheckpointError
from engine.flags import DeviceOptions, FlagChecks, flag_names
from engine.run import changed_flags
from engine.segmentation.memory import MemoryOptions
from engine.segmentation.metrics import FLARE22_TOLERANCES_MM, Tolerances
from engine.segmentation.setup import DEFAULTS, FLAG_OF, agree, as_typed
from engine.segmentation.sliding_window import WindowOptions
from models.segmenters import SEGMENTERS


@dataclass(frozen=True)
class DataOptions:
    """Cases, classes and crops.

    Attributes:
        data_dir: folder that the data list's paths start from
        json_list: Decathlon data list with labels: training, validation
        store_dir: volume store, made when missing; empty = OUTPUT_DIR/store. Of MR it must be there
            (scripts/prepare_volumes.py --modality mr), as only it says that volumes are MR
        classes: organs: the list's, or a known set
        num_labelled: labelled cases to train with (few-shot); 0 = all
        fold: which of the fixed splits; 0 to 4 share no case while 5 x NUM_LABELLED cases are there
        held_out_share: share of the labelled cases to validate with where the list has no labelled validation section
        spacing_mm: voxel size in mm: D H W, one number, or native; unset = the weights', else the store's, else
            2 1.5 1.5, of radiographs native
        a_min: HU that becomes 0; unset = the weights', else -125, of MR -1000, of radiographs the darkest value of each
        a_max: HU that becomes 1; unset = the weights', else 225, of MR 1000, of radiographs the brightest value of each
        roi_x: crop along W, voxels; unset = the weights', else 96
        roi_y: crop along H, voxels; unset = the weights', else 96
        roi_z: crop along D, voxels; 1 = slices, for a 2-D network; unset = the weights', else 96
        num_workers: loading processes per rank; 0 = load in the training process
    """

    data_dir: str = ""
    json_list: str = ""
    store_dir: str = ""
    classes: str = field(default="list", metadata={"choices": ["list", *sorted(BUILT_IN)]})
    num_labelled: int = 0
    fold: int = 0
    held_out_share: float = 0.2
    spacing_mm: tuple[float | str, ...] | None = None
    a_min: float | None = None
    a_max: float | None = None
    roi_x: int | None = None
    roi_y: int | None = None
    roi_z: int | None = None
    num_workers: int = 4


@dataclass(frozen=True)
class NetworkOptions:
    """The network and the weights that it starts from.

    Attributes:
        weights: pretrained weights (.safetensors, .pth, hf://owner/name); none = from scratch
        checkpoint_key: which network of a file that holds a student and a teacher; auto = our checkpoints' student
        weights_part: what of them to load; whole = the reconstruction decoder too (student weights)
        min_share: least share of that part's keys that must fit, 0 to 1
        backbone: network; unset = the weights', else swin_unetr
        feature_size: channels at stride 2; unset = the weights', else 48
        in_channels: of the images: MR in 4-D files, or in lists of files, has several; unset = as many as the files
            have. Pretrained weights of one channel are repeated, and divided by the number
        hypercolumns: also read the classes from the encoder's joined maps, beside the decoder, which learns slowly: for
            runs of some hundred steps; the network is then not its library's alone
        use_checkpoint: recompute activations instead of keeping them: less memory, slower
    """

    weights: str = "none"
    checkpoint_key: Literal["auto", "student", "teacher"] = "auto"
    weights_part: Literal["encoder", "whole"] = "encoder"
    min_share: float = 0.9
    backbone: str | None = field(default=None, metadata={"choices": sorted(SEGMENTERS)})
    feature_size: int | None = None
    in_channels: int | None = None
    hypercolumns: bool = False
    use_checkpoint: bool = False


@dataclass(frozen=True)
class TrainingOptions:
    """Optimisation and sampling.

    Attributes:
        steps: optimiser steps
        batch_size: crops per process and step
        lr: peak learning rate of the last layers
        min_lr: learning rate at the end of the cosine
        warmup_steps: linear warm-up; 0 = off
        weight_decay: AdamW's; 0 = off
        layer_decay: learning rate per layer towards the input times this; 1 = off
        freeze_encoder_steps: steps during which the encoder's loaded weights are frozen (without --weights its random
            ones, as a control); 0 = off, -1 = the whole run
        clip_grad: largest joint gradient norm; 0 = off
        class_weights: of the cross-entropy; rare = classes with fewer voxels weigh more: small organs appear earlier
        foreground_share: share of crops centred near an organ, 0 to 1
        augment: rotation, scaling and intensity augmentation
        random_contrast: share of crops whose organs and tissues get random intensities, noise and sharpness, as in
            SynthSeg: for networks that meet other scanners and contrast phases; CT only; 0 = off
        seed: decides the new layers' weights, crops and augmentation (not the split)
    """

    steps: int = 20000
    batch_size: int = 2
    lr: float = 3e-4
    min_lr: float = 1e-6
    warmup_steps: int = 200
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    freeze_encoder_steps: int = 0
    clip_grad: float = 1.0
    class_weights: Literal["none", "rare"] = "none"
    foreground_share: float = 0.8
    augment: bool = True
    random_contrast: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation on the files' own voxels.

    Attributes:
        section: section of the data list to evaluate
        overlap: overlap of windows in the evaluation, 0 to below 1
        window_batch: windows per forward pass
        nsd_mm: tolerance of the normalised surface distance, mm, the same for all organs; 0 = leave it out (radiographs
            whose files do not say their pixel size need 0)
        flare22_nsd: take FLARE22's tolerance of each organ (2 to 7 mm) instead of --nsd_mm
    """

    section: str = "validation"
    overlap: float = WindowOptions.overlap
    window_batch: int = WindowOptions.window_batch
    nsd_mm: float = 2.0
    flare22_nsd: bool = False

    def tolerance_mm(self, names: Sequence[str]) -> Tolerances:
        """NSD's tolerance of all organs, or of each.

        Args:
            names: of the channels, background first.

        Raises:
            ValueError: an organ that FLARE22 does not have.
        """
        if not self.flare22_nsd:
            return self.nsd_mm
        if strangers := [name for name in names[1:] if name not in FLARE22_TOLERANCES_MM]:
            raise ValueError(
                f"--flare22_nsd: FLARE22 has no tolerance for {', '.join(strangers[:5])}; give one for all organs with "
                "--nsd_mm"
            )
        return {name: FLARE22_TOLERANCES_MM[name] for name in names[1:]}

    def described_tolerance(self) -> float | str:
        """For reports."""
        return "FLARE22's, of each organ" if self.flare22_nsd else self.nsd_mm


@dataclass(frozen=True)
class JudgingOptions(EvaluationOptions):
    """Validation while training, and evaluation at the end.

    Attributes:
        val_freq: steps between validations; 0 = none (best.pth is then the last)
        num_val_cases: validate with the first so many held-out cases; 0 = all
        val_overlap: overlap of windows during training, 0 to below 1
        patience: end after so many validations without a better Dice; 0 = off
        evaluate: at the end, judge best.pth on the original grids, with tables and a picture
    """

    val_freq: int = 500
    num_val_cases: int = 0
    val_overlap: float = 0.25
    patience: int = 0
    evaluate: bool = True


@dataclass(frozen=True)
class RunningOptions(DeviceOptions):
    """Files, and how to compute.

    Attributes:
        channels_last: 3-D convolutions in channels-last layout: same numbers but for rounding, faster or as fast
        output_dir: checkpoint.pth, best.pth, log.txt, TensorBoard, run.json, results
        save_freq: steps between checkpoints
        log_freq: steps between log lines
        dist_timeout_min: minutes that a rank waits for the others
    """

    channels_last: bool = True
    output_dir: str = ""
    save_freq: int = 500
    log_freq: int = 20
    dist_timeout_min: float = 60.0


GROUPS = {
    "Data": DataOptions,
    "Network": NetworkOptions,
    "Training": TrainingOptions,
    "Validation and evaluation": JudgingOptions,
    "Memory": MemoryOptions,
    "Running and output": RunningOptions,
}


@dataclass(frozen=True)
class FinetuneOptions(DataOptions, NetworkOptions, TrainingOptions, JudgingOptions, MemoryOptions, RunningOptions):
    """All flags of a finetuning run; `resume` is that of `engine.checkpoint.find_wanted`.

    Raises:
        ValueError: lists every mistake in them, also files that are missing.
    """

    resume: str = "auto"

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        for name in ("data_dir", "json_list", "output_dir"):
            if not getattr(self, name):
                checks.problems.append(f"--{name} is not given")
        if self.data_dir and not Path(self.data_dir).is_dir():
            checks.problems.append(f"--data_dir {self.data_dir} is not a folder")
        for name, others in (("json_list", [""]), ("weights", ["none"]), ("resume", ["auto", "none"])):
            value = getattr(self, name)
            if value not in others and not Path(value).is_file():
                hint = f" (expected a file, or {' or '.join(others)})" if any(others) else ""
                checks.problems.append(f"--{name} {value}: no such file{hint}")
        each, expect = checks.expect_each, checks.expect
        each(
            lambda value: value >= 1,
            "steps batch_size save_freq log_freq window_batch feature_size in_channels",
            "1 or more",
        )
        each(lambda value: value >= 0, "fold num_workers min_lr seed", "0 or more")
        each(lambda value: value >= 0, "num_labelled num_val_cases memory_cases", "0 (all) or more")
        each(lambda value: value >= 0, "memory_weight memory_blur_mm", "0 or more")
        has_sam = not self.memory or Path(self.sam_checkpoint).is_file()
        expect(has_sam, "memory sam_checkpoint", "the file of SAM's weights, which a memory needs")
        switches = "warmup_steps weight_decay clip_grad val_freq patience nsd_mm"
        each(lambda value: value >= 0, switches, "0 (off) or more")
        each(lambda value: value > 0, "lr dist_timeout_min", "more than 0")
        each(lambda value: 0 <= value < 1, "val_overlap overlap", "0 to below 1")
        each(lambda value: 0 <= value <= 1, "min_share foreground_share random_contrast", "a share between 0 and 1")
        each(lambda value: 0 < value <= 1, "layer_decay", "above 0 and up to 1 (1 = off)")
        each(lambda value: value >= -1, "freeze_encoder_steps", "-1 (always), 0 (off) or more")
        expect(self.min_lr <= self.lr, "min_lr lr", "an end not above the peak")
        expect(self.warmup_steps <= self.steps, "warmup_steps steps", "a warm-up no longer than the run")
        is_judged = self.val_freq > 0 or not self.patience
        expect(is_judged, "patience val_freq", "validations, without which nothing can stop")
        checks.finish()


# Resuming

# These flags decide the result, so a resumed run must not change them.
DECISIVE_FLAGS = {
    *("num_labelled", "fold", "held_out_share", "checkpoint_key", "weights_part", "hypercolumns"),
    *("memory", "memory_cases", "memory_weight", "memory_blur_mm"),
    *(name for name in flag_names(TrainingOptions) if name != "steps"),
}
# Neither must the content of these files; other paths are fine.
FILE_FLAGS = ("weights", "json_list", "sam_checkpoint")
# What these decide is compared by `resolved_changes`: a default may be spelt out.
RESOLVED_FLAGS = {
    "classes",
    "backbone",
    "feature_size",
    "in_channels",
    "spacing_mm",
    "a_min",
    "a_max",
    "roi_x",
    "roi_y",
    "roi_z",
}
# These decide neither the weights nor which of them are best. A change of any other flag is a warning.
FREE_FLAGS = {
    *flag_names(EvaluationOptions),
    *(name for name in flag_names(RunningOptions) if name != "precision"),
    *("evaluate", "resume", "store_dir", "num_workers", "min_share", "use_checkpoint"),
}


def check_continuation(before: dict, now: dict, path: str | Path) -> None:
    """Refuse to resume from a checkpoint whose result other flags decided; warn of other changes.

    Args:
        before: the checkpoint, of which "flags", "contents" (digests of files), "backbone", "preprocessing", "classes"
            and "step" are compared.
        now: the same of this run, without "step".
        path: the checkpoint's, for the message.

    Raises:
        CheckpointError: naming every such flag with both values.
    """
    # Runs from before there were these have none.
    changed = changed_flags({"memory": False, "hypercolumns": False} | before.get("flags", {}), now["flags"])
    refused = [text for name, text in changed.items() if name in DECISIVE_FLAGS]
    refused += file_changes(before, now) + resolved_changes(before, now)
    if now["flags"]["steps"] < before["step"]:
        refused.append(f"--steps {now['flags']['steps']}, of which {before['step']} are done")
    if refused:
        raise CheckpointError(
            f"{path} was trained with other flags: {', '.join(refused)}. Give it those of before to go on, or begin "
            "anew with --resume none (which replaces that run) or another --output_dir"
        )
    compared = DECISIVE_FLAGS | FREE_FLAGS | RESOLVED_FLAGS | set(FILE_FLAGS)
    warned = [text for name, text in changed.items() if name not in compared]
    if warned:
        warnings.warn(f"{path} was trained with other flags, and goes on with: {', '.join(warned)}", stacklevel=2)


def file_changes(before: dict, now: dict) -> list[str]:
    """Files whose content differs; where the checkpoint has no digests, files at another path."""
    changes = []
    for name in FILE_FLAGS:
        old, new = before.get("flags", {}).get(name), now["flags"][name]
        if "contents" in before:
            is_same = before["contents"].get(name) == now["contents"].get(name)
        else:
            is_same = Path(old or new).resolve() == Path(new).resolve()
        if old is not None and not is_same:
            changes.append(f"--{name} {old} (its content has changed)" if old == new else f"--{name} {old} -> {new}")
    return changes


# Part and name of what the images of a run decide, what holds where a checkpoint does not say, and a message's words.
IMAGE_FACTS = (
    ("preprocessing", "images", CT, "kind of images"),
    ("preprocessing", "mr_percentiles", None, "--mr_percentiles of the store"),
    ("backbone", "in_channels", 1, "--in_channels"),
)


def resolved_changes(before: dict, now: dict) -> list[str]:
    """Values that flags, weights and store decide together, and that differ."""
    changes = []
    for part, names in DEFAULTS.items():
        for name in [name for name in names if name in before.get(part, {})]:
            old, new = (side.get(part, {}).get(name) for side in (before, now))
            if not agree(old, new):
                changes.append(f"{FLAG_OF[name]} {as_typed(old)} -> {as_typed(new)}")
    for part, name, default, meaning in IMAGE_FACTS:
        old, new = (side.get(part, {}).get(name, default) for side in (before, now))
        if old != new:
            changes.append(f"{meaning} {as_typed(old)} -> {as_typed(new)}")
    if "classes" in before and before["classes"] != now["classes"]:
        changes.append("--classes " + " -> ".join(", ".join(side["classes"]["names"][1:]) for side in (before, now)))
    return changes
