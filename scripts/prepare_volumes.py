"""Make the volume store: every CT or radiograph of a data list in a form that gives random crops in milliseconds.

    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store
    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store_1.5mm \\
        --spacing_mm 1.5 1.5 1.5
    python scripts/prepare_volumes.py --data_dir FLARE22 --json_list flare.json --store_dir store --verify

Radiographs become volumes [1, H, W]; their pixels are 1 mm wide where the files do not say otherwise.
It may be stopped at any time and run again, and several may run at once on a shared folder: finished cases are kept.
A native store takes about 0.8 of the .nii.gz files' size. A worker needs about 0.5 GB of memory for a 512x512x200 CT.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.lists.data_list import load_sections
from datasets.store.volumes import StoreError, build_store, parse_spacing, spacing_text
from engine.flags import FlagChecks, RunInfo, add_switch, available_cpus, make_parser, run_main


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
    add_switch(data, "--verify", False, "compare finished cases with their checksums; damaged ones are stored again")
    parser.add_argument("--num_workers", type=int, default=available_cpus(), help="processes")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    checks = FlagChecks(flags)
    checks.expect(flags.num_workers >= 0, "num_workers", "0 or more")
    checks.finish()
    spacing_mm = parse_spacing(flags.spacing_mm)
    # Missing files are left to the build, which names them all.
    cases = load_sections(flags.json_list, flags.data_dir, flags.sections, must_exist=False)
    print(f"{flags.store_dir}: {len(cases)} cases at {spacing_text(spacing_mm)}, {flags.num_workers} workers")
    report = build_store(cases, flags.store_dir, spacing_mm, flags.num_workers, flags.verify)
    RunInfo.collect(flags).write(flags.store_dir)
    for name, reason in sorted(report.failed.items()):
        print(f"failed {name}: {reason}", file=sys.stderr)
    print(
        f"{flags.store_dir}: {len(report.built)} cases stored, {len(report.reused)} were there already, "
        f"{len(report.failed)} failed" + (" (see failures.json)" if report.failed else "")
    )
    if len(report.failed) == len(cases):
        raise StoreError(f"{flags.store_dir}: none of {len(cases)} cases could be stored; the reasons are above")


if __name__ == "__main__":
    run_main(main)
