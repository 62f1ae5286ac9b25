"""What came out, as far as it is done: Dice, probes, paired differences, and how the pretrainings ended."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from benchmarks.comparison.arms import ARMS, CLAIMS, UNTRAINED
from benchmarks.comparison.jobs import Records
from benchmarks.comparison.stages import PROBED, UNTRAINED_NETWORKS, Plan, Run, voxels_seen
from engine.segmentation.metrics import case_means, nan_mean
from engine.segmentation.report import CASES, PLAIN_CASES, read_scores
from engine.watch.probe_report import RANDOM_PREFIX
from losses.collapse import collapse_warnings

CONFIDENCE = 0.95
PROBES = {"knn": "balanced_accuracy", "linear": "balanced_accuracy", "mlp": "dice"}  # and what they are judged by
WANTED_GAIN = 0.05  # of pretraining over scratch with one labelled case, Dice
PLACES = ("kind", "step", "epoch")  # of a line in log.txt; all else are losses and monitors


@dataclass(frozen=True)
class Scores:
    """Dice of finetunings: `dice[arm, shots]` is [seeds, cases], each entry a mean over organs.

    NaN where a case has no organ that counts. Crossed pretrainings take the place of seeds: each entry is then the mean
    over the labelled cases that a pretraining was finetuned with. Arms and numbers of cases that are not done are left
    out.
    """

    dice: dict[tuple[str, int], np.ndarray]
    cases: list[str]
    shots: tuple[int, ...]
    arms: tuple[str, ...]

    def by_seed(self, arm: str, shots: int) -> np.ndarray:
        """Mean over cases [seeds]."""
        return np.array([nan_mean(list(row)) for row in self.dice[arm, shots]])


def read_dice(plan: Plan, records: Records, with_memory: bool = False) -> Scores:
    """The Dice of those finetunings of a plan that are done with its flags, in the test files' own spacing.

    Args:
        with_memory: of networks that remember their labelled cases; False = of the networks alone.

    Raises:
        ValueError: two judge other cases.
    """
    dice, cases = {}, None
    for arm in plan.arms:
        for shots in plan.settings.shots:
            if not all(records.is_done(plan.finetune[arm, shots, run]) for run in plan.runs):
                continue
            rows = []
            for unit in plan.units:
                means = [case_dice(plan, arm, shots, run, with_memory) for run in unit]
                cases = cases or list(means[0])
                for run, found in zip(unit, means):
                    if list(found) != cases:
                        raise ValueError(f"{plan.evaluation(arm, shots, run)}: judged other cases than the others")
                rows.append([nan_mean([found[case] for found in means]) for case in cases])
            dice[arm, shots] = np.array(rows)
    arms, shots = ({key[at] for key in dice} for at in (0, 1))
    return Scores(
        dice, cases or [], tuple(k for k in plan.settings.shots if k in shots), tuple(a for a in plan.arms if a in arms)
    )


def case_dice(plan: Plan, arm: str, shots: int, run: Run, with_memory: bool = False) -> dict[str, float]:
    """Test case -> mean Dice over organs of one finetuning."""
    is_plain = plan.settings.memory and not with_memory
    return case_means(read_scores(plan.evaluation(arm, shots, run) / (PLAIN_CASES if is_plain else CASES)))


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
    low, high, p = paired_t(by_seed if len(by_seed) > 1 else by_case)
    return Comparison(
        better, worse, shots, float(differences.mean()), tuple(by_seed.tolist()), low, high,
        int((by_case > 0).sum()), len(by_case), p,
    )  # fmt: skip


def paired_t(differences: Sequence[float]) -> tuple[float, float, float]:
    """The ends of the 95 % t interval of the mean difference, and p of the two-sided test; NaN of a single value."""
    sample = np.asarray(differences, dtype=float)
    if len(sample) < 2:
        return math.nan, math.nan, math.nan
    error, law = sample.std(ddof=1) / math.sqrt(len(sample)), student_t(len(sample) - 1)
    half = law.ppf(0.5 + CONFIDENCE / 2) * error
    p = 2 * law.sf(abs(sample.mean()) / error) if error else math.nan
    return float(sample.mean() - half), float(sample.mean() + half), float(p)


Probes = dict[str, dict[str, dict[int, list[float]]]]


def read_probes(plan: Plan, records: Records) -> Probes:
    """What frozen encoders know, as far as they have been probed with these flags.

    Returns:
        Arm -> probe -> seed of the pretraining -> value in [0, 1] for each fold: balanced accuracy, of the MLP Dice.
        `UNTRAINED_NETWORKS` are numbered from 0. A pretraining of which a fold is missing is left out.
    """
    found: Probes = {}
    for arm, seed in dict.fromkeys((arm, seed) for arm, seed, _ in plan.probe):
        jobs = [plan.probe[arm, seed, fold] for fold in plan.settings.seeds]
        if not all(records.is_done(job) for job in jobs):
            continue
        judged = [json.loads((job.folder / PROBED).read_text())["results"] for job in jobs]
        if arm == UNTRAINED_NETWORKS:
            names = {number: f"{RANDOM_PREFIX}{number}" for number in range(plan.num_untrained)}
        else:
            names = {seed: str(plan.weights(arm, seed))}
        for number, name in names.items():
            for probe, measure in PROBES.items():
                if probe in judged[0][name]:
                    by_seed = found.setdefault(arm, {}).setdefault(probe, {})
                    by_seed[number] = [results[name][probe][measure] for results in judged]
    return found


def read_real(plan: Plan, records: Records) -> Probes:
    """The same of the labelled real CT, with its folds."""
    found: Probes = {}
    for (arm, seed), job in plan.probe_real.items():
        if records.is_done(job):
            folds = json.loads((job.folder / PROBED).read_text())["folds"]
            for probe in PROBES:
                found.setdefault(arm, {}).setdefault(probe, {})[seed] = [fold[probe] for fold in folds]
    return found


def compare_all(scores: Scores) -> list[Comparison]:
    """Every claim between arms that were run, at every number of labelled cases."""
    return [
        compare(scores, one, other, shots)
        for one, other in CLAIMS
        for shots in scores.shots
        if {(one, shots), (other, shots)} <= scores.dice.keys()
    ]


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


def pretraining_ends(plan: Plan, records: Records) -> dict[str, PretrainingEnd]:
    """How the pretrainings of every arm ended, those that are done."""
    ended: dict[str, dict[int, PretrainingEnd]] = {}
    for (arm, seed), job in plan.pretrain.items():
        if records.is_done(job):
            ended.setdefault(arm, {})[seed] = read_end(job.folder)
    return {arm: mean_end(ended[arm]) for arm in plan.pretrained_arms if arm in ended}


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
