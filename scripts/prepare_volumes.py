"""Make the volume store: every CT, MR or radiograph of a data list in a form that gives random crops in milliseconds.

    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store
    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store_1.5mm \\
        --spacing_mm 1.5 1.5 1.5
    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store --verify
    python scripts/prepare_volumes.py --data_dir MR --json_list mr.json --store_dir store_mr --modality mr

MR has no unit. With --modality mr, two percentiles of each volume's foreground become -800 and 800, the rest is linear
and clipped at -1000 and 1000, and the case's manifest keeps both intensities. The commands that read the store know
that it holds MR: their window is -1000 to 1000 unless --a_min and --a_max say otherwise.
Radiographs become volumes [1, H, W]; their pixels are 1 mm wide where the files do not say otherwise.
It may be stopped at any time and run again, and several may run at once on a shared folder: finished cases are kept.
A native store takes about 0.8 of the .nii.gz files' size. A worker needs about 0.5 GB of memory for a 512x512x200 CT.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.ct.images import CT, RADIOGRAPH
from datasets.ct.mr import DEFAULT_PERCENTILES, check_percentiles
from datasets.lists.data_list import MODALITIES, load_sections, read_json_list
from datasets.store.volumes import StoreError, build_store, parse_spacing, spacing_text
from engine.flags import FlagChecks, RunInfo, add_switch, available_cpus, make_parser, run_main

MODALITIES_NOT_MR = MODALITIES[CT], MODALITIES[RADIOGRAPH]


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=str, required=True, help="folder that the list's paths are relative to")
    data.add_argument("--json_list", type=str, required=True, help="data list, see scripts/create_json.py")
    data.add_argument("--sections", type=str, nargs="+", default=["training", "validation"], help="sections to store")
    data.add_argument("--store_dir", type=str, required=True, help="folder of the store; made if missing")
    data.add_argument(
        "--spacing_mm",
        type=str | float,
        nargs="+",
        default=["native"],
        help="voxel size D H W in mm, one number for all three, or native: each volume keeps its own",
    )
    data.add_argument(
        "--modality", choices=["ct", "mr"], default="ct", help="what volumes hold; .png are radiographs in any case"
    )
    data.add_argument(
        "--mr_percentiles",
        type=float,
        nargs=2,
        default=None,
        metavar=("LOW", "HIGH"),
        help="of the foreground of an MR, which become -800 and 800; unset = "
        + " ".join(f"{value:g}" for value in DEFAULT_PERCENTILES),
    )
    add_switch(data, "--verify", False, "compare finished cases with their checksums; damaged ones are stored again")
    parser.add_argument("--num_workers", type=int, default=available_cpus(), help="processes")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    checks = FlagChecks(flags)
    checks.expect(flags.num_workers >= 0, "num_workers", "0 or more")
    checks.finish()
    spacing_mm, mr_percentiles = parse_spacing(flags.spacing_mm), percentiles_of(flags)
    # Missing files are left to the build, which names them all.
    cases = load_sections(flags.json_list, flags.data_dir, flags.sections, must_exist=False)
    if mr_percentiles is None:
        note_other_modality(flags.json_list)
    print(f"{flags.store_dir}: {len(cases)} cases at {spacing_text(spacing_mm)}, {flags.num_workers} workers")
    report = build_store(
        cases, flags.store_dir, spacing_mm, flags.num_workers, flags.verify, mr_percentiles=mr_percentiles
    )
    RunInfo.collect(flags).write(flags.store_dir)
    for name, reason in sorted(report.failed.items()):
        print(f"failed {name}: {reason}", file=sys.stderr)
    print(
        f"{flags.store_dir}: {len(report.built)} cases stored, {len(report.reused)} were there already, "
        f"{len(report.failed)} failed" + (" (see failures.json)" if report.failed else "")
    )
    if len(report.failed) == len(cases):
        raise StoreError(f"{flags.store_dir}: none of {len(cases)} cases could be stored; the reasons are above")


def percentiles_of(flags) -> tuple[float, float] | None:
    """The percentiles of MR; None for another modality, of which --mr_percentiles is refused."""
    if flags.modality == "mr":
        return check_percentiles(flags.mr_percentiles or DEFAULT_PERCENTILES)
    if flags.mr_percentiles is not None:
        raise ValueError("--mr_percentiles is of MR: add --modality mr, or leave it away")
    return None


def note_other_modality(json_list: str) -> None:
    """Print a note where the data list states a modality other than CT and radiographs."""
    stated = read_json_list(json_list).get("modality")
    names = list(stated.values()) if isinstance(stated, dict) else []
    if others := [str(name) for name in names if name not in MODALITIES_NOT_MR]:
        print(
            f"note: {json_list} states the modality {', '.join(others)}, and volumes are read as CT; MR needs "
            "--modality mr",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_main(main)
