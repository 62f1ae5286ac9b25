"""Write the data list (Decathlon JSON) of a folder of CT or radiographs; every file is opened and checked on the way.

    python scripts/create_json.py --data_dir FLARE22 --output flare.json --num_validation 20
    python scripts/create_json.py --data_dir FLARE22 --output flare_labelled.json \\
        --cases labelled --validation_fraction 0.2
    python scripts/create_json.py --data_dir totalsegmentator --output totalsegmentator.json
    python scripts/create_json.py --data_dir ChestX-ray14/images --list_file train.txt --validation_list_file val.txt \\
        --output chest.json
    python scripts/create_json.py --data_dir CT-RATE --output ct_rate.json --group_regex '(train_[0-9]+)_'

Understood are the FLARE22 layout, nnU-Net and Decathlon folders, one folder per case with a ct.nii.gz, and any other
folder of .nii, .nii.gz, .mha, .mhd and .nrrd files. A folder with the slices of one DICOM series is one CT. What was
seen and not taken is counted by kind. A folder of .png files holds radiographs, their masks named or placed like the
labels of CT; a list file names one in each line.

Files that cannot be used are named on stderr with the reason, kept under "unreadable" in the list, and left out of both
sections; a CT whose label cannot be used is listed without it (pretraining needs none), unless --cases labelled asks
for labels. Takes about as long as decompressing all files once.
"""

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np
from tqdm import tqdm

from datasets.ct.images import CT, MR, kind_of, read_image, read_labels_of
from datasets.ct.intensity import NO_AIR_HU, few_whole_values
from datasets.ct.mr import DEFAULT_PERCENTILES
from datasets.ct.nifti import CTReadError
from datasets.lists.data_list import Case, DataListError, write_data_list
from datasets.lists.label_classes import LabelClasses, read_classes
from datasets.lists.list_file import read_list_file
from datasets.lists.search import search
from datasets.lists.splits import split_cases
from engine.flags import FlagChecks, make_parser, run_main

FLARE22_LABELS = LabelClasses.built_in("flare22").names
NUM_NAMES_SHOWN = 3


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=str, required=True, help="folder to search for CT, MR or radiographs")
    data.add_argument("--modality", choices=["ct", "mr"], default="ct", help="what volumes hold, and are checked as")
    data.add_argument(
        "--list_file", type=str, default="", help="text file that names radiographs of --data_dir, one a line"
    )
    data.add_argument(
        "--validation_list_file", type=str, default="", help="the same for the validation section; empty = draw it"
    )
    data.add_argument("--output", type=str, required=True, help="JSON file to write")
    data.add_argument(
        "--cases", choices=["all", "unlabelled", "labelled"], default="all", help="which cases to put in the list"
    )
    data.add_argument(
        "--group_regex",
        type=str,
        default="",
        help="pattern in a case's name whose first (...) is the patient: scans of one are not split up, nor paired",
    )
    split = parser.add_argument_group("validation")
    split.add_argument("--num_validation", type=int, default=None, help="cases to hold out; wins over the fraction")
    split.add_argument("--validation_fraction", type=float, default=0.0, help="share of cases to hold out; 0: none")
    split.add_argument("--seed", type=int, default=0, help="draws the held-out cases")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that open files")
    return parser


def check_case(case: Case, needs_label: bool = False, modality: str = CT) -> tuple[Case | None, dict[str, str], bool]:
    """The case as it can be used, file -> reason for what cannot, and whether the volume shows air.

    A label that cannot be used is taken off its case; None stands for a case without a usable image, or, where it
    `needs_label`, without a usable label.
    """
    file, has_air = case.image, True
    try:
        image = read_image(case.source, DEFAULT_PERCENTILES if modality == MR else None)
        is_ct = kind_of(file) == modality == CT
        has_air = not is_ct or bool(image.array.min() <= NO_AIR_HU)
        values = image.array if is_ct else image.array.astype(np.int32) - int(image.array.min())
        if num_values := few_whole_values(values):
            least = "none below zero: " if is_ct else ""
            raise CTReadError(f"{file}: only {num_values} whole values, {least}it looks like a label map")
        if case.label is not None:
            file = case.label
            read_labels_of(image, file)
        return case, {}, has_air
    except CTReadError as error:
        reason = str(error).removeprefix(f"{file}: ")
    except MemoryError:
        reason = "not enough memory to read it; try a lower --num_workers"
    except Exception as error:  # whatever one strange file does, thousands of others wait behind it
        reason = f"unexpected {type(error).__name__} ({error})"
    if file == case.image or needs_label:
        return None, {str(file): reason}, has_air
    return replace(case, label=None), {str(file): f"{reason}; {case.name} is listed without its label"}, has_air


def check_cases(
    cases: Sequence[Case], num_workers: int, needs_label: bool = False, modality: str = CT
) -> tuple[list[Case], dict[str, str], list[Case]]:
    """The usable cases, file -> reason for what cannot be used, and those of the usable cases that show no air."""
    usable, unreadable, airless = [], {}, []
    # Threads are enough: decompression, which takes nearly all of the time, leaves Python's lock.
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checks = pool.map(partial(check_case, needs_label=needs_label, modality=modality), cases)
        for case, problems, has_air in tqdm(checks, total=len(cases), desc="checking", unit="case"):
            unreadable.update(problems)
            if case is not None:
                usable.append(case)
            if case is not None and not has_air:
                airless.append(case)
    return usable, unreadable, airless


def choose(cases: Sequence[Case], which: str, data_dir: str) -> list[Case]:
    """The cases with or without labels, or all."""
    chosen = [case for case in cases if which == "all" or (case.label is not None) == (which == "labelled")]
    if not chosen:
        raise DataListError(f"{data_dir}: none of {len(cases)} cases is {which}; change --cases")
    return chosen


def label_names(cases: Sequence[Case], data_dir: str) -> dict[str, str]:
    """Label value -> name: of the folder's own dataset.json, else FLARE22's for its cases, else only the background."""
    known = Path(data_dir) / "dataset.json"
    if known.is_file():
        try:
            classes = read_classes(known)
            return {str(value): name for value, name in zip(classes.values, classes.names)}
        except DataListError as error:
            print(f"note: the names of labels are not known: {error}", file=sys.stderr)
    is_flare = any(case.label is not None and case.name.startswith("FLARE22_") for case in cases)
    return {str(value): name for value, name in enumerate(FLARE22_LABELS if is_flare else FLARE22_LABELS[:1])}


def find(flags) -> tuple[list[Case], set[str] | None, dict[str, str]]:
    """All cases, names of those that a list holds out (None: to be drawn), and file -> why a listed one is missing."""
    if not flags.list_file:
        found = search(flags.data_dir)
        if kinds := found.describe_not_taken():
            print(f"{flags.data_dir}: not taken: {kinds}")
        return found.cases, None, {}
    cases, held_out, missing = [], None, {}
    for list_file in filter(None, (flags.list_file, flags.validation_list_file)):
        listed = read_list_file(list_file, flags.data_dir)
        print(
            f"{list_file}: {len(listed.cases)} pictures, {len(listed.missing)} missing, {listed.num_blank} blank lines"
        )
        names = {case.name for case in listed.cases}
        if twice := sorted(names & {case.name for case in cases}):
            raise DataListError(f"{flags.list_file} and {list_file} both name {', '.join(twice[:NUM_NAMES_SHOWN])}")
        held_out = names if cases else None
        cases, missing = cases + listed.cases, missing | listed.missing
    return cases, held_out, missing


def with_groups(cases: Sequence[Case], group_regex: str) -> list[Case]:
    """The cases with their patients, as the pattern finds them in the names; others stay patients of their own."""
    if not group_regex:
        return list(cases)
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise DataListError(f"--group_regex {group_regex!r}: no regular expression ({error})") from error
    if pattern.groups != 1:
        raise DataListError(f"--group_regex {group_regex!r}: expected one pair of parentheses, around the patient")
    found = [(case, pattern.search(case.name)) for case in cases]
    grouped = [replace(case, group=match[1]) if match and match[1] else case for case, match in found]
    num_grouped = sum(bool(case.group) for case in grouped)
    if not num_grouped:
        raise DataListError(f"--group_regex {group_regex!r} fits no name, the first is {cases[0].name}")
    print(f"{len({case.patient for case in grouped})} patients; {len(cases) - num_grouped} names show none")
    return grouped


def split(cases: Sequence[Case], held_out: set[str] | None, flags) -> tuple[list[Case], list[Case]]:
    """Training and validation: by the names held out, or drawn."""
    if held_out is None:
        return split_cases(cases, flags.num_validation, flags.validation_fraction, flags.seed)
    return [case for case in cases if case.name not in held_out], [case for case in cases if case.name in held_out]


def check_flags(flags) -> None:
    """Raise ValueError for a number of threads below zero, or two ways of holding cases out."""
    checks = FlagChecks(flags)
    checks.expect(flags.num_workers >= 0, "num_workers", "0 or more")
    checks.finish()
    if flags.validation_list_file and not flags.list_file:
        raise DataListError("--validation_list_file needs --list_file, the pictures to train with")
    if flags.validation_list_file and (flags.num_validation is not None or flags.validation_fraction):
        raise DataListError(
            "--validation_list_file says what is held out: leave --num_validation and the fraction away"
        )


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    check_flags(flags)
    listed, held_out, missing = find(flags)
    found = with_groups(choose(listed, flags.cases, flags.data_dir), flags.group_regex)
    split(found, held_out, flags)  # complain before the long check
    cases, unreadable, airless = check_cases(found, flags.num_workers, flags.cases == "labelled", flags.modality)
    for file, reason in (missing | unreadable).items():
        print(f"left out {file}: {reason}", file=sys.stderr)
    if airless:
        # Found out too late, every crop of such a data set is one grey.
        shown = ", ".join(str(case.image) for case in airless[:NUM_NAMES_SHOWN])
        shown += ", ..." if len(airless) > NUM_NAMES_SHOWN else ""
        print(
            f"note: {len(airless)} of {len(cases)} volumes hold nothing below {NO_AIR_HU} HU, where air lies ({shown}"
            "): MR (add --modality mr), or scanner values 1024 above HU? --a_min and --a_max are in the files' own "
            "values",
            file=sys.stderr,
        )
    if not cases:
        raise DataListError(f"{flags.data_dir}: none of {len(found)} cases can be read; the reasons are above")
    training, validation = split(cases, held_out, flags)
    names = label_names(cases, flags.data_dir)
    write_data_list(
        flags.output, flags.data_dir, training, validation, names, missing | unreadable, is_mr=flags.modality == MR
    )
    num_labelled = sum(case.label is not None for case in cases)
    num_left_out = len(found) - len(cases)
    print(
        f"{flags.output}: {len(training)} training and {len(validation)} validation cases "
        f"({num_labelled} with labels), {num_left_out + len(missing)} cases left out"
        + (f", {num} listed without their label" if (num := len(unreadable) - num_left_out) else "")
    )


if __name__ == "__main__":
    run_main(main)
