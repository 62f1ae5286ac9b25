"""Look at paired crops before training on them: a sheet of query and key crops in three planes, and pair statistics.

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
from datasets.samples.augment import AugmentOptions
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.dataset import PairedCropDataset, PairStatistics
from datasets.samples.pairings import PAIRINGS, PairingOptions
from datasets.store.volumes import VolumeStore
from engine.flags import RunInfo, add_switch, make_parser, run_main
from engine.watch.sample_sheet import draw_pair_sheet


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command; those of pairs and views are named and set as in main_ddp.py."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--store_dir", type=str, required=True, help="volume store (scripts/prepare_volumes.py)")
    data.add_argument("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    data.add_argument("--json_list", type=str, default="", help="list whose training section to draw from; empty = all")
    data.add_argument("--embed_dir", type=str, default="", help="folder of the correspondence table, for --pairing sam")
    data.add_argument("--table_file", type=str, default="", help="correspondences.npy; empty = the one in --embed_dir")
    data.add_argument("--output", type=str, required=True, help="picture to write (.png, .pdf)")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--pairing", type=str, choices=sorted(PAIRINGS), default="sam", help="how two views are paired")
    pairs.add_argument("--min_score", type=float, default=PairingOptions.min_score, help="lowest score; -1 = any")
    pairs.add_argument("--max_cycle_mm", type=float, default=PairingOptions.max_cycle_mm, help="largest, mm; 1e6 = any")
    pairs.add_argument("--iou_range", type=float, nargs=2, default=[0.3, 0.6], help="IoU of two crops of one volume")
    pairs.add_argument(
        "--jitter_mm", type=float, default=PairingOptions.jitter_mm, help="how far crops lie off their points, mm"
    )
    pairs.add_argument("--seed", type=int, default=0, help="decides every choice")
    pairs.add_argument("--num_counted", type=int, default=1000, help="pairs that the statistics count")
    views = parser.add_argument_group("views")
    views.add_argument("--num_pairs", type=int, default=6, help="rows of the sheet")
    views.add_argument(
        "--view", type=str, choices=["target", "student", "teacher"], default="target", help="which crop"
    )
    views.add_argument("--roi_x", type=int, default=96, help="crop size along W, voxels")
    views.add_argument("--roi_y", type=int, default=96, help="crop size along H, voxels")
    views.add_argument("--roi_z", type=int, default=96, help="crop size along D, voxels")
    views.add_argument("--a_min", type=float, default=-125.0, help="HU that becomes 0")
    views.add_argument("--a_max", type=float, default=225.0, help="HU that becomes 1")
    views.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked blocks; 0 = off")
    views.add_argument("--mask_block", type=int, default=16, help="side of a mask block, voxels")
    add_switch(views, "--augment", True, "intensity augmentation of student and teacher views")
    return parser


def open_pairs(flags: jsonargparse.Namespace) -> PairedCropDataset:
    """The dataset that a training run with these flags would see."""
    table = None
    if flags.pairing == "sam":
        if not (flags.table_file or flags.embed_dir):
            raise ValueError("--pairing sam needs --embed_dir or --table_file (see scripts/mine_pairs.py)")
        table = CorrespondenceTable.load(flags.table_file or flags.embed_dir)
    store, names = VolumeStore(flags.store_dir), None
    if flags.json_list:
        listed = load_data_list(flags.json_list, flags.data_dir, "training", must_exist=False)
        names = [case.name for case in listed if case.name in store]
    return PairedCropDataset(
        store,
        table,
        flags.pairing,
        roi=(flags.roi_z, flags.roi_y, flags.roi_x),
        hu_min=flags.a_min,
        hu_max=flags.a_max,
        mask_ratio=flags.mask_ratio,
        mask_block=flags.mask_block,
        min_score=flags.min_score,
        max_cycle_mm=flags.max_cycle_mm,
        iou_range=flags.iou_range,
        jitter_mm=flags.jitter_mm,
        augment=AugmentOptions() if flags.augment else AugmentOptions.off(),
        seed=flags.seed,
        case_names=names,
    )


def count_pairs(dataset: PairedCropDataset, num_counted: int) -> dict:
    """Facts about the dataset, and statistics of its first pairs (places only: no voxel is read)."""
    statistics = PairStatistics()
    for index in range(num_counted):
        statistics.add_draw(dataset.draw_pair(index))
    return dataset.statistics() | statistics.summary()


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = open_pairs(flags)
    samples = [dataset[index] for index in range(flags.num_pairs)]
    draw_pair_sheet(samples, flags.output, dataset.store, flags.view)
    RunInfo.collect(flags).write(Path(flags.output).parent, f"{Path(flags.output).stem}.run.json")
    print(json.dumps(count_pairs(dataset, flags.num_counted), indent=2))


if __name__ == "__main__":
    run_main(main)
