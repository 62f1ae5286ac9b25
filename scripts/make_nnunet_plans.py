"""Finetune in nnU-Net: plans that give pretrained weights the input that they know, beside nnU-Net's own plans.

    nnUNetv2_plan_and_preprocess -d 1 --no_pp                                  # nnU-Net's, writes nnUNetPlans.json
    python scripts/make_nnunet_plans.py --weights alice_student.safetensors \\
        --plans $nnUNet_preprocessed/Dataset001_Organs/nnUNetPlans.json

Writes alicePlans.json there and prints the next commands: preprocess, train with `nnUNetTrainerAlice`, predict.
What changes against nnU-Net's plans, all of it taken from the weights' own description: the reader (so that axes do not
depend on the file), the axis order, spacing, patch, HU window, and the network. Needs nnU-Net 2.8 or newer, installed
beside this project's requirements.
"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.ct.images import CT, MR
from datasets.store.files import write_text
from datasets.store.format import spacing_text
from engine.flags import REPOSITORY, make_parser, run_main
from engine.segmentation.setup import AXCODES, resolve_setup
from models.hub import local_weights
from models.nnunet import READER
from models.pretrained import PARTS
from models.segmenters import SEGMENTERS
from models.weights_file import read_weights_file

TRAINER = "nnUNetTrainerAlice"


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=str, required=True, help="extracted weights with their description, or hf://owner/name")
    add("--plans", type=str, required=True, help="nnU-Net's plans of the data set, a JSON file")
    add("--configuration", type=str, default="3d_fullres", help="of these plans, to start from")
    add("--weights_part", type=str, choices=list(PARTS), default="encoder", help="what of the weights is loaded")
    add("--patch_size", type=int | None, nargs=3, default=None, help="voxels D H W; default: the weights' crop")
    add("--batch_size", type=int | None, default=None, help="patches a step; default: nnU-Net's choice")
    add("--plans_name", type=str, default="alicePlans", help="of the plans written, without .json")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    source = Path(flags.plans)
    plans = read_plans(source, flags.configuration)
    description = read_weights_file(flags.weights).description
    missing = [name for name in ("backbone", "preprocessing") if not isinstance(description.get(name), dict)]
    if missing:
        raise ValueError(
            f"--weights {flags.weights} does not say its {' and '.join(missing)}; expected a file of "
            "extract_backbone_weights.py, with the .json that it writes beside a .pth"
        )
    made = make_plans(plans, flags, description)
    target = source.with_name(f"{flags.plans_name}.json")
    if target == source:
        raise ValueError(f"--plans_name {flags.plans_name} would overwrite --plans {source}; give another name")
    write_text(target, json.dumps(made, indent=4) + "\n")
    print(describe(made, plans, flags, target))


def read_plans(path: Path, configuration: str) -> dict:
    """nnU-Net's plans.

    Raises:
        ValueError: unreadable, not of a CT, or without the configuration.
    """
    try:
        plans = json.loads(path.read_text())
        found = plans["configurations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--plans {path}: not nnU-Net's plans ({type(error).__name__}: {error})") from error
    whole = sorted(name for name, content in found.items() if "spacing" in content and len(content["spacing"]) == 3)
    if configuration not in whole:
        raise ValueError(f"--configuration {configuration}: {path} has {', '.join(whole)}")
    schemes = found[configuration]["normalization_schemes"]
    if schemes != ["CTNormalization"]:
        raise ValueError(
            f"--plans {path}: channels are normalised by {', '.join(schemes)}; expected one channel that dataset.json "
            'calls "CT", for which the weights know the HU window'
        )
    return plans


def make_plans(plans: dict, flags: jsonargparse.Namespace, description: dict) -> dict:
    """nnU-Net's plans with the reader, axes, spacing, patch, window and network of the weights.

    Raises:
        ValueError: a patch that the network cannot take, an unknown backbone, another axis order, or weights of slices.
    """
    known = description["preprocessing"]
    if known.get("axcodes") != AXCODES:
        raise ValueError(f"--weights {flags.weights}: axis order {known.get('axcodes')}, expected {AXCODES}")
    if known.get("images", CT) == MR:
        raise ValueError(
            f"--weights {flags.weights}: they know mapped MR, and nnU-Net maps by another rule; expected CT"
        )
    if known.get("roi", [None])[0] == 1:
        raise ValueError(
            f"--weights {flags.weights}: they are 2-D, trained with --roi_z 1 (crops of "
            f"{' x '.join(map(str, known['roi']))} voxels), and these plans are for 3-D networks; expected weights of "
            "3-D crops. Finetune 2-D weights with scripts/finetune_segmentation.py"
        )
    setup = resolve_setup(description, {"roi": flags.patch_size}, SEGMENTERS)
    wanted = setup.preprocessing
    SEGMENTERS[setup.backbone].check_sizes(setup.feature_size, wanted.roi)
    made = copy.deepcopy(plans)
    configuration = made["configurations"][flags.configuration]
    in_file_order = in_reader_order(plans, configuration["spacing"])
    spacing = in_file_order if wanted.spacing_mm is None else list(wanted.spacing_mm)
    shape = in_reader_order(plans, configuration["median_image_size_in_voxels"])
    network = {"backbone": setup.backbone, "feature_size": setup.feature_size}
    configuration |= {
        "data_identifier": f"{flags.plans_name}_{flags.configuration}",
        "spacing": spacing,
        "patch_size": list(wanted.roi),
        "batch_size": flags.batch_size or configuration["batch_size"],
        "median_image_size_in_voxels": [n * old / new for n, old, new in zip(shape, in_file_order, spacing)],
        "alice": {"weights": str(local_weights(flags.weights).resolve()), "part": flags.weights_part} | network,
    }
    made |= {
        "plans_name": flags.plans_name,
        "image_reader_writer": READER,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {flags.configuration: configuration},
    }
    for name in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
        made[name] = in_reader_order(plans, plans[name])
    # CTNormalization clips to the percentiles, subtracts the mean and divides by the deviation: this is [0, 1].
    low, high = wanted.hu_min, wanted.hu_max
    window = {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}
    made["foreground_intensity_properties_per_channel"]["0"] |= window
    return made


def in_reader_order(plans: dict, values: list[float]) -> list[float]:
    """Values of three axes, from the order in which nnU-Net's plans compute to that of its reader, [Z, Y, X]."""
    return [values[axis] for axis in plans["transpose_backward"]]


def describe(made: dict, plans: dict, flags: jsonargparse.Namespace, target: Path) -> str:
    """What was written, and the next commands."""
    now, before = (each["configurations"][flags.configuration] for each in (made, plans))
    spacing, patch = (in_reader_order(plans, before[name]) for name in ("spacing", "patch_size"))
    window = made["foreground_intensity_properties_per_channel"]["0"]
    low, high = window["percentile_00_5"], window["percentile_99_5"]
    dataset = int(plans["dataset_name"].removeprefix("Dataset").split("_")[0])  # "Dataset001_Name"
    names = f"-p {flags.plans_name} -tr {TRAINER}"
    return "\n".join(
        [
            f"wrote {target}",
            f"  spacing: {spacing_text(now['spacing'])} instead of {spacing_text(spacing)}",
            f"  patch (voxels): {now['patch_size']} instead of {patch}; {now['batch_size']} a step",
            f"  input: {low:g} to {high:g} HU become 0 to 1; axes by {READER}",
            f"  network: {now['alice']['backbone']}, feature size {now['alice']['feature_size']}",
            "go on with:",
            f"  export nnUNet_extTrainer={REPOSITORY / 'scripts' / 'nnunet'}",
            f"  nnUNetv2_preprocess -d {dataset} -plans_name {flags.plans_name} -c {flags.configuration}",
            f"  nnUNetv2_train {dataset} {flags.configuration} 0 {names}",
            f"  nnUNetv2_predict -d {dataset} -c {flags.configuration} -f 0 {names} -i IMAGES -o LABELS",
        ]
    )


if __name__ == "__main__":
    run_main(main)
