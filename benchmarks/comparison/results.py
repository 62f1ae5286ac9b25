"""What came out: Dice of every finetuning, means and spreads, paired differences, and how the pretrainings ended."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from benchmarks.comparison.arms import ARMS, CLAIMS, UNTRAINED
from benchmarks.comparison.jobs import Records
from benchmarks.comparison.stages import Plan, voxels_seen
from engine.segmentation.metrics import case_means, nan_mean
from engine.segmentation.report import CASES, read_scores
from losses.collapse import collapse_warnings

CONFIDENCE = 0.95
UNTRAINED_NETWORKS = "untrained"
PROBES = ("knn", "linear")
WANTED_GAIN = 0.05  # of pretraining over scratch with one labelled case, Dice
PLACES = ("kind", "step", "epoch")  # of a line in log.txt; all else are losses and monitors


@dataclass(frozen=True)
class Scores:
    """Dice of every finetuning: `dice[arm, shots]` is [seeds, cases], each entry a mean over organs.

    NaN where a case has no organ that counts.
    """

    dice: dict[tuple[str, int], np.ndarray]
    cases: list[str]
    shots: tuple[int, ...]
    arms: tuple[str, ...]

    def by_seed(self, arm: str, shots: int) -> np.ndarray:
        """Mean over cases [seeds]."""
        return np.array([nan_mean(list(row)) for row in self.dice[arm, shots]])


def read_dice(plan: Plan, records: Records) -> Scores:
    """The Dice of all finetunings of a plan, in the test files' own spacing.

    Raises:
        ValueError: one is missing or of other flags (run the finetune stage), or two judge other cases.
    """
    missing = [job.name for job in plan.finetune if not records.is_done(job)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(plan.finetune)} finetunings are not done with these flags, first {missing[0]}: "
            "run --stages finetune, or give the flags that they were done with"
        )
    dice, cases = {}, None
    for arm in plan.arms:
        for shots in plan.settings.shots:
            rows = []
            for seed in plan.settings.seeds:
                means = case_means(read_scores(plan.evaluation(arm, shots, seed) / CASES))
                cases = cases or list(means)
                if list(means) != cases:
                    raise ValueError(f"{plan.evaluation(arm, shots, seed)}: judged other cases than the others")
                rows.append([means[case] for case in cases])
            dice[arm, shots] = np.array(rows)
    return Scores(dice, cases, plan.settings.shots, plan.arms)


@dataclass(frozen=True)
class Comparison:
    """One arm against another with the same labelled cases, Dice in [0, 1].

    What one seed (its labelled cases, crops, new layers) does to all test cases alike is most of the noise, so that
    seeds are the sample: test cases alone would call any two arms different.

    Attributes:
        gain: mean difference over seeds and test cases.
        by_seed: mean difference of every seed.
        low, high: 95 % t interval of the mean over seeds; with a single seed, over test cases. NaN of one value.
        num_won, num_cases: test cases on which the first is better on average over seeds, and all.
        p: of the two-sided paired t test over the same values; NaN where they do not differ.
    """

    better: str
    worse: str
    shots: int
    gain: float
    by_seed: tuple[float, ...]
    low: float
    high: float
    num_won: int
    num_cases: int
    p: float


def compare(scores: Scores, better: str, worse: str, shots: int) -> Comparison:
    """Paired comparison of two arms."""
    differences = scores.dice[better, shots] - scores.dice[worse, shots]  # [seeds, cases]
    differences = differences[:, np.isfinite(differences).all(axis=0)]
    by_seed, by_case = differences.mean(axis=1), differences.mean(axis=0)
    sample = by_seed if len(by_seed) > 1 else by_case
    low = high = p = math.nan
    if len(sample) > 1:
        error, law = sample.std(ddof=1) / math.sqrt(len(sample)), student_t(len(sample) - 1)
        half = law.ppf(0.5 + CONFIDENCE / 2) * error
        low, high = sample.mean() - half, sample.mean() + half
        p = 2 * law.sf(abs(sample.mean()) / error) if error else math.nan
    return Comparison(
        better, worse, shots, float(differences.mean()), tuple(by_seed.tolist()), float(low), float(high),
        int((by_case > 0).sum()), len(by_case), float(p),
    )  # fmt: skip


def read_probes(plan: Plan, records: Records) -> dict[str, dict[str, list[float]]]:
    """What frozen encoders know: arm (and `UNTRAINED_NETWORKS`) -> probe -> balanced accuracy in [0, 1] of every split.

    Empty where the probe stage has not been run with these flags.
    """
    if not plan.probe or not all(records.is_done(job) for job in plan.probe.values()):
        return {}
    arms = (*plan.pretrained_arms, UNTRAINED_NETWORKS)
    found: dict[str, dict[str, list[float]]] = {arm: {probe: [] for probe in PROBES} for arm in arms}
    for seed, job in plan.probe.items():
        judged = json.loads((job.folder / "probe.json").read_text())["results"]
        for arm in arms:
            name = "random" if arm == UNTRAINED_NETWORKS else str(plan.weights(arm, seed))  # their mean
            for probe in PROBES:
                found[arm][probe].append(judged[name][probe]["balanced_accuracy"])
    return found


def compare_all(scores: Scores) -> list[Comparison]:
    """Every claim between arms that were run, at every number of labelled cases."""
    claims = [(one, other) for one, other in CLAIMS if one in scores.arms and other in scores.arms]
    return [compare(scores, one, other, shots) for one, other in claims for shots in scores.shots]


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """What the comparison had to show, and whether it did, in words."""
    lines = []
    by_key = {(c.better, c.worse, c.shots): c for c in comparisons}
    fewest = min((c.shots for c in comparisons), default=0)
    against = [by_key[key] for scratch in UNTRAINED if (key := ("sam", scratch, fewest)) in by_key]
    if against:
        strongest = min(against, key=lambda comparison: comparison.gain)
        word = "yes" if strongest.gain >= WANTED_GAIN else "NO"
        lines.append(
            f"Alice with SAM pairs beats training {ARMS[strongest.worse].title} by 5 Dice points with {fewest} "
            f"labelled: {word} ({points(strongest)})"
        )
    against_random = by_key.get(("sam", "random", fewest))
    if against_random is not None:
        word = "yes" if against_random.gain >= 0 else ("within chance" if against_random.high >= 0 else "NO")
        lines.append(
            f"SAM pairs are not worse than random pairs with {fewest} labelled: {word} ({points(against_random)})"
        )
    return lines


def points(comparison: Comparison) -> str:
    """`+5.2 [3.1, 7.3] (4.4, 5.0, 6.2), better on 10 of 12, p 0.012`, in Dice points; in parentheses by seed."""
    c = comparison
    by_seed = ", ".join(f"{100 * gain:.1f}" for gain in c.by_seed)
    p = "p –" if math.isnan(c.p) else f"p {c.p:.2g}"
    return (
        f"{100 * c.gain:+.1f} [{100 * c.low:.1f}, {100 * c.high:.1f}] ({by_seed}), "
        f"better on {c.num_won} of {c.num_cases}, {p}"
    )


@dataclass(frozen=True)
class PretrainingEnd:
    """How a pretraining went.

    Attributes:
        values: losses and monitors: means of the last epoch; of the first one as `start_*`; of the held-out samples as
            `held_out_*`; the voxels seen; of several pretrainings their mean.
        out_dim: K; the log of it is what a uniform distribution costs; None for methods without distributions.
        warnings: what `losses.collapse` says of the last epoch of each.
    """

    values: dict[str, float]
    out_dim: int | None
    warnings: list[str]


def pretraining_ends(plan: Plan) -> dict[str, PretrainingEnd]:
    """How the pretrainings of every arm ended."""
    return {
        arm: mean_end({seed: read_end(plan.pretrain[arm, seed].folder) for seed in plan.settings.pretrain_seeds})
        for arm in plan.pretrained_arms
    }


def mean_end(ends: dict[int, PretrainingEnd]) -> PretrainingEnd:
    """The mean of an arm's pretrainings, by seed; warnings of several name theirs."""
    first = next(iter(ends.values()))
    values = {name: float(np.mean([end.values[name] for end in ends.values()])) for name in first.values}
    prefix = {seed: f"seed {seed}: " if len(ends) > 1 else "" for seed in ends}
    warnings = [prefix[seed] + warning for seed, end in ends.items() for warning in end.warnings]
    return PretrainingEnd(values, first.out_dim, warnings)


def read_end(folder: Path) -> PretrainingEnd:
    """How a pretraining ended, by its log.txt and run.json."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "epoch")
    last = {line["kind"]: line for line in lines}
    end, held_out = last["epoch"], last.get("validation", {})
    found = {name: value for name, value in end.items() if name not in PLACES}
    warnings = collapse_warnings(found)
    found |= {f"start_{name}": value for name, value in first.items() if name.startswith("loss_")}
    found |= {f"held_out_{name}": value for name, value in held_out.items() if name not in PLACES}
    found |= {name: last["train"][name] for name in ("samples_per_s", "data_wait_share")}
    flags = json.loads((folder / "run.json").read_text())["flags"]
    found |= {"steps": end["step"], "voxels_seen": voxels_seen(flags, end["step"])}
    return PretrainingEnd(found, flags.get("out_dim"), warnings)
