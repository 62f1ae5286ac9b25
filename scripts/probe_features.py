"""Probe frozen features: do a k-NN and a linear probe recognise organs, voxel by voxel, in unseen patients?

    python scripts/probe_features.py --weights alice_teacher.pth --data_dir phantom --json_list phantom.json \\
        --store_dir store --output probe.json
    python scripts/probe_features.py --weights alice/checkpoint.pth --checkpoint_key student --num_labelled 1 \\
        --fold 2 --data_dir FLARE22 --json_list flare_labelled.json --store_dir store --output probe_1shot.json

With --mlp true a small MLP, taught by the same cases, also segments the others' whole volumes, voxel by voxel.
Randomly initialised networks of the same kind are probed beside the weights: only what lies above them was learnt.
Spacing, HU window, window size and backbone come from the weights' description. Writes JSON, and the same as a table.
Minutes on two CPU cores for the quickstart's network. Several --weights are compared in one table.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from datasets.ct.images import CT
from datasets.lists.label_classes import BUILT_IN, read_classes
from datasets.samples.probe_voxels import ProbeVoxels, choose_probe_voxels, split_probe_cases
from datasets.store.files import write_text
from datasets.store.format import check_kind
from datasets.store.volumes import VolumeStore, fill_store
from engine.device import pick_device, pick_precision
from engine.flags import DeviceOptions, RunInfo, add_options, add_switch, make_parser, options_of, run_main
from engine.segmentation.setup import Setup, resolve_setup
from engine.watch.frozen_mlp import maps_reader, probe_mlp
from engine.watch.probe import ProbeOptions, probe_encoder
from engine.watch.probe_report import RANDOM_PREFIX, probe_table, with_random_mean
from engine.weights import CHECKPOINT_KEYS, read_encoder
from models.backbones import BACKBONES
from models.pretrained import load_pretrained
from models.weights_file import WeightsFile


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    network = parser.add_argument_group("Networks").add_argument
    network(
        "--weights",
        type=str,
        nargs="*",
        default=[],
        help="extracted weights, pretraining checkpoints, published weights or hf://owner/name",
    )
    network("--checkpoint_key", type=str, choices=CHECKPOINT_KEYS, default="auto", help="of a checkpoint")
    network("--num_random", type=int, default=2, help="randomly initialised networks to probe beside them; 0 = none")
    network("--backbone", type=str, default=None, help="network; unset = the weights', swin_unetr without")
    network("--feature_size", type=int, default=None, help="its channels at stride 2; unset = the weights'")
    network("--min_share", type=float, default=0.9, help="share of the encoder's keys, 0 to 1, that weights must fill")
    for side, axis in zip("xyz", "WHD"):
        network(
            f"--roi_{side}", type=int, default=None, help=f"window along {axis}, voxels; unset = the weights', else 96"
        )
    data = parser.add_argument_group("Data").add_argument
    data("--data_dir", type=str, required=True, help="folder that the data list's paths start from")
    data("--json_list", type=str, required=True, help="data list; its labelled training cases teach, others judge")
    data("--store_dir", type=str, required=True, help="volume store; cases that it lacks are added")
    data("--classes", type=str, choices=["list", *sorted(BUILT_IN)], default="list", help="what the labels mean")
    data("--num_labelled", type=int, default=0, help="cases that teach the probes; 0 = all")
    data("--fold", type=int, default=0, help="which of them, as in finetuning")
    data("--held_out_share", type=float, default=0.3, help="of labelled cases that judge, where the list does not say")
    data("--num_voxels", type=int, default=50, help="voxels per case and class")
    data("--seed", type=int, default=0, help="draws the voxels and the random networks")
    probes = parser.add_argument_group("Probes")
    add_options(probes, ProbeOptions)
    add_switch(probes, "--mlp", False, "also Dice of a per-voxel MLP on whole volumes; takes longest")
    running = parser.add_argument_group("Running")
    running.add_argument("--output", type=str, required=True, help="JSON file; the table goes beside it as .txt")
    add_options(running, DeviceOptions)
    running.add_argument("--num_workers", type=int, default=2, help="processes that add cases to the store")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    check_flags(flags)
    files = {path: read_encoder(path, flags.checkpoint_key) for path in flags.weights}
    setup = common_setup(flags, files)
    voxels = open_voxels(flags, setup.preprocessing.spacing_mm)
    results = probe_networks(flags, files, setup, voxels)
    report = {
        "commit": RunInfo.collect(flags).commit,
        "backbone": {"name": setup.backbone, "feature_size": setup.feature_size},
        "preprocessing": setup.preprocessing.as_dict(),
        "classes": list(voxels.classes.names),
        "cases": {"taught": [case.name for case in voxels.taught], "judged": [case.name for case in voxels.judged]},
        "num_voxels": {side: sum(len(c.voxels) for c in getattr(voxels, side)) for side in ("taught", "judged")},
        "results": with_random_mean(results),
    }
    output, table = Path(flags.output), probe_table(report)
    write_text(output, json.dumps(report, indent=1) + "\n")
    write_text(output.with_suffix(".txt"), table)
    RunInfo.collect(flags).write_beside(output)
    print(table)


def probe_networks(flags, files: dict[str, WeightsFile], setup: Setup, voxels: ProbeVoxels) -> dict[str, dict]:
    """Scores of the weights by their path, and of randomly initialised networks, in plain values."""
    device, known = pick_device(flags.device, 0), setup.preprocessing
    windows = {"roi": known.roi, "hu_min": known.hu_min, "hu_max": known.hu_max}
    options = options_of(flags, ProbeOptions, **windows, precision=pick_precision(flags.precision, device))
    random = {f"{RANDOM_PREFIX}{index}": flags.seed + index for index in range(flags.num_random)}
    results = {}
    for name in [*files, *random]:
        torch.manual_seed(random.get(name, flags.seed))
        network = BACKBONES[setup.backbone](setup.feature_size, known.roi, None, False).to(device).eval()
        if name in files:
            print(load_pretrained(network.network, files[name], flags.min_share).describe(), flush=True)
        started = time.perf_counter()
        results[name] = probe_encoder(network.encode, voxels, options, device, progress=name)
        if flags.mlp:
            read_maps = maps_reader(network, options, device)
            results[name]["mlp"] = probe_mlp(read_maps, voxels, flags.seed, progress=f"{name}, MLP")
        results[name]["seconds"] = round(time.perf_counter() - started, 1)
    return results


def check_flags(flags) -> None:
    """Report mistakes in numbers before anything is read.

    Raises:
        ValueError: nothing to probe, or a number out of range.
    """
    if not flags.weights and not flags.num_random:
        raise ValueError("nothing to probe: give --weights, or --num_random of 1 or more")
    if flags.num_voxels < 1 or min(flags.num_random, flags.seed) < 0:
        raise ValueError("--num_voxels must be 1 or more, --num_random and --seed 0 or more")
    if not flags.output.endswith(".json"):
        raise ValueError(f"--output {flags.output}: expected a name that ends in .json")


def common_setup(flags, files: dict[str, WeightsFile]) -> Setup:
    """Network and preprocessing: what the weights say, which must be the same for all of them.

    Raises:
        ValueError: weights that were trained differently, or an unknown backbone.
    """
    given = {"name": flags.backbone, "feature_size": flags.feature_size}
    given["roi"] = [flags.roi_z, flags.roi_y, flags.roi_x]
    descriptions = {path: file.description for path, file in files.items()} or {"": {}}
    setups = {path: resolve_setup(text, given, BACKBONES, flags.store_dir) for path, text in descriptions.items()}
    for path, setup in setups.items():
        for note in setup.notes:
            print(f"warning: {path}: {note}", flush=True)
    first, *others = setups.values()
    if any(other != first for other in others):
        raise ValueError(
            f"--weights {' '.join(files)}: other backbones, voxel sizes, HU windows or crops; probe them apart"
        )
    return first


def open_voxels(flags, spacing_mm: tuple[float, float, float] | None) -> ProbeVoxels:
    """Split the labelled cases, store those that are not stored yet, and draw the voxels."""
    taught, judged = split_probe_cases(
        flags.json_list, flags.data_dir, flags.num_labelled, flags.fold, flags.held_out_share
    )
    classes = read_classes(flags.json_list, flags.classes)
    fill_store([*taught, *judged], flags.store_dir, spacing_mm or "native", flags.num_workers, renew=True)
    store = VolumeStore(flags.store_dir, expected_spacing_mm=spacing_mm or "native")
    check_kind(store.store_dir, CT)
    return choose_probe_voxels(store, classes, taught, judged, flags.num_voxels, flags.seed)


if __name__ == "__main__":
    run_main(main)
