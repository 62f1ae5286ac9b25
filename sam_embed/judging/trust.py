"""When to trust a match: its error against score, cycle error and spread, and the thresholds that make most right.

A match counts as correct within 15 mm of the truth. The three thresholds are searched together, on a grid: a match is
kept when its score is at least the first, its cycle error at most the second and its spread at most the third. Of all
thresholds under which the wanted share of the kept matches is correct, those that keep the most are taken.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from datasets.samples.correspondences import ANY_MM, within
from datasets.samples.pairings import PairingOptions
from sam_embed.judging.evaluate import CORRECT_MM, error_figures
from sam_embed.judging.judge import Judged

WANTED_SHARE = 0.95
GOALS = (0.80, 0.85, 0.90, 0.95, 0.97)  # beside the wanted share, to see what each costs
MIN_KEPT_SHARE = 0.05  # thresholds that keep less are no use, and too few matches to measure on
ANY_SCORE = -1.0  # what main_ddp.py takes for "any", as `ANY_MM`
SCORE_GRID = np.concatenate([[ANY_SCORE], np.round(np.arange(0.30, 0.985, 0.01), 2)])
CYCLE_GRID_MM = np.concatenate([np.arange(1.0, 6.0, 0.5), np.arange(6.0, 21.0), [25.0, 30.0, 40.0, ANY_MM]])
SPREAD_GRID_MM = np.concatenate([np.arange(2.0, 13.0), [14.0, 16.0, 18.0, 20.0, 25.0, 30.0, ANY_MM]])
NUM_BINS = 12


@dataclass(frozen=True)
class Thresholds:
    """Thresholds and what they do; shares from 0 to 1.

    Attributes:
        wanted: share of the kept matches that should be correct.
        min_score, max_cycle_mm, max_spread_mm: keep matches with at least this score, at most this cycle error and at
            most this spread.
        kept: share of all matches that is kept.
        correct: share of the kept matches that is correct.
        found: share of the correct matches that is kept.
        is_reached: whether `correct` is at least `wanted`; if not, these are the thresholds with the most correct.
    """

    wanted: float
    min_score: float
    max_cycle_mm: float
    max_spread_mm: float
    kept: float
    correct: float
    found: float
    is_reached: bool

    def keeps(self, judged: Judged) -> np.ndarray:
        """bool [N]: which matches pass; what was not measured passes only a threshold that is off."""
        return keeps(judged, self.min_score, self.max_cycle_mm, self.max_spread_mm)

    def line(self) -> str:
        """The flags as main_ddp.py takes them, and the shares."""
        limits = {"max_cycle_mm": self.max_cycle_mm, "max_spread_mm": self.max_spread_mm}
        words = [f"--{name} {'1e6' if limit >= ANY_MM else f'{limit:g}'}" for name, limit in limits.items()]
        flags = " ".join([f"--min_score {self.min_score:g}", *words])
        return f"{flags}: {self.correct:.1%} of matches within {CORRECT_MM:g} mm, keeps {self.kept:.0%}"

    def describe(self) -> str:
        """One line that also says when the wanted share is out of reach."""
        if self.is_reached:
            return self.line()
        return f"{self.wanted:.0%} cannot be reached; the most correct is {self.line()}"


def choose_thresholds(judged: Judged, wanted: float = WANTED_SHARE) -> Thresholds:
    """The thresholds under which the wanted share is correct and the most is kept.

    Where none reaches it, the ones with the largest share of correct matches. None keeps less than MIN_KEPT_SHARE.

    Raises:
        ValueError: there are no matches.
    """
    if not len(judged):
        raise ValueError("no matches to choose thresholds on")
    num_kept = _counts_on_grid(judged)
    num_correct = _counts_on_grid(judged.chosen(judged.error_mm <= CORRECT_MM))
    correct = num_correct / np.maximum(num_kept, 1)
    enough = num_kept >= max(MIN_KEPT_SHARE * len(judged), 1)
    reached = enough & (correct >= wanted)
    # Without any that reaches it, the best share decides; among equals the one that keeps more.
    rank = np.where(reached, num_kept, -1) if reached.any() else np.where(enough, correct + 1e-9 * num_kept, -1)
    at = np.unravel_index(rank.argmax(), rank.shape)
    chosen = (float(grid[index]) for grid, index in zip((SCORE_GRID, CYCLE_GRID_MM, SPREAD_GRID_MM), at))
    return try_thresholds(judged, *chosen, wanted)


def keeps(judged: Judged, min_score: float, max_cycle_mm: float, max_spread_mm: float) -> np.ndarray:
    """bool [N]: which matches pass all three thresholds."""
    return (judged.score >= min_score) & within(judged.cycle_mm, max_cycle_mm) & within(judged.spread_mm, max_spread_mm)


def try_thresholds(
    judged: Judged, min_score: float, max_cycle_mm: float, max_spread_mm: float, wanted: float = WANTED_SHARE
) -> Thresholds:
    """What given thresholds do."""
    limits = min_score, max_cycle_mm, max_spread_mm
    is_correct, is_kept = judged.error_mm <= CORRECT_MM, keeps(judged, *limits)
    num_right = int((is_correct & is_kept).sum())
    correct, found = num_right / max(is_kept.sum(), 1), num_right / max(is_correct.sum(), 1)
    return Thresholds(wanted, *limits, float(is_kept.mean()), float(correct), float(found), bool(correct >= wanted))


def _counts_on_grid(judged: Judged) -> np.ndarray:
    """int [score, cycle, spread] over the three grids: how many of the matches pass each triple of thresholds."""
    passed = np.searchsorted(SCORE_GRID, judged.score, side="right") - 1  # the last score threshold it passes
    # NaN sorts behind all: what was not measured passes the last threshold only, which is off.
    first = (
        np.minimum(np.searchsorted(grid, values, side="left"), len(grid) - 1)
        for grid, values in ((CYCLE_GRID_MM, judged.cycle_mm), (SPREAD_GRID_MM, judged.spread_mm))
    )
    counts = np.zeros((len(SCORE_GRID), len(CYCLE_GRID_MM), len(SPREAD_GRID_MM)), dtype=np.int64)
    np.add.at(counts, (np.maximum(passed, 0), *first), 1)
    return counts[::-1].cumsum(axis=0)[::-1].cumsum(axis=1).cumsum(axis=2)


def check_on_other_cases(judged: Judged, wanted: float = WANTED_SHARE) -> dict:
    """How the choice does on cases it was not made on: for each query case, thresholds from pairs without that case.

    Returns:
        `correct` and `kept`, shares over all matches; empty where fewer than three cases leave nothing to choose on.
    """
    num_kept = num_correct = 0
    for name in np.unique(judged.query):
        without = judged.chosen((judged.query != name) & (judged.key != name))
        if not len(without):
            return {}
        held_out = judged.chosen(judged.query == name)
        is_kept = choose_thresholds(without, wanted).keeps(held_out)
        num_kept += int(is_kept.sum())
        num_correct += int((held_out.error_mm[is_kept] <= CORRECT_MM).sum())
    return {"correct": num_correct / max(num_kept, 1), "kept": num_kept / len(judged)}


def error_curve(values: np.ndarray, error_mm: np.ndarray, num_bins: int = NUM_BINS) -> list[dict]:
    """Errors in bins of equally many matches, in ascending order of `values` [N] (unmeasured ones are left out).

    Returns:
        per bin: `from`, `to`, `middle` (the median value), `num_matches`, and `error_figures` of the errors.
    """
    known = np.isfinite(values)
    values, error_mm = values[known], error_mm[known]
    order = np.argsort(values, kind="stable")
    bins = []
    for part in np.array_split(order, min(num_bins, max(len(order), 1))):
        if len(part):
            inside = values[part]
            place = {"from": float(inside[0]), "to": float(inside[-1]), "middle": float(np.median(inside))}
            bins.append({**place, **error_figures(error_mm[part])})
    return bins


def by_group(judged: Judged, groups: np.ndarray, kept: np.ndarray) -> dict[str, dict]:
    """Figures per group (text [N]), the largest first: of all its matches, and `kept` of those that pass (bool [N])."""
    names, counts = np.unique(groups, return_counts=True)
    described = {}
    for name in names[np.argsort(-counts, kind="stable")]:
        mask = groups == name
        passing = {"share": float(kept[mask].mean()), **error_figures(judged.error_mm[mask & kept])}
        described[str(name)] = {**error_figures(judged.error_mm[mask]), "kept": passing}
    return described


def trust_report(judged: Judged, wanted: float = WANTED_SHARE, network: str = "") -> dict:
    """Everything about these matches, plain values fit for JSON.

    Args:
        network: fingerprint of the weights that matched; empty where it is not known.

    Returns:
        `network`, `num_cases` (what the thresholds hold for), `all` (`error_figures`), `share_possible`, `thresholds`
        (for the wanted share), `defaults` (main_ddp.py's), `on_other_cases` (`check_on_other_cases`), `goals`
        (thresholds for other shares), `by_region`, `by_structure`, `by_score`, `by_cycle_mm` and `by_spread_mm`
        (`error_curve`; empty where it was not measured).
    """
    best = choose_thresholds(judged, wanted)
    kept = best.keeps(judged)
    return {
        "network": network,
        "num_cases": len(np.union1d(judged.query, judged.key)),
        "all": error_figures(judged.error_mm),
        "share_possible": float(judged.is_possible.mean()),
        "thresholds": dataclasses.asdict(best),
        "summary": best.describe(),
        "defaults": dataclasses.asdict(
            try_thresholds(
                judged, PairingOptions.min_score, PairingOptions.max_cycle_mm, PairingOptions.max_spread_mm, wanted
            )
        ),
        "on_other_cases": check_on_other_cases(judged, wanted),
        "goals": [dataclasses.asdict(choose_thresholds(judged, goal)) for goal in GOALS],
        "by_region": by_group(judged, judged.region, kept),
        "by_structure": by_group(judged, judged.structure, kept),
        "by_score": error_curve(judged.score, judged.error_mm),
        "by_cycle_mm": error_curve(judged.cycle_mm, judged.error_mm),
        "by_spread_mm": error_curve(judged.spread_mm, judged.error_mm),
    }
