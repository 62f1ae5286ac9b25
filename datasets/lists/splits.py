"""Splits: of a new data list by a seed, and fixed ones for few-shot finetuning. Scans of one patient stay together.

Fixed few-shot splits: `--num_labelled K --fold i` means the same cases for everybody, every method and every seed.

The order of cases comes from a hash of their names, so that it depends on no random generator, no file order and no
other case. Within a fold splits are nested: the 4-shot cases contain the 1-shot case. Different folds start at
different places of the order; up to `NUM_FOLDS` of them share no case where there are enough cases.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence

from datasets.lists.data_list import Case, DataListError

NUM_FOLDS = 5


def split_cases(
    cases: Sequence[Case], num_validation: int | None, validation_fraction: float, seed: int
) -> tuple[list[Case], list[Case]]:
    """Training and validation cases, drawn by `seed` alone (not by the order of `cases`), each sorted by name.

    Args:
        cases: all of them.
        num_validation: how many to hold out; fewer where the next patient has too many scans. None takes
            `validation_fraction` of all, at least one.
        validation_fraction: from 0 to below 1; 0 holds none out.
    """
    if not 0 <= validation_fraction < 1:
        raise DataListError(f"--validation_fraction must be from 0 to below 1, received {validation_fraction}")
    if num_validation is None:
        num_validation = max(1, round(validation_fraction * len(cases))) if validation_fraction else 0
    if not 0 <= num_validation < len(cases):
        raise DataListError(
            f"--num_validation {num_validation} leaves no training case of {len(cases)}; expected 0 to {len(cases) - 1}"
        )
    shuffled = sorted(cases, key=lambda case: case.name)
    random.Random(seed).shuffle(shuffled)
    num_scans, held_out = Counter(case.patient for case in cases), {}
    for case in shuffled:
        if case.patient not in held_out and sum(held_out.values()) + num_scans[case.patient] <= num_validation:
            held_out[case.patient] = num_scans[case.patient]
    if num_validation and not held_out:
        raise DataListError(
            f"no patient has as few as {num_validation} scans, and scans of one (group) stay on one side; hold out more"
        )
    return _parts(cases, held_out)


def fold_order(cases: Sequence[Case], fold: int, purpose: str) -> list[Case]:
    """All cases in the order of one fold; folds 0 to 4 start a fifth of the way apart, 5 to 9 shuffle anew, and so on.

    Args:
        cases: with unique names.
        fold: 0 or more.
        purpose: splits for different purposes are independent of one another.

    Raises:
        DataListError: a negative fold.
    """
    ordered, start = _ordered(cases, fold, purpose)
    return ordered[start:] + ordered[:start]


def _ordered(cases: Sequence[Case], fold: int, purpose: str) -> tuple[list[Case], int]:
    """The cases in an order in which scans of one patient are neighbours, and where the fold starts."""
    if fold < 0:
        raise DataListError(f"--fold {fold}: expected 0 or more")
    num_folds = max(1, min(NUM_FOLDS, len(cases)))
    shuffle, block = divmod(fold, num_folds)

    def place(case: Case) -> tuple[str, str]:
        return hashlib.sha256(f"{purpose} {shuffle} {case.patient}".encode()).hexdigest(), case.name

    return sorted(cases, key=place), block * len(cases) // num_folds


def _parts(cases: Sequence[Case], held_out: Collection[str]) -> tuple[list[Case], list[Case]]:
    """The cases of all other patients, and of those held out, each sorted by name."""
    ordered = sorted(cases, key=lambda case: case.name)
    is_held_out = [case.patient in held_out for case in ordered]
    return tuple([case for case, is_out in zip(ordered, is_held_out) if is_out == side] for side in (False, True))


def choose_labelled(cases: Sequence[Case], num_labelled: int, fold: int) -> list[Case]:
    """The K labelled cases of a fold, sorted by name; K = 0 takes all.

    Raises:
        DataListError: fewer than K cases have labels.
    """
    labelled = [case for case in cases if case.label is not None]
    if not labelled:
        raise DataListError(f"none of {len(cases)} training cases has a label; finetuning needs some")
    if not 0 <= num_labelled <= len(labelled):
        raise DataListError(f"--num_labelled {num_labelled}: {len(labelled)} training cases have labels (0 = all)")
    ordered = fold_order(labelled, fold, "labelled")
    return sorted(ordered[: num_labelled or len(ordered)], key=lambda case: case.name)


def split_held_out(cases: Sequence[Case], share: float, fold: int) -> tuple[list[Case], list[Case]]:
    """Split labelled cases where a data list has no validation section: (training, held out), each sorted by name.

    Folds 0 to 4 with a share of 0.2 are a five-fold cross-validation.

    Raises:
        DataListError: nothing would be left on either side.
    """
    if not 0 < share < 1 or len(cases) < 2:
        raise DataListError(
            f"cannot hold out a share of {share} of {len(cases)} labelled cases; give the data list a labelled "
            "validation section, or set --held_out_share between 0 and 1"
        )
    num_held_out = min(max(1, round(share * len(cases))), len(cases) - 1)
    ordered, start = _ordered(cases, fold, "held out")
    first = {case.patient: position for position, case in reversed(list(enumerate(ordered)))}
    # A patient belongs to the fold that holds its first scan, so that the folds of a cross-validation share none.
    training, held_out = _parts(
        cases, {name for name, position in first.items() if (position - start) % len(cases) < num_held_out}
    )
    if not training or not held_out:
        raise DataListError(
            f"cannot hold out a share of {share} of {len(cases)} labelled cases: they are of {len(first)} patients "
            "(groups); change --held_out_share or --fold"
        )
    return training, held_out
