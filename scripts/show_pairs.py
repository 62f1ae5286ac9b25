"""Look at samples before training on them: a sheet of their crops in three planes, and statistics of the pairs.

    python scripts/show_pairs.py --store_dir store --embed_dir embeddings --data_dir DATA --json_list DATA.json \\
        --output pairs.png
    python scripts/show_pairs.py --store_dir store --pairing iou --iou_range 0.3 0.6 --output pairs.png
    python scripts/show_pairs.py --store_dir store --embed_dir embeddings --output pairs.png \\
        --view student --roi_x 64 --roi_y 64 --roi_z 64 --num_pairs 4 --seed 3

In a row of `--pairing sam` both crops should show the same anatomy of two patients around the yellow cross. The
statistics (JSON on stdout) are of the first `--num_counted` pairs of a training run with this seed and list; without
--json_list, of one that trains with every case of the store. Takes some seconds.
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.lists.data_list import load_data_list
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CropDataset, summarise_places
from datasets.samples.masks import MaskOptions
from datasets.samples.pairings import PAIRINGS, PairingOptions
from datasets.store.volumes import VolumeStore
from engine.flags import RunInfo, add_options, make_parser, run_main
from engine.pretrain_data import load_table, make_dataset
from engine.watch.sample_sheet import draw_sample_sheet
from models.methods import METHODS

UNCHANGED = ("crop", "target")  # two words for crops as they are, without augmentation


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command; those of pairs and views are named and set as in main_ddp.py."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data").add_argument
    data("--store_dir", type=str, required=True, help="volume store (scripts/prepare_volumes.py)")
    data("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    data("--json_list", type=str, default="", help="list whose training section to draw from; empty = all")
    data("--embed_dir", type=str, default="", help="folder of the correspondence table, for --pairing sam")
    data("--table_file", type=str, default="", help="correspondences.npy; empty = the one in --embed_dir")
    data("--output", type=str, required=True, help="picture to write (.png, .pdf)")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--method", type=str, choices=list(METHODS), default="alice", help="whose samples to show")
    pairs.add_argument(
        "--pairing", type=str, choices=sorted(PAIRINGS), default=None, help="how crops are chosen; unset = the method's"
    )
    add_options(pairs, PairingOptions)
    pairs.add_argument("--seed", type=int, default=0, help="decides every choice")
    pairs.add_argument("--num_counted", type=int, default=1000, help="pairs that the statistics count")
    views = parser.add_argument_group("views")
    views.add_argument("--num_pairs", type=int, default=6, help="rows of the sheet")
    known = [*UNCHANGED, *dict.fromkeys(view for method in METHODS.values() for view in pictured(method.views))]
    views.add_argument("--view", type=str, choices=known, default="crop", help="which picture; crop = not augmented")
    add_options(views, CropOptions)
    add_options(views, MaskOptions)
    return parser


def pictured(views: dict[str, str]) -> list[str]:
    """The views that are pictures."""
    return [name for name, kind in views.items() if kind != "blocks"]


def open_pairs(flags: jsonargparse.Namespace) -> CropDataset:
    """The dataset that a training run with these flags would see."""
    table, store = load_table(flags), VolumeStore(flags.store_dir)
    names, patient_of = store.names, {}
    if flags.json_list:
        listed = load_data_list(flags.json_list, flags.data_dir, "training", must_exist=False)
        names = [case.name for case in listed if case.name in store]
        patient_of = {case.name: case.patient for case in listed}
    return make_dataset(flags, METHODS[flags.method].views, store, table, names, flags.seed, patient_of)


def check_flags(flags: jsonargparse.Namespace) -> None:
    """Fill in the method's pairing.

    Raises:
        ValueError: the method has no such pairing or view.
    """
    method = METHODS[flags.method]
    flags.pairing = flags.pairing or method.pairings[0]
    if flags.pairing not in method.pairings:
        raise ValueError(f"--pairing {flags.pairing}: --method {flags.method} has {', '.join(method.pairings)}")
    if flags.view not in (*UNCHANGED, *pictured(method.views)):
        views = ", ".join(("crop", *pictured(method.views)))
        raise ValueError(f"--view {flags.view}: --method {flags.method} has {views}")


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    check_flags(flags)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = open_pairs(flags)
    samples = [dataset[index] for index in range(flags.num_pairs)]
    view = "crop" if flags.view in UNCHANGED else flags.view
    draw_sample_sheet(samples, flags.output, dataset.store, view)
    RunInfo.collect(flags).write(Path(flags.output).parent, f"{Path(flags.output).stem}.run.json")
    statistics = summarise_places([dataset.places(index) for index in range(flags.num_counted)])  # reads no voxel
    print(json.dumps(dataset.statistics() | statistics, indent=2))


if __name__ == "__main__":
    run_main(main)
