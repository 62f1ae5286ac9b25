"""What a comparison of pretrainings is allowed to cost, as presets that flags change one by one."""

import dataclasses
from dataclasses import dataclass, field

from engine.flags import available_cpus, make_parser


def flag(default: object, help: str):
    """A setting that is a flag of the same name; a tuple takes several words."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """The budget, the same for every arm. Sizes (D, H, W); defaults are those of `--preset gpu`."""

    num_unlabelled: int = flag(64, "phantoms to pretrain with, held-out ones included")
    num_held_out: int = flag(8, "of these, held out to watch the pretraining losses")
    num_labelled: int = flag(15, "labelled phantoms to finetune with")
    num_test: int = flag(12, "labelled phantoms that every finetuned network is judged on")
    data_seed: int = flag(7, "of the phantoms")
    spacing_mm: float = flag(3.0, "voxel size, mm")
    sam_spacing_mm: float = flag(3.0, "voxel size of the volumes that SAM reads, mm")
    roi: tuple = flag((64, 64, 64), "crop D H W in voxels, of pretraining and finetuning")
    backbone: str = flag("swin_unetr", "network")
    feature_size: int = flag(12, "its channels at stride 2")
    num_points: int = flag(512, "query points per case of the tables of pairs, mined and true")
    num_partners: int = flag(8, "key cases per query case of both tables")
    sam_config: str = flag("configs/sam_phantom.yaml", "recipe of the SAM training, without --sam_checkpoint")
    sam_flags: str = flag("--time_limit_min=2.5", "further flags of that training, in quotes")
    pretrain_steps: int = flag(1000, "optimiser steps with two crops a sample; others see as many voxels; x 20")
    pretrain_batch: int = flag(8, "samples per step")
    pretrain_lr: float = flag(1e-3, "peak learning rate of pretraining")
    pretrain_seeds: tuple = flag((0,), "of pretraining; the n-th of --seeds finetunes the n-th, then round again")
    pretrain_workers: int = flag(2, "loading processes of each pretraining; 0 = none")
    pretrain_flags: str = flag("", "further flags of every pretraining, in quotes")
    alice_flags: str = flag("", "further flags of those with Alice alone, in quotes")
    weights_from: str = flag("student", "what is finetuned: student (encoder and decoder) or teacher (encoder)")
    weights_part: str = flag("encoder", "what of them: encoder, or whole (the decoder that learnt to reconstruct too)")
    shots: tuple = flag((1, 4, 15), "numbers of labelled cases")
    seeds: tuple = flag((0, 1, 2), "of finetuning; each also takes its own labelled cases (--fold)")
    finetune_steps: int = flag(400, "optimiser steps of every finetuning")
    finetune_batch: int = flag(2, "crops per step")
    finetune_lr: float = flag(1e-3, "peak learning rate of finetuning")
    finetune_workers: int = flag(1, "loading processes of each finetuning; 0 = none")
    finetune_flags: str = flag("", "further flags of every finetuning, in quotes")
    # New layers first, then all: Kumar et al., ICLR 2022. Half of the steps paid off on CPUs.
    weights_flags: str = flag("--freeze_encoder_steps=200", "of those from pretrained weights alone; in quotes")
    scratch_flags: str = flag("", "of a second finetuning from scratch, on top of all others, in quotes; empty = none")
    num_parallel: int = flag(8, "pretrainings or finetunings side by side; 0 = one by one within this process")
    num_threads: int = flag(1, "CPU threads of each")


PRESETS: dict[str, dict] = {
    "gpu": {},
    "cpu": {
        **{"num_unlabelled": 32, "num_held_out": 4, "num_test": 8, "spacing_mm": 6.0, "roi": (32, 32, 32)},
        **{"backbone": "unet", "feature_size": 16, "pretrain_steps": 1200, "pretrain_workers": 0},
        "pretrain_lr": 2e-3,
        **{"pretrain_flags": "--channels_last=true", "alice_flags": "--mask_block=8 --mask_ratio=0.6"},
        "shots": (1, 4),
        **{"sam_config": "configs/sam_quickstart.yaml", "sam_flags": "--time_limit_min=10 --steps=600"},
        **{"finetune_steps": 1200, "finetune_workers": 0, "num_parallel": 2},
        "finetune_lr": 5e-3,  # scratch's best of 1e-3, 3e-3 (with layer-wise decay), 5e-3 and 1e-2
        "weights_flags": "--freeze_encoder_steps=600",
        "scratch_flags": "--freeze_encoder_steps=600",  # what that alone does
        **{"sam_spacing_mm": 4.0, "data_seed": 10},  # tuned with 7; earlier protocols saw 8 and 9
    },
    "smoke": {
        **{"num_unlabelled": 4, "num_held_out": 1, "num_labelled": 2, "num_test": 2, "spacing_mm": 8.0},
        **{"roi": (32, 32, 32), "backbone": "unet", "feature_size": 4, "num_points": 12, "num_partners": 2},
        **{"sam_config": "configs/sam_quickstart.yaml", "weights_part": "whole"},
        "sam_flags": "--steps=2 --width=8 --embed_dim=8 --view_shape 32 32 32 --num_points=32",
        **{"pretrain_steps": 4, "pretrain_batch": 2, "pretrain_workers": 0, "shots": (1, 2), "seeds": (0, 1)},
        **{"finetune_steps": 4, "finetune_workers": 0, "num_parallel": 2, "weights_flags": ""},
    },
}


def make_flags(description: str, arms: list[str], stages: list[str]):
    """The command line: where, which stages, and every setting (unset = the preset's)."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--output_dir", type=str, required=True, help="everything goes here; the same command again goes on there")
    add("--preset", type=str, choices=list(PRESETS), default="gpu", help="defaults of all settings")
    add("--stages", type=str, default=",".join(stages), help="which of these to run, separated by commas")
    add("--arms", type=str, default=",".join(arms), help="which of these to compare, separated by commas")
    add("--sam_checkpoint", type=str, default="", help="a trained SAM; empty = train one")
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one")
    add("--num_cpus", type=int, default=available_cpus(), help="cores for the stages that prepare data")
    group = parser.add_argument_group("settings (unset = the preset's; shown: gpu's)")
    for entry in dataclasses.fields(Settings):
        told = f"{entry.metadata['help']} [{shown(entry.default)}]"
        if isinstance(entry.default, tuple):
            group.add_argument(f"--{entry.name}", type=int, nargs="+", default=None, help=told)
        else:
            group.add_argument(f"--{entry.name}", type=type(entry.default), default=None, help=told)
    return parser


def shown(value: object) -> str:
    """A setting in one word, for the help."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settle(flags) -> Settings:
    """The preset with the given flags on top.

    Raises:
        ValueError: numbers that contradict each other.
    """
    names = [entry.name for entry in dataclasses.fields(Settings)]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = Settings(**PRESETS[flags.preset] | given)
    if not settings.shots or not settings.seeds or min(settings.shots) < 1:
        raise ValueError(f"--shots {settings.shots} --seeds {settings.seeds}: expected at least one of each")
    if not 0 < len(settings.pretrain_seeds) <= len(settings.seeds):
        raise ValueError(
            f"--pretrain_seeds {shown(settings.pretrain_seeds)}: expected one or more, at most as many as --seeds "
            f"({shown(settings.seeds)}): each is finetuned"
        )
    for name in ("seeds", "pretrain_seeds", "shots"):
        if len(set(getattr(settings, name))) < len(getattr(settings, name)):
            raise ValueError(f"--{name} {shown(getattr(settings, name))}: expected different numbers")
    if max(settings.shots) > settings.num_labelled:
        raise ValueError(f"--shots {settings.shots}: --num_labelled {settings.num_labelled} has fewer cases")
    if settings.weights_from not in ("student", "teacher"):
        raise ValueError(f"--weights_from {settings.weights_from}: expected student or teacher")
    if settings.weights_part not in ("encoder", "whole"):
        raise ValueError(f"--weights_part {settings.weights_part}: expected encoder or whole")
    if (settings.weights_from, settings.weights_part) == ("teacher", "whole"):
        raise ValueError("--weights_part whole: the teacher has no decoder; choose --weights_from student")
    if not 0 < settings.num_held_out < settings.num_unlabelled - 1:
        raise ValueError("--num_held_out must leave at least two of --num_unlabelled to pretrain with")
    if len(settings.roi) != 3:
        raise ValueError(f"--roi {settings.roi}: expected D H W")
    return settings
