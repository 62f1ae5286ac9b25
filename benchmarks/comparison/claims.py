"""What dense anatomy and memory claim, as paired differences with intervals over pretrainings.

The sample is the pretraining. Its values are first averaged over the labelled cases that it was judged with (and, of
Dice, over test cases); both sides of a difference have the same labelled cases. Then a t interval is taken over
pretrainings. It says how sure a gain is for another pretraining on these phantoms, and nothing of other phantoms.

Scratch has no pretraining. It is finetuned as often, with the same finetuning seeds (`stages.Plan.runs`). The n-th of
its runs has the labelled cases, crops and new layers of the finetunings of the n-th pretraining, and stands opposite to
it. So the luck of its initialisation is in the interval too. A single run a case, set against all pretrainings, would
leave it out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.comparison.arms import SCRATCH
from benchmarks.comparison.jobs import Records
from benchmarks.comparison.results import PROBES, case_dice, paired_t, read_probes, read_real
from benchmarks.comparison.stages import Plan
from benchmarks.results import table
from engine.segmentation.metrics import nan_mean

MEMORY = ", memory"
REAL = ", real CT"
MEASURES = {"linear": "linear probe", "knn": "k-NN probe", "mlp": "frozen-MLP Dice"}
MEASURES |= {probe + REAL: title + REAL for probe, title in MEASURES.items()}
Measured = dict[tuple[str, str], dict[int, list[float]]]  # (arm, measure) -> pretraining -> values in [0, 1]


@dataclass(frozen=True)
class Claim:
    """One arm's measure against another's.

    Attributes:
        better, worse: (arm, measure); measures: `MEASURES`, and of Dice `dice_of(shots, with_memory)`.
        wanted: least mean difference, in [0, 1]; None = shown without a target.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    wanted: float | None = None


def dice_of(shots: int, with_memory: bool = False) -> str:
    """The measure's name: Dice after finetuning with so many labelled cases."""
    return f"{shots}-shot Dice" + (MEMORY if with_memory else "")


def same(measure: str, better: str, worse: str, wanted: float | None = None) -> Claim:
    """Both sides by the same measure."""
    return Claim((better, measure), (worse, measure), wanted)


ONE, ONE_MEMORY, FOUR_MEMORY = dice_of(1), dice_of(1, True), dice_of(4, True)
CLAIMS = (
    same("linear", "alice", "mim", 0.25),
    same("linear", "alice", "alice_random", 0.05),
    same("mlp", "alice", "mim", 0.30),
    Claim(("alice", ONE_MEMORY), (SCRATCH, ONE), 0.25),
    same(ONE_MEMORY, "alice", SCRATCH, 0.08),
    Claim(("alice", ONE_MEMORY), ("mim", ONE), 0.15),
    Claim(("alice", ONE_MEMORY), ("alice", dice_of(15)), 0.0),
    Claim(("alice", FOUR_MEMORY), (SCRATCH, dice_of(4)), 0.12),
    # Which part it is that pays.
    *(same(probe, one, other) for one, other in (("dense", "mim"), ("alice", "dense")) for probe in PROBES),
    same("knn", "alice", "mim"),
    same("mlp", "alice", "alice_random"),
    *(same(measure, "dense", "mim") for measure in (ONE, ONE_MEMORY)),
    *(same(measure, "alice", "mim") for measure in (ONE, ONE_MEMORY)),
    # A single scan: a check of direction.
    *(same(probe + REAL, one, "mim") for one in ("dense", "alice") for probe in PROBES),
)


@dataclass(frozen=True)
class Difference:
    """A claim as measured.

    Attributes:
        better, worse, wanted: of `Claim`.
        mean: over pretrainings.
        by_pretraining: seed of the pretraining -> difference, mean over labelled cases.
        low, high: 95 % t interval over pretrainings; NaN of a single one.
        p: of the two-sided paired t test; NaN of a single one, or where all are equal.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    wanted: float | None
    mean: float
    by_pretraining: dict[int, float]
    low: float
    high: float
    p: float

    @property
    def reaches(self) -> bool | None:
        """Whether the mean reaches what is wanted; None where nothing is."""
        return None if self.wanted is None else self.mean >= self.wanted


def measure_all(plan: Plan, records: Records) -> Measured:
    """Every measure of every arm, as far as it is done with the plan's flags."""
    found: Measured = {}
    for arm, by_probe in read_probes(plan, records).items():
        found |= {(arm, probe): by_seed for probe, by_seed in by_probe.items()}
    for arm, by_probe in read_real(plan, records).items():
        found |= {(arm, probe + REAL): by_seed for probe, by_seed in by_probe.items()}
    seeds = dict.fromkeys(run.pretrain_seed for run in plan.runs)
    for arm in plan.arms:
        for shots in plan.settings.shots:
            for seed in seeds:
                runs = [run for run in plan.runs if run.pretrain_seed == seed]
                if not all(records.is_done(plan.finetune[arm, shots, run]) for run in runs):
                    continue
                for with_memory in (False, True) if plan.settings.memory else (False,):
                    by_run = (nan_mean(list(case_dice(plan, arm, shots, run, with_memory).values())) for run in runs)
                    found.setdefault((arm, dice_of(shots, with_memory)), {})[seed] = list(by_run)
    return found


def differences(measured: Measured, claims: Sequence[Claim] = CLAIMS) -> list[Difference]:
    """The claims of which both sides have been measured, for one common pretraining at least."""
    found = []
    for claim in claims:
        one, other = (measured.get(side, {}) for side in (claim.better, claim.worse))
        by_seed = {seed: nan_mean(one[seed]) - nan_mean(other[seed]) for seed in one if seed in other}
        if by_seed:
            values = list(by_seed.values())
            mean, interval = float(np.mean(values)), paired_t(values)
            found.append(Difference(claim.better, claim.worse, claim.wanted, mean, by_seed, *interval))
    return found


def claims_table(found: Sequence[Difference]) -> str:
    """One row a difference, in points."""
    lines = []
    for one in found:
        wanted = "" if one.wanted is None else f">= {100 * one.wanted:.0f}"
        reaches = {None: "", True: "yes", False: "**no**"}[one.reaches]
        by_pretraining = ", ".join(f"{100 * value:.1f}" for value in one.by_pretraining.values())
        lines.append([describe(one), f"{100 * one.mean:+.1f}", interval_of(one), by_pretraining, wanted, reaches])
    return table(lines, ["", "mean", "95 % interval", "by pretraining", "wanted", "mean reaches it"])


def interval_of(one: Difference) -> str:
    """The interval in points, or why there is none."""
    if math.isnan(one.low):
        return "none: one pretraining"
    return f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"


def describe(one: Difference) -> str:
    """`linear probe: alice − mim`; a measure for each side where they differ."""
    measures = [MEASURES.get(measure, measure) for _, measure in (one.better, one.worse)]
    if measures[0] == measures[1]:
        return f"{measures[0]}: {one.better[0]} − {one.worse[0]}"
    return f"{one.better[0]}, {measures[0]} − {one.worse[0]}, {measures[1]}"
