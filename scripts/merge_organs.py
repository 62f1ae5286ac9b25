"""Join the masks of single organs into one label map a case, as TotalSegmentator and AbdomenAtlas need it.

    python scripts/merge_organs.py --data_dir Totalsegmentator_dataset_v201
    python scripts/create_json.py --data_dir Totalsegmentator_dataset_v201 --output totalsegmentator.json \\
        --cases labelled --validation_fraction 0.2
    python scripts/merge_organs.py --data_dir AbdomenAtlas --organs liver=1 kidney_left=2 kidney_right=2

CASE/segmentations/ORGAN.nii.gz beside CASE/ct.nii.gz become CASE/label.nii.gz, which create_json.py finds. Without
--organs the 13 organs of FLARE22 get FLARE22's values. The names of the values go to DATA_DIR/dataset.json.

A voxel that two organs claim goes to the smaller one. Overlaps, organs that are left out, and organs without a file are
counted. Cases that have a label.nii.gz keep it, so the command may be stopped and run again.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
from tqdm import tqdm

from datasets.ct.file_grid import read_file_grid, write_label_like
from datasets.ct.formats import is_volume_file
from datasets.ct.nifti import CTReadError
from datasets.ct.organ_masks import join_masks
from datasets.lists.data_list import DataListError
from datasets.lists.label_classes import FLARE22, LabelClasses, read_classes
from datasets.lists.names import DICOM_STEMS, IMAGE_STEMS, plain_stem
from datasets.lists.search import LABEL_FOLDERS, find_cases
from datasets.store.files import write_text
from engine.flags import FlagChecks, add_switch, make_parser, run_main

LABEL_FILE, NAMES_FILE = "label.nii.gz", "dataset.json"
# File names of TotalSegmentator and of AbdomenAtlas.
FLARE22_FILES = {
    "liver": ("liver",),
    "right kidney": ("kidney_right",),
    "spleen": ("spleen",),
    "pancreas": ("pancreas",),
    "aorta": ("aorta",),
    "inferior vena cava": ("inferior_vena_cava", "postcava"),
    "right adrenal gland": ("adrenal_gland_right",),
    "left adrenal gland": ("adrenal_gland_left",),
    "gallbladder": ("gallbladder", "gall_bladder"),
    "esophagus": ("esophagus",),
    "stomach": ("stomach",),
    "duodenum": ("duodenum",),
    "left kidney": ("kidney_left",),
}
NUM_SHOWN = 10


@dataclass
class Report:
    """What was joined.

    Attributes:
        num_joined: cases.
        kept: cases whose label map was there.
        failed: case -> reason.
        left_out: organ file that no value was asked for -> cases.
        missing: organ without a file -> cases; it is background there.
        overlaps: organ kept over organ lost -> voxels.
    """

    num_joined: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    overlaps: Counter[str] = field(default_factory=Counter)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=str, required=True, help="folder of the cases")
    parser.add_argument(
        "--organs",
        type=str,
        nargs="+",
        default=[],
        help="FILE=VALUE of each organ to keep, FILE without suffix; files may share a value; unset = FLARE22's organs",
    )
    add_switch(parser, "--overwrite", False, "replace label maps that are there")
    parser.add_argument("--num_workers", type=int, default=4, help="threads, a case each")
    return parser


def value_of_files(words: Sequence[str]) -> tuple[dict[str, int], LabelClasses]:
    """File stem -> label value, and the names of the values; without words FLARE22's.

    Raises:
        ValueError: no FILE=VALUE with a value from 1 to 32767, or a file twice.
    """
    if not words:
        value_of = {file: FLARE22.index(organ) + 1 for organ, files in FLARE22_FILES.items() for file in files}
        return value_of, LabelClasses.built_in("flare22")
    value_of, names = {}, {}
    for word in words:
        file, _, value = word.partition("=")
        if not file or not value.isdecimal() or not 1 <= int(value) <= 32767:
            raise ValueError(f"--organs {word}: expected FILE=VALUE with a value from 1 to 32767, as liver=1")
        if file in value_of:
            raise ValueError(f"--organs: {file} has the values {value_of[file]} and {value}")
        value_of[file] = int(value)
        names.setdefault(int(value), file.replace("_", " "))
    values = sorted(names)
    return value_of, LabelClasses((0, *values), ("background", *(names[value] for value in values)))


def find_masks(data_dir: str) -> dict[Path, dict[str, Path]]:
    """Image -> organ file stem -> file, for the `ct.nii.gz` and the like that have a folder of masks beside them.

    Raises:
        DataListError: there is none, or a case has two files of one organ.
    """
    found = {}
    for case in find_cases(data_dir):
        if plain_stem(case.image).lower() not in IMAGE_STEMS + DICOM_STEMS:
            continue
        folders = [case.image.parent / name for name in LABEL_FOLDERS]
        files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir())
        files = [file for file in files if is_volume_file(file) and not file.name.startswith(".")]
        masks = {plain_stem(file): file for file in files}
        if len(masks) < len(files):
            raise DataListError(f"{case.image.parent}: several mask files of one organ; keep one of each")
        if masks:
            found[case.image] = masks
    if not found:
        raise DataListError(f"{data_dir}: no CASE/ct.nii.gz with masks in CASE/segmentations below it (--data_dir)")
    return found


def claim_names(data_dir: str, classes: LabelClasses) -> None:
    """Write the names of the label values, unless they are there.

    Raises:
        DataListError: the folder's label values have other names.
    """
    path = Path(data_dir) / NAMES_FILE
    if not path.exists():
        labels = {str(value): name for value, name in zip(classes.values, classes.names)}
        write_text(path, json.dumps({"labels": labels}, indent=1) + "\n")
    elif (there := read_classes(path)) != classes:
        raise DataListError(
            f"{path}: names the label values {dict(zip(there.values, there.names))}, and --organs asks for "
            f"{dict(zip(classes.values, classes.names))}; remove the file and pass --overwrite to replace all labels"
        )


def join_case(image: Path, masks: Mapping[str, Path], value_of: Mapping[str, int]) -> Counter[tuple[int, int]]:
    """Write the label map of one case; its overlaps.

    Raises:
        CTReadError: a mask cannot be used, or none is wanted.
    """
    wanted = {file: value_of[stem] for stem, file in masks.items() if stem in value_of}
    if not wanted:
        raise CTReadError(f"{image}: none of its {len(masks)} masks is of --organs")
    grid = read_file_grid(image)
    joined = join_masks(wanted, grid, image)
    write_label_like(image.parent / LABEL_FILE, joined.array, grid)
    return joined.overlaps


def join_all(found: Mapping[Path, Mapping[str, Path]], flags: jsonargparse.Namespace) -> Report:
    """Join the masks of all cases."""
    value_of, classes = value_of_files(flags.organs)
    name_of = dict(zip(classes.values, classes.names))
    todo = [image for image in found if flags.overwrite or not (image.parent / LABEL_FILE).exists()]
    report = Report(kept=len(found) - len(todo))

    def attempt(image: Path) -> Counter[tuple[int, int]] | str:
        try:
            return join_case(image, found[image], value_of)
        except CTReadError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, flags.num_workers)) as pool:
        for image, result in zip(todo, tqdm(pool.map(attempt, todo), total=len(todo), desc="joining", unit="case")):
            if isinstance(result, str):
                report.failed[str(image.parent)] = result
                continue
            report.num_joined += 1
            report.left_out.update(stem for stem in found[image] if stem not in value_of)
            there = {value_of[stem] for stem in found[image] if stem in value_of}
            report.missing.update(name for value, name in name_of.items() if value and value not in there)
            for (kept, lost), count in result.items():
                report.overlaps[f"{name_of[kept]} over {name_of[lost]}"] += count
    return report


def describe(counts: Counter[str]) -> str:
    """`liver (20), spleen (19)`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", {len(ordered) - NUM_SHOWN} more" if len(ordered) > NUM_SHOWN else ""
    return ", ".join(f"{name} ({count})" for name, count in ordered[:NUM_SHOWN]) + more


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    checks = FlagChecks(flags)
    checks.expect(flags.num_workers >= 0, "num_workers", "0 or more")
    checks.finish()
    classes = value_of_files(flags.organs)[1]
    found = find_masks(flags.data_dir)
    claim_names(flags.data_dir, classes)
    report = join_all(found, flags)
    for case, reason in report.failed.items():
        print(f"failed {case}: {reason}", file=sys.stderr)
    print(
        f"{flags.data_dir}: {report.num_joined} label maps of {len(classes) - 1} organs written, {report.kept} were "
        f"there and kept, {len(report.failed)} cases failed"
    )
    for title, counts in (
        ("organs left out (cases)", report.left_out),
        ("organs without a file, background there (cases)", report.missing),
        ("overlaps, the smaller organ is kept (voxels)", report.overlaps),
    ):
        if counts:
            print(f"{title}: {describe(counts)}")
    if len(report.failed) == len(found):
        raise DataListError(f"{flags.data_dir}: none of {len(found)} cases could be joined; the reasons are above")


if __name__ == "__main__":
    run_main(main)
