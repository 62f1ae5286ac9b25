"""The shared flags of main_ddp.py, and the check that reports every mistake together, before anything starts.

Every group of flags is a dataclass: default, range and meaning of a flag stand there and nowhere else. A method's own
flags are its `Options`. Names follow the published project where it has one.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from datasets.samples.crops import CropOptions
from datasets.samples.pairings import PAIRINGS, PairingOptions
from engine.flags import DeviceOptions, FlagChecks, FlagError, add_options, add_resume, flag_names, make_parser
from engine.schedules import peak_lr
from models.backbones import BACKBONES
from models.hub import is_on_hub
from models.methods import METHODS, Method

WEIGHT_DECAY_END = 0.4
DEFAULT_METHOD = next(iter(METHODS))


@dataclass(frozen=True)
class DataOptions:
    """Where the data are.

    Attributes:
        data_dir: folder that the data list's paths start from
        json_list: data list (scripts/create_json.py): training, validation
        embed_dir: folder of the correspondence table and of SAM's embeddings; --pairing sam needs the table, --lambda4
            the embeddings
        table_file: correspondences.npy; empty = the one in --embed_dir
        store_dir: volume store, made when missing; empty = OUTPUT_DIR/store
        spacing_mm: voxel size in mm of the store: D H W, one number, or native; unset = the store's, 2 1.5 1.5 if made
            here
        num_workers: loading processes per rank; 0 = load in the training process
    """

    data_dir: str = ""
    json_list: str = ""
    embed_dir: str = ""
    table_file: str = ""
    store_dir: str = ""
    spacing_mm: tuple[float | str, ...] | None = None
    num_workers: int = 4

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect(self.num_workers >= 0, "num_workers", "0 (off) or more")
        checks.finish()


@dataclass(frozen=True)
class NetworkOptions:
    """The network to pretrain.

    Attributes:
        feature_size: channels at stride 2 (multiple of 12; nnformer: of 6); resenc: of the first stage (32 makes
            nnU-Net's ResEncL)
        use_checkpoint: recompute activations instead of keeping them: less memory, slower
        checkpoint_file: weights to start from (any of ours, published ones, hf://owner/name) that fit this encoder;
            empty = none
    """

    feature_size: int = 48
    use_checkpoint: bool = False
    checkpoint_file: str = ""


@dataclass(frozen=True)
class OptimiserOptions:
    """How long and how the weights move.

    Attributes:
        epochs: length of the run
        steps_per_epoch: optimiser steps; 0 = training cases / effective batch
        batch_size: samples per process and forward pass
        accumulate_steps: forward passes per optimiser step; equals one large batch (except for batch norms and collapse
            monitors)
        optimizer: adamw, or sgd with --sgd_momentum
        sgd_momentum: momentum of sgd
        lr: peak learning rate, used as given (see --lr_reference_batch)
        lr_reference_batch: multiply --lr by effective batch / this; 0 = off, 256 = DINO's rule
        min_lr: learning rate at the end; must not exceed the peak
        warmup_epochs: linear warm-up of the learning rate, epochs; 0 = off
        weight_decay: at the start; 0 = off
        weight_decay_end: at the end, along a cosine; unset = 0.4, or 0 with --weight_decay 0
        clip_grad: largest gradient norm; 0 = off
        clip_each: clip every tensor's own norm instead of the joint norm of all trained modules
        seed: decides weights, samples, masks and augmentation
    """

    epochs: int = 1000
    steps_per_epoch: int = 0
    batch_size: int = 8
    accumulate_steps: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    sgd_momentum: float = 0.9
    lr: float = 1e-4
    lr_reference_batch: int = 0
    min_lr: float = 1e-6
    warmup_epochs: float = 10.0
    weight_decay: float = 0.04
    weight_decay_end: float | None = None
    clip_grad: float = 3.0
    clip_each: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight_decay_end is None:  # by default off where it begins switched off
            object.__setattr__(self, "weight_decay_end", WEIGHT_DECAY_END if self.weight_decay else 0.0)
        zero_or_more = "steps_per_epoch lr_reference_batch min_lr warmup_epochs weight_decay weight_decay_end clip_grad"
        checks = FlagChecks(self)
        checks.expect_each(lambda value: value >= 1, "epochs batch_size accumulate_steps", "1 or more")
        checks.expect_each(lambda value: value >= 0, f"{zero_or_more} seed", "0 (off) or more")
        checks.expect(self.lr > 0, "lr", "more than 0")
        checks.expect(0 <= self.sgd_momentum < 1, "sgd_momentum", "a momentum from 0 to below 1")
        checks.expect(self.warmup_epochs <= self.epochs, "warmup_epochs epochs", "a warm-up no longer than the run")
        is_falling = self.lr_reference_batch > 0 or self.min_lr <= self.lr or self.lr <= 0
        checks.expect(is_falling, "min_lr lr", "a rate that does not rise")
        checks.finish()

    def effective_batch(self, world_size: int) -> int:
        """Samples per optimiser step over all ranks and forward passes."""
        return self.batch_size * self.accumulate_steps * world_size

    def peak_lr(self, world_size: int) -> float:
        """The learning rate at the end of the warm-up.

        Raises:
            ValueError: the floor lies above it.
        """
        batch = self.effective_batch(world_size)
        peak = peak_lr(self.lr, batch, self.lr_reference_batch)
        if self.min_lr > peak:
            raise ValueError(
                f"--min_lr {self.min_lr:g} is above the peak learning rate {peak:g} (--lr {self.lr:g}, effective batch "
                f"{batch}, --lr_reference_batch {self.lr_reference_batch}): the rate would rise instead of decay; "
                "lower --min_lr or raise --lr"
            )
        return peak


@dataclass(frozen=True)
class RunningOptions(DeviceOptions):
    """Where and in which number format a run computes.

    Attributes:
        use_fp16: short for --precision fp16
        channels_last: 3-D convolutions in channels-last layout: same numbers but for rounding, faster or as fast
        cudnn_benchmark: cuDNN tries its algorithms at the first step, and keeps the fastest; default: on a GPU
        sync_batchnorm: batch norms see the samples of all ranks
        allreduce_bf16: ranks exchange gradients in bf16: half the traffic, rounded; for slow networks between nodes
        compile: torch.compile: a slow first step, then faster ones; needs a C++ compiler (on a CPU, torch 2.6 aborts in
            the backward pass; newer ones do not)
        nan_policy: on a non-finite loss: stop all ranks, or skip the step
        profile_steps: record so many steps after the first: OUTPUT_DIR/trace.json.gz for ui.perfetto.dev, a table; 0 =
            off
        dist_timeout_min: minutes that a rank waits for the others
    """

    use_fp16: bool = False
    channels_last: bool = True
    cudnn_benchmark: bool | None = None
    sync_batchnorm: bool = True
    allreduce_bf16: bool = False
    compile: bool = False
    nan_policy: Literal["stop", "skip"] = "stop"
    profile_steps: int = 0
    dist_timeout_min: float = 30.0

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect(self.profile_steps >= 0, "profile_steps", "0 (off) or more")
        checks.expect(self.dist_timeout_min > 0, "dist_timeout_min", "more than 0")
        is_one_format = not self.use_fp16 or self.precision in ("auto", "fp16")
        checks.expect(is_one_format, "use_fp16 precision", "one number format only")
        checks.finish()


@dataclass(frozen=True)
class OutputOptions:
    """What a run writes, and when.

    Attributes:
        output_dir: checkpoints, log.txt, TensorBoard, pictures, run.json
        saveckp_freq: epochs between checkpoints
        keep_freq: epochs between numbered checkpoints that stay; 0 = none
        log_freq: steps between log lines
        picture_freq: steps between pictures; 0 = none
        val_freq: epochs between validations; 0 = none
        num_val_pairs: held-out samples of a validation, rounded up to whole batches
    """

    output_dir: str = ""
    saveckp_freq: int = 1
    keep_freq: int = 0
    log_freq: int = 10
    picture_freq: int = 500
    val_freq: int = 10
    num_val_pairs: int = 32

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect_each(lambda value: value >= 1, "saveckp_freq log_freq num_val_pairs", "1 or more")
        checks.expect_each(lambda value: value >= 0, "keep_freq picture_freq val_freq", "0 (off) or more")
        checks.finish()


@dataclass(frozen=True)
class ProbingOptions:
    """Frozen probes of organs while a run goes on (engine/watch/probe.py).

    Attributes:
        probe_freq: epochs between frozen probes of organs; 0 = none
        probe_json_list: list of labelled cases to probe with, paths from --data_dir; empty = those of --json_list
        probe_voxels: voxels per organ and case that a probe reads
        probe_cases: most cases that teach a probe, and that judge it; 0 = all
    """

    probe_freq: int = 0
    probe_json_list: str = ""
    probe_voxels: int = 50
    probe_cases: int = 10

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect(self.probe_voxels >= 1, "probe_voxels", "1 or more")
        checks.expect_each(lambda value: value >= 0, "probe_freq probe_cases", "0 (off) or more")
        checks.finish()


GROUPS = {
    "Data": DataOptions,
    "Crops": CropOptions,
    "Network": NetworkOptions,
    "Optimisation": OptimiserOptions,
    "Running": RunningOptions,
    "Output": OutputOptions,
    "Frozen probes": ProbingOptions,
}


def make_pretrain_flags(description: str, method_name: str = DEFAULT_METHOD):
    """The parser of main_ddp.py for one method: the shared flags, and the method's own."""
    method = METHODS[method_name]
    parser = make_parser(description)
    group = parser.add_argument_group("Method")
    group.add_argument(
        "--method",
        type=str,
        choices=list(METHODS),
        default=method_name,
        help="what is learnt from the crops; --method X --help shows the flags of X",
    )
    group.add_argument(
        "--backbone", type=str, choices=sorted(BACKBONES), default="swin_unetr", help="network to pretrain"
    )
    group.add_argument(
        "--pairing",
        type=str,
        choices=list(method.pairings),
        default=method.pairings[0],
        help="how the crops of one sample are chosen",
    )
    add_options(parser.add_argument_group("Pairing"), PairingOptions)
    add_options(parser.add_argument_group(f"Method {method_name}"), method.Options)
    for title, Options in GROUPS.items():
        group = parser.add_argument_group(title)
        add_options(group, Options)
        if Options is OutputOptions:
            add_resume(group)
    return parser


def chosen_method(argv: list[str]) -> str:
    """The method that a command line names, itself or through its --config; the default where it names none.

    Raises:
        ValueError: no such method, or a flag of another method is given.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--method")
    reader.add_argument("--config", action="append", default=[])
    given, words = reader.parse_known_args(argv)
    settings: dict = {}
    for path in given.config:
        if Path(path).is_file():
            content = read_config(path)
            settings |= content if isinstance(content, dict) else {}
    name = given.method or settings.get("method", DEFAULT_METHOD)
    if name not in METHODS:
        raise ValueError(f"--method {name}: expected one of {', '.join(METHODS)}")
    names = {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    refuse_flags_of_others(name, names | {name.removeprefix("no_") for name in names} | settings.keys())
    return name


def read_config(path: str) -> object:
    """What a YAML file holds.

    Raises:
        ValueError: it is no YAML of plain values.
    """
    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--config {path}: not a YAML file of flags ({reason})") from error


def refuse_flags_of_others(chosen: str, names: set[str]) -> None:
    """Raise ValueError for flags that only other methods have, naming those."""
    own = set(flag_names(METHODS[chosen].Options))
    for name in sorted(names - own):
        owners = [other for other, method in METHODS.items() if name in flag_names(method.Options)]
        if owners:
            raise ValueError(f"--{name} is a flag of --method {' or '.join(owners)}; this run has --method {chosen}")


def check_paths(flags) -> None:
    """Raise FlagError for missing or unsuitable files and folders."""
    problems = [
        f"--{name} is not given" for name in ("data_dir", "json_list", "output_dir") if not getattr(flags, name)
    ]
    if flags.data_dir and not Path(flags.data_dir).is_dir():
        problems.append(f"--data_dir {flags.data_dir} is not a folder")
    for name in ("json_list", "table_file", "checkpoint_file", "probe_json_list"):
        if getattr(flags, name) and not is_on_hub(getattr(flags, name)) and not Path(getattr(flags, name)).is_file():
            problems.append(f"--{name} {getattr(flags, name)}: no such file")
    if flags.resume not in ("auto", "none") and not Path(flags.resume).is_file():
        problems.append(f"--resume {flags.resume}: no such file (expected auto, none or a checkpoint)")
    if PAIRINGS[flags.pairing].needs_table and not flags.table_file:
        problems += table_problems(flags)
    if problems:
        raise FlagError(problems)


def table_problems(flags) -> list[str]:
    """A pairing that needs a correspondence table without one, and the two commands that make one."""
    if flags.embed_dir and (Path(flags.embed_dir) / "correspondences.npy").is_file():
        return []
    where = (
        f"--embed_dir {flags.embed_dir} holds no correspondences.npy" if flags.embed_dir else "--embed_dir is not given"
    )
    folder = flags.embed_dir or "EMBED_DIR"
    others = [name for name in METHODS[flags.method].pairings if not PAIRINGS[name].needs_table]
    return [
        f"{where}, which --pairing {flags.pairing} needs. Make it with `python scripts/generate_sam_embeddings.py "
        f"--checkpoint_file SAM.pth --data_dir {flags.data_dir} --json_list {flags.json_list} --embed_dir {folder}` "
        f"and then `python scripts/mine_pairs.py --embed_dir {folder} --json_list {flags.json_list}`; or choose "
        f"--pairing {' or '.join(others)}"
    ]


def check_mask_block(mask_block: int, method: Method, backbone: str) -> None:
    """Raise ValueError where mask blocks would cut through the backbone's finest tokens."""
    token_vox = min(method.student.backbone.channels)
    if mask_block % token_vox:
        raise ValueError(
            f"--mask_block {mask_block} cuts through the tokens of --backbone {backbone}, which are {token_vox} voxels "
            f"a side: give a multiple of {token_vox}"
        )
