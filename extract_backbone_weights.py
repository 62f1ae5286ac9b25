"""Take the backbone out of a pretraining checkpoint, under the names of MONAI's own network or of another library.

    python extract_backbone_weights.py results/run/checkpoint.pth alice.pth --checkpoint_key teacher
    python extract_backbone_weights.py results/run/checkpoint.pth alice.safetensors --checkpoint_key student --with_head
    python extract_backbone_weights.py results/run/checkpoint.pth alice --format safetensors
    python extract_backbone_weights.py results/caid/checkpoint.pth caid.pth --format torchvision
    python extract_backbone_weights.py results/resenc/checkpoint.pth resenc_nnunet.pth --format nnunet

The teacher holds the encoder, the student the encoder and, where the method trained one, the decoder. Without
--checkpoint_key the teacher is taken, or the student of a method that has no teacher. Both come in one layout, with the
network's own names (of other backbones: those of `models.backbones.segmentation_network`). They load like this:

    import torch
    from monai.networks.nets import SwinUNETR
    model = SwinUNETR(in_channels=1, out_channels=14, feature_size=48)
    model.load_state_dict(torch.load("alice.pth", weights_only=True), strict=False)

A .pth holds a plain dict of tensors, with a description beside it (`alice.pth.json`); a .safetensors holds both. The
description states the preprocessing that the weights expect: spacing, HU window, crop, axis codes. Weights of slices
(--roi_z 1) are for MONAI's network with spatial_dims=2.

A `resenc` also becomes a checkpoint that nnU-Net finetunes from by itself (`--format nnunet`): see scripts/README.md.

A `resnet50_unet` also comes under the names of torchvision (`--format torchvision`, encoder only) and of
segmentation_models_pytorch (`--format smp`, with decoder and reconstruction layer where the run trained them). Both
expect three equal input channels:

    import torch
    import torchvision
    model = torchvision.models.resnet50()
    model.load_state_dict(torch.load("caid.pth", weights_only=True), strict=False)  # all but fc

    import segmentation_models_pytorch as smp
    model = smp.Unet("resnet50", encoder_weights=None)
    model.load_state_dict(torch.load("caid_smp.pth", weights_only=True), strict=False)
"""

import torch

from engine.checkpoint import CheckpointError, require, require_types
from engine.flags import add_switch, make_parser, run_main
from engine.run import load_pretraining
from engine.weights import (
    CHECKPOINT_KEYS,
    DESCRIBING,
    FORMATS,
    HEAD_PREFIX,
    SUFFIXES,
    TASK_LAYER_PREFIX,
    chosen_part,
    describe,
    extract,
    halved,
    save_described,
    save_weights,
    weights_file_name,
)
from models import layouts, nnunet_checkpoint
from models.backbones import BACKBONES, segmentation_network
from models.backbones.interface import Size3, spatial_dims_of
from models.pretrained import load_pretrained
from models.weights_file import WeightsError, WeightsFile

TYPES = {"student": dict, "teacher": dict, "backbone": dict, "preprocessing": dict, "step": int}
BACKBONE_OF_FORMAT = dict.fromkeys(layouts.LAYOUTS, layouts.BACKBONE) | {
    nnunet_checkpoint.FORMAT: nnunet_checkpoint.BACKBONE
}
FORMATS_WITH_DECODER = ("smp", nnunet_checkpoint.FORMAT)
NUM_CLASSES = 14  # of the network that weights are compared with; its output layer is not exported


def make_flags():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=str, help="checkpoint.pth of a pretraining run")
    parser.add_argument(
        "output",
        type=str,
        help=f"file to write; ends in {' or '.join(SUFFIXES)}, or in nothing of the kind with --format",
    )
    parser.add_argument(
        "--checkpoint_key",
        type=str,
        choices=CHECKPOINT_KEYS,
        default="auto",
        help="student: encoder and decoder; teacher: its moving average, encoder only; auto: the teacher where the run "
        "has one, else the student (--format smp, nnunet: the student where it has a decoder)",
    )
    parser.add_argument(
        "--format",
        type=str,
        choices=["auto", *FORMATS],
        default="auto",
        help="names of the weights. monai: the network's own, which are MONAI's; safetensors: the same, in a "
        ".safetensors; torchvision, smp: of torchvision's resnet50 or segmentation_models_pytorch's Unet, for "
        "resnet50_unet; nnunet: a checkpoint for nnU-Net, with its plan, for resenc; auto: the network's own. The "
        "file's suffix decides between .pth and .safetensors",
    )
    add_switch(parser, "--with_head", False, "keep the projection head too, under `head.`")
    add_switch(parser, "--half", False, "half precision: half as large a file, which loads into float32 networks")
    return parser


def check_match(weights: dict[str, torch.Tensor], backbone: dict, roi: Size3 | None, path: str) -> str:
    """Compare with the network that the weights are for.

    Args:
        roi: crops of the run (D, H, W), which decide whether the network is 2-D; None = 3-D where it can be.

    Returns:
        One line that says what matched.

    Raises:
        CheckpointError: nothing matches, or something does not fit.
    """
    name = backbone["name"]
    if name not in BACKBONES:
        raise CheckpointError(f"{path}: its backbone is {name!r}; known are {', '.join(BACKBONES)}")
    parts = {"encoder": BACKBONES[name].encoder_key_prefixes, "decoder": BACKBONES[name].decoder_key_prefixes}
    not_compared = (HEAD_PREFIX, TASK_LAYER_PREFIX)
    backbone_weights = {key: value for key, value in weights.items() if not key.startswith(not_compared)}
    spatial_dims = spatial_dims_of(roi) if roi else max(BACKBONES[name].spatial_dims)
    network = segmentation_network(
        name, backbone["in_channels"], NUM_CLASSES, backbone["feature_size"], spatial_dims=spatial_dims
    )
    built = f"{name}{' in 2-D' if spatial_dims == 2 else ''}, feature size {backbone['feature_size']}"
    try:
        report = load_pretrained(network, WeightsFile(path, backbone_weights), min_share=0.0, part="whole")
    except WeightsError as error:
        raise CheckpointError(f"{path}: does not fit {built}: none of its keys fits by name and shape") from error
    if report.misshapen or report.unexpected:
        raise CheckpointError(f"does not fit {built}: {report.describe()}")
    encoder = encoder_keys(name, backbone["feature_size"], roi, spatial_dims)
    if lacking := [key for key in report.missing if key in encoder]:
        raise CheckpointError(
            f"{path}: damaged: of the {len(encoder)} entries of its encoder {len(lacking)} are missing, first "
            f"{lacking[0]}"
        )
    counts = {part: report.counts(prefixes) for part, prefixes in parts.items()}
    shares = ", ".join(f"{part} {matched}/{wanted}" for part, (matched, wanted) in counts.items())
    message = f"{built}: {shares} keys matched"
    matched, wanted = counts["encoder"]
    if matched < wanted:
        modules = sorted({key.split(".")[0] for key in report.missing if key.startswith(parts["encoder"])})
        message += f" ({', '.join(modules)} not trained by this run's objectives)"
    return message


def encoder_keys(name: str, feature_size: int, roi: Size3 | None, spatial_dims: int) -> set[str]:
    """Names that every run of a backbone trains: those of its encoder without skip blocks."""
    any_roi = (1, 96, 96) if spatial_dims == 2 else (96, 96, 96)
    return set(BACKBONES[name](feature_size, roi or any_roi, None, False, with_masks=False).network.state_dict())


def check_layout(flags, backbone: dict) -> None:
    """Raise CheckpointError where the library of --format does not have the checkpoint's network."""
    wanted = BACKBONE_OF_FORMAT.get(flags.format, backbone["name"])
    if backbone["name"] != wanted:
        advice = "use --format monai"
        if flags.format == nnunet_checkpoint.FORMAT:
            advice += f" and scripts/make_nnunet_plans.py, or pretrain with --backbone {wanted}"
        raise CheckpointError(
            f"{flags.checkpoint}: --format {flags.format} is for the backbone {wanted}, but this run's is "
            f"{backbone['name']}: {advice}"
        )
    if flags.with_head and flags.format in BACKBONE_OF_FORMAT:
        raise CheckpointError(f"--with_head: --format {flags.format} has no place for a head; use --format monai")
    if flags.half and flags.format == nnunet_checkpoint.FORMAT:
        raise CheckpointError(f"--half: --format {flags.format} is nnU-Net's own checkpoint, which is float32")


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    output = weights_file_name(flags.output, flags.format)
    state = load_pretraining(flags.checkpoint)
    require(state, DESCRIBING, flags.checkpoint, "a checkpoint of main_ddp.py")
    require_types(state, TYPES, flags.checkpoint)
    require(state["backbone"], ("name", "feature_size", "in_channels"), flags.checkpoint, "a checkpoint of main_ddp.py")
    check_layout(flags, state["backbone"])
    key = chosen_part(state, flags.checkpoint_key, prefers_decoder=flags.format in FORMATS_WITH_DECODER)
    weights = extract(state, key, flags.with_head, flags.checkpoint, with_task_layer=flags.format == "smp")
    print(check_match(weights, state["backbone"], state["preprocessing"].get("roi"), flags.checkpoint))
    description = describe(state, key)
    if flags.format == nnunet_checkpoint.FORMAT:
        require(state["preprocessing"], ("spacing_mm", "roi"), flags.checkpoint, "a checkpoint of main_ddp.py")
        if not any(name.startswith("decoder.") for name in weights):
            print(f"the {key} has no decoder: the file holds nnU-Net's random initial weights there")
        content = nnunet_checkpoint.nnunet_checkpoint(weights, description)
        weights = content["network_weights"]
        save_described(content, description, output)
    else:
        if flags.format in layouts.LAYOUTS:
            weights = layouts.with_names_of(flags.format, weights)
        if flags.half:
            weights = halved(weights, flags.checkpoint)
        save_weights(weights, description, output)
    print(f"wrote {len(weights)} tensors of the {key} (step {state['step']}) to {output}")


if __name__ == "__main__":
    run_main(main)
