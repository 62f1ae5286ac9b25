"""Make a data set of synthetic torso CT with known truth, in FLARE22's folder layout, or of MR or radiographs.

    python scripts/make_phantom_dataset.py --out_dir data/phantom --num_unlabelled 20 --num_labelled 4 --seed 0
    python scripts/make_phantom_dataset.py --out_dir data/phantom_full --num_unlabelled 2 --num_labelled 0 --full_size
    python scripts/make_phantom_dataset.py --out_dir data/xray --radiographs --num_unlabelled 20 --num_labelled 8
    python scripts/make_phantom_dataset.py --out_dir data/mr --modality mr --num_channels 2 --num_unlabelled 8

A default case takes about 3 s on one core: 112-144 pixels a side, up to 125 slices of 1.5-5 mm, 1-3 MB.
Finished cases are kept, so a run that was stopped goes on where it was; a larger --num_unlabelled adds cases.
Each case: CT (and labels 1-13), landmarks/<case>.json with named landmarks in world mm, and what is unusual about it.
A radiograph is the projection of a patient: images/<case>.png (and labels/<case>.png: 1-13, 14 the lungs), about
200 x 200 pixels of 2 mm, some 11 s on one core. An MR has T1- or T2-weighted contrast, a bias field, Rician noise and
an arbitrary scale; with --num_channels 2 a file is 4-D and holds both contrasts. dataset.json names the version of the
generator; data sets of different versions are not comparable.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.phantom.cases import list_cases, render, write_dataset
from datasets.phantom.magnetic import list_mr, render_mr
from datasets.phantom.radiographs import list_radiographs, write_radiographs
from datasets.phantom.variants import Shares
from engine.flags import RunInfo, add_options, add_switch, make_parser, options_of, run_main


def make_flags():
    """The parser of this script."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("phantom")
    group.add_argument("--out_dir", type=str, required=True, help="folder to write to")
    group.add_argument("--num_unlabelled", type=int, default=20, help="cases in FLARE22Unlabeled")
    group.add_argument("--num_labelled", type=int, default=4, help="cases in FLARE22Train, with labels")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same files, byte for byte")
    group.add_argument("--num_workers", type=int, default=2, help="processes; 0 or 1: none besides this one")
    add_switch(
        group,
        "--full_size",
        False,
        "clinical matrices, 512x512 with up to 250 slices: 35-90 s a core and case, 40-80 MB a file, 2 GiB a process",
    )
    add_switch(group, "--radiographs", False, "chest and abdomen X-rays as PNG instead of CT; --full_size: 1 mm pixels")
    group.add_argument("--modality", choices=["ct", "mr"], default="ct", help="what volumes show")
    group.add_argument("--num_channels", choices=[1, 2], type=int, default=1, help="of an MR: T1 or T2, or both")
    add_switch(group, "--save_atlas_map", False, "also write atlas_maps/<case>.npz: every voxel's atlas mm (RAS order)")
    add_options(parser.add_argument_group("variants of anatomy and artefacts"), Shares)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    for name in ("num_unlabelled", "num_labelled", "num_workers", "seed"):
        if getattr(flags, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(flags, name)}")
    if flags.radiographs and flags.save_atlas_map:
        raise ValueError("--save_atlas_map is of CT: leave it away, or --radiographs")
    is_mr = flags.modality == "mr"
    if flags.radiographs and is_mr:
        raise ValueError("--radiographs are projections of CT: leave --modality mr away")
    if flags.num_channels > 1 and not is_mr:
        raise ValueError(f"--num_channels {flags.num_channels} is of MR: add --modality mr")
    shares = options_of(flags, Shares)
    list_all = list_radiographs if flags.radiographs else list_cases
    if is_mr:
        list_all = partial(list_mr, num_channels=flags.num_channels)
    cases = list_all(flags.num_unlabelled, flags.num_labelled, flags.seed, flags.full_size, shares)
    if not cases:
        raise ValueError("nothing to make: --num_unlabelled and --num_labelled are both 0")
    if flags.radiographs:
        num_made = write_radiographs(Path(flags.out_dir), cases, flags.num_workers)
    else:
        draw = render_mr if is_mr else render
        num_made = write_dataset(Path(flags.out_dir), cases, flags.num_workers, flags.save_atlas_map, draw)
    RunInfo.collect(flags).write(flags.out_dir, "phantom_run.json")
    print(f"{num_made} cases made, {len(cases) - num_made} were there, in {flags.out_dir}")


if __name__ == "__main__":
    run_main(main)
