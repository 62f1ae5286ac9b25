"""Write the data list (Decathlon JSON) of a folder of CT volumes; every file is opened and checked on the way.

    python scripts/create_json.py --data_dir FLARE22 --output flare.json --num_validation 20
    python scripts/create_json.py --data_dir FLARE22 --output flare_labelled.json \\
        --cases labelled --validation_fraction 0.2
    python scripts/create_json.py --data_dir totalsegmentator --output totalsegmentator.json

Understood are the FLARE22 layout, nnU-Net and Decathlon folders, one folder per case with a ct.nii.gz, and any other
folder of .nii and .nii.gz files. Files that cannot be used are named on stderr with the reason, kept under "unreadable"
in the list, and left out of both sections; a CT whose label cannot be used is listed without it (pretraining needs
none), unless --cases labelled asks for labels. Takes about as long as decompressing all files once.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np
from tqdm import tqdm

from datasets.ct.nifti import CTReadError, read_ct, read_label_of
from datasets.lists.data_list import Case, DataListError, find_cases, split_cases, write_data_list
from datasets.lists.label_classes import LabelClasses
from engine.flags import make_parser, run_main

FLARE22_LABELS = LabelClasses.built_in("flare22").names
NO_AIR_HU = -200  # a CT whose lowest value lies above shows no air: cropped, or not in HU
NUM_NAMES_SHOWN = 3
MAX_LABEL_VALUES = 64  # a volume of no more different values, none below zero, is no CT


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=str, required=True, help="folder to search for CT volumes")
    data.add_argument("--output", type=str, required=True, help="JSON file to write")
    data.add_argument(
        "--cases", choices=["all", "unlabelled", "labelled"], default="all", help="which cases to put in the list"
    )
    split = parser.add_argument_group("validation")
    split.add_argument("--num_validation", type=int, default=None, help="cases to hold out; wins over the fraction")
    split.add_argument("--validation_fraction", type=float, default=0.0, help="share of cases to hold out; 0: none")
    split.add_argument("--seed", type=int, default=0, help="draws the held-out cases")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that open files")
    return parser


def check_case(case: Case, needs_label: bool = False) -> tuple[Case | None, dict[str, str], bool]:
    """The case as it can be used, file -> reason for what cannot, and whether the volume shows air.

    A label that cannot be used is taken off its case; None stands for a case without a usable image, or, where it
    `needs_label`, without a usable label.
    """
    file, has_air = case.image, True
    try:
        image = read_ct(file)
        has_air = bool(image.array.min() <= NO_AIR_HU)
        if num_values := few_whole_values(image.array):
            raise CTReadError(f"{file}: only {num_values} whole values, none below zero: it looks like a label map")
        if case.label is not None:
            file = case.label
            read_label_of(image, file)
        return case, {}, has_air
    except CTReadError as error:
        reason = str(error).removeprefix(f"{file}: ")
    except MemoryError:
        reason = "not enough memory to read it; try a lower --num_workers"
    except Exception as error:  # whatever one strange file does, thousands of others wait behind it
        reason = f"unexpected {type(error).__name__} ({error})"
    if file == case.image or needs_label:
        return None, {str(file): reason}, has_air
    return Case(case.name, case.image), {str(file): f"{reason}; {case.name} is listed without its label"}, has_air


def few_whole_values(array: np.ndarray) -> int:
    """How many values a volume has, if none is below zero and they are as few as a label map's; else 0."""
    if array.min() < 0:
        return 0
    seen = np.zeros(int(array.max()) + 1, dtype=bool)
    for plane in array:
        seen[plane] = True
        if np.count_nonzero(seen) > MAX_LABEL_VALUES:  # of an image, mostly within the first plane
            return 0
    return int(np.count_nonzero(seen))


def check_cases(
    cases: Sequence[Case], num_workers: int, needs_label: bool = False
) -> tuple[list[Case], dict[str, str], list[Case]]:
    """The usable cases, file -> reason for what cannot be used, and those of the usable cases that show no air."""
    usable, unreadable, airless = [], {}, []
    # Threads are enough: decompression, which takes nearly all of the time, leaves Python's lock.
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checks = pool.map(partial(check_case, needs_label=needs_label), cases)
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


def label_names(cases: Sequence[Case]) -> dict[str, str]:
    """Label value -> name for FLARE22, else only the background."""
    is_flare = any(case.label is not None and case.name.startswith("FLARE22_") for case in cases)
    return {str(value): name for value, name in enumerate(FLARE22_LABELS if is_flare else FLARE22_LABELS[:1])}


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    found = choose(find_cases(flags.data_dir), flags.cases, flags.data_dir)
    split_cases(found, flags.num_validation, flags.validation_fraction, flags.seed)  # complain before the long check
    cases, unreadable, airless = check_cases(found, flags.num_workers, needs_label=flags.cases == "labelled")
    for file, reason in unreadable.items():
        print(f"left out {file}: {reason}", file=sys.stderr)
    if airless:
        # Found out too late, every crop of such a data set is one grey.
        shown = ", ".join(str(case.image) for case in airless[:NUM_NAMES_SHOWN])
        shown += ", ..." if len(airless) > NUM_NAMES_SHOWN else ""
        print(
            f"note: {len(airless)} of {len(cases)} volumes hold nothing below {NO_AIR_HU} HU, where air lies ({shown}"
            "): MR, or scanner values 1024 above HU? --a_min and --a_max are in the files' own values",
            file=sys.stderr,
        )
    if not cases:
        raise DataListError(f"{flags.data_dir}: none of {len(found)} cases can be read; the reasons are above")
    training, validation = split_cases(cases, flags.num_validation, flags.validation_fraction, flags.seed)
    write_data_list(flags.output, flags.data_dir, training, validation, label_names(cases), unreadable)
    num_labelled = sum(case.label is not None for case in cases)
    num_left_out = len(found) - len(cases)
    print(
        f"{flags.output}: {len(training)} training and {len(validation)} validation cases "
        f"({num_labelled} with labels), {num_left_out} cases left out"
        + (f", {num} listed without their label" if (num := len(unreadable) - num_left_out) else "")
    )


if __name__ == "__main__":
    run_main(main)
