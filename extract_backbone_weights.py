"""Take the backbone out of a pretraining checkpoint, in the layout of MONAI's own network.

    python extract_backbone_weights.py results/run/checkpoint.pth alice.pth --checkpoint_key teacher
    python extract_backbone_weights.py results/run/checkpoint.pth alice.safetensors --checkpoint_key student --with_head
    python extract_backbone_weights.py results/run/checkpoint.pth alice --format safetensors

The teacher holds the encoder, the student the encoder and, where the method trained one, the decoder. Without
--checkpoint_key the teacher is taken, or the student of a method that has no teacher. Both come in one layout, with the
network's own names (of other backbones: those of `models.backbones.segmentation_network`). They load like this:

    import torch
    from monai.networks.nets import SwinUNETR
    model = SwinUNETR(in_channels=1, out_channels=14, feature_size=48)
    model.load_state_dict(torch.load("alice.pth", weights_only=True), strict=False)

A .pth (`--format monai`) holds a plain dict of tensors, with a description beside it (`alice.pth.json`); a .safetensors
(`--format safetensors`) holds both, under the same names. Without --format the suffix decides. The description states
the preprocessing that the weights expect: spacing, HU window, crop, axis codes. Weights of slices (--roi_z 1) are for
MONAI's network with spatial_dims=2.
"""

import torch

from engine.checkpoint import CheckpointError, require
from engine.flags import add_switch, make_parser, run_main
from engine.run import load_pretraining
from engine.weights import CHECKPOINT_KEYS, FORMATS, HEAD_PREFIX, chosen_part, extract, save_weights, weights_file_name
from models.backbones import BACKBONES, segmentation_network
from models.backbones.interface import Size3, spatial_dims_of
from models.pretrained import load_pretrained
from models.weights_file import WeightsError, WeightsFile

DESCRIBING = ("backbone", "preprocessing", "step", "epoch", "commit", "versions")  # entries of a checkpoint
NUM_CLASSES = 14  # of the network that weights are compared with; its output layer is not exported


def make_flags():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=str, help="checkpoint.pth of a pretraining run")
    parser.add_argument(
        "output",
        type=str,
        help=f"file to write; ends in {' or '.join(FORMATS.values())}, or in nothing of the kind with --format",
    )
    parser.add_argument(
        "--checkpoint_key",
        type=str,
        choices=CHECKPOINT_KEYS,
        default="auto",
        help="student: encoder and decoder; teacher: its moving average, encoder only; auto: the teacher where the run "
        "has one, else the student",
    )
    parser.add_argument(
        "--format",
        type=str,
        choices=["auto", *FORMATS],
        default="auto",
        help="monai: MONAI's names in a .pth; safetensors: the same names in a .safetensors; auto: as the suffix says",
    )
    add_switch(parser, "--with_head", False, "keep the projection head too, under `head.`")
    return parser


def describe(state: dict, key: str) -> dict:
    """What a user of the weights must know, in plain values."""
    return {"method": state["kind"], "module": key} | {name: state[name] for name in DESCRIBING}


def check_match(weights: dict[str, torch.Tensor], backbone: dict, roi: Size3, path: str) -> str:
    """Compare with the network that the weights are for.

    Args:
        roi: crops of the run (D, H, W), which decide whether the network is 2-D.

    Returns:
        One line that says what matched.

    Raises:
        CheckpointError: nothing matches, or something does not fit.
    """
    name = backbone["name"]
    if name not in BACKBONES:
        raise CheckpointError(f"{path}: its backbone is {name!r}; known are {', '.join(BACKBONES)}")
    parts = {"encoder": BACKBONES[name].encoder_key_prefixes, "decoder": BACKBONES[name].decoder_key_prefixes}
    backbone_weights = {key: value for key, value in weights.items() if not key.startswith(HEAD_PREFIX)}
    spatial_dims = spatial_dims_of(roi)
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
    counts = {part: report.counts(prefixes) for part, prefixes in parts.items()}
    shares = ", ".join(f"{part} {matched}/{wanted}" for part, (matched, wanted) in counts.items())
    message = f"{built}: {shares} keys matched"
    matched, wanted = counts["encoder"]
    if matched < wanted:
        modules = sorted({key.split(".")[0] for key in report.missing if key.startswith(parts["encoder"])})
        message += f" ({', '.join(modules)} not trained by this run's objectives)"
    return message


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    output = weights_file_name(flags.output, flags.format)
    state = load_pretraining(flags.checkpoint)
    require(state, DESCRIBING, flags.checkpoint, "a checkpoint of main_ddp.py")
    key = chosen_part(state, flags.checkpoint_key)
    weights = extract(state, key, flags.with_head, flags.checkpoint)
    print(check_match(weights, state["backbone"], state["preprocessing"]["roi"], flags.checkpoint))
    save_weights(weights, describe(state, key), output)
    print(f"wrote {len(weights)} tensors of the {key} (step {state['step']}) to {output}")


if __name__ == "__main__":
    run_main(main)
