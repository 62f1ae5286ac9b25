"""Fixed few-shot splits: `--num_labelled K --fold i` means the same cases for everybody, every method and every seed.

The order of cases comes from a hash of their names, so that it depends on no random generator, no file order and no
other case. Within a fold splits are nested: the 4-shot cases contain the 1-shot case. Different folds start at
different places of the order; up to `NUM_FOLDS` of them share no case where there are enough cases.
"""

import hashlib
from collections.abc import Sequence

from datasets.lists.data_list import Case, DataListError

NUM_FOLDS = 5


def fold_order(cases: Sequence[Case], fold: int, purpose: str) -> list[Case]:
    """All cases in the order of one fold; folds 0 to 4 start a fifth of the way apart, 5 to 9 shuffle anew, and so on.

    Args:
        cases: with unique names.
        fold: 0 or more.
        purpose: splits for different purposes are independent of one another.

    Raises:
        DataListError: a negative fold.
    """
    if fold < 0:
        raise DataListError(f"--fold {fold}: expected 0 or more")
    num_folds = max(1, min(NUM_FOLDS, len(cases)))
    shuffle, block = divmod(fold, num_folds)

    def place(case: Case) -> str:
        return hashlib.sha256(f"{purpose} {shuffle} {case.name}".encode()).hexdigest()

    ordered = sorted(cases, key=place)
    start = block * len(ordered) // num_folds
    return ordered[start:] + ordered[:start]


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
    ordered = fold_order(cases, fold, "held out")
    parts = ordered[num_held_out:], ordered[:num_held_out]
    return tuple(sorted(part, key=lambda case: case.name) for part in parts)
