"""The report: comparison.md for people, comparison.json for programs, and the figure."""

import dataclasses
import json
import math

from benchmarks.comparison.arms import ARMS
from benchmarks.comparison.claims import claims_table, differences, measure_all
from benchmarks.comparison.figure import draw
from benchmarks.comparison.jobs import Records
from benchmarks.comparison.results import (
    PROBES,
    Comparison,
    PretrainingEnd,
    Probes,
    Scores,
    compare_all,
    points,
    pretraining_ends,
    read_dice,
    read_probes,
    read_real,
    verdicts,
)
from benchmarks.comparison.settings import TEST_SEED, TUNING_SEEDS
from benchmarks.comparison.stages import Plan
from benchmarks.results import table
from datasets.phantom.cases import GENERATOR
from datasets.store.files import write_text
from engine.flags import git_commit
from engine.segmentation.metrics import nan_mean
from engine.segmentation.report import percent, spread, without_nan

NOTHING = "–"
PROBE_TITLES = {"knn": "k-NN", "linear": "linear", "mlp": "MLP, Dice"}
FIGURE, TABLES, SUMMARY = "dice_over_labels.png", "comparison.md", "comparison.json"


def write_report(plan: Plan, records: Records, command: str) -> str:
    """Write the files to `plan.root/report`, of what is done with the plan's flags; returns the text of the first.

    Raises:
        ValueError: nothing has been judged with these flags.
    """
    scores = read_dice(plan, records)
    remembered = read_dice(plan, records, with_memory=True) if plan.settings.memory else None
    comparisons, ends, probes = compare_all(scores), pretraining_ends(plan, records), read_probes(plan, records)
    claims, real, seconds = differences(measure_all(plan, records)), read_real(plan, records), stage_seconds(records)
    if not probes and not scores.dice:
        raise ValueError(
            f"{plan.root}: nothing has been probed or finetuned with these flags; run --stages probe or finetune, or "
            "give the flags that they were done with"
        )
    summary = {
        "command": command,
        "commit": git_commit(),
        "settings": dataclasses.asdict(plan.settings),
        "phantom_generator": GENERATOR,
        "unfinished": unfinished(plan, records),
        "claims": [dataclasses.asdict(one) | {"reaches": one.reaches} for one in claims],
        "verdicts": verdicts(comparisons),
        "dice": dice_summaries(scores),
        "dice_with_memory": dice_summaries(remembered) if remembered else {},
        "test_cases": scores.cases,
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
        "probes": probes,
        "probes_real_ct": real,
        "pretraining": {arm: dataclasses.asdict(end) for arm, end in ends.items()},
        "seconds": seconds,
    }
    folder = plan.root / "report"
    write_text(folder / SUMMARY, json.dumps(without_nan(summary), indent=1) + "\n")
    parts = ["# Pretrainings compared", f"`{command}`, commit {summary['commit']}"]
    parts.append(about_data(plan.settings.data_seed))
    if summary["unfinished"]:
        parts.append("Not done with these flags, and so not below: " + "; ".join(summary["unfinished"]) + ".")
    parts += ["\n".join(f"- {line}" for line in summary["verdicts"])] if summary["verdicts"] else []
    if claims:
        parts += [
            "Paired differences in points of accuracy or Dice, over pretrainings: each one's mean over the labelled "
            "cases, then a 95 % t interval over pretrainings. Scratch has no pretraining: its finetunings with the "
            "same seeds stand opposite.",
            claims_table(claims),
        ]
    parts += dice_part(plan, scores, comparisons, ends, remembered) if scores.dice else []
    parts += [
        f"Frozen encoders: balanced accuracy in percent over voxels of the organs and background, taught by "
        f"{min(plan.settings.shots)} labelled, judged on the same held-out phantoms; MLP: Dice over the organs of "
        f"whole volumes at {plan.settings.spacing_mm:g} mm. Mean ± std over pretrainings of the means over "
        f"{len(plan.settings.seeds)} splits, or over splits where there is one pretraining:",
        probe_table(probes),
    ]
    if real:
        parts += [
            "The same of one labelled real CT, a check of direction; slabs of axial planes teach, others judge:",
            probe_table(real),
        ]
    if ends:
        parts += [
            "How the pretrainings ended (means of the last epoch; `start_`: of the first; `_share`: of log K, which a "
            "uniform distribution costs in the cls and token losses):",
            monitor_table(ends),
            "\n".join(f"- {arm}: {warning}" for arm, end in ends.items() for warning in end.warnings) or "No collapse.",
        ]
    parts += [
        "Time, seconds: from the stage's first job to the end of its last, and all its jobs added up:",
        table(
            [[stage, *(f"{value:.0f}" for value in times.values())] for stage, times in seconds.items()],
            ["stage", "wall", "sum of jobs", "longest job", "jobs"],
        ),
        "Settings: " + ", ".join(f"{name} {value}" for name, value in summary["settings"].items()),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / TABLES, text)
    if scores.dice:
        draw(scores, remembered, over_text(plan), folder / FIGURE)
    return text


def dice_part(
    plan: Plan,
    scores: Scores,
    comparisons: list[Comparison],
    ends: dict[str, PretrainingEnd],
    remembered: Scores | None,
) -> list[str]:
    """Paragraphs about the Dice after finetuning; `remembered` is shown where networks have a memory."""
    num_labelled, over = plan.settings.num_labelled, over_text(plan)
    judged = (
        f"mean over organs and {len(scores.cases)} held-out phantoms of generator {GENERATOR} in their files' own "
        f"spacing; mean ± std over {over}"
    )
    parts = [
        f"Dice in percent, {judged}, each with the labelled cases of another fold (folds share cases where five "
        f"of them need more than {num_labelled}):",
        dice_table(scores, ends),
    ]
    if plan.settings.crossed_pretrainings:
        parts[0] = (
            f"Dice in percent, {judged}, each the mean over {len(plan.settings.seeds)} choices of labelled cases:"
        )
    if remembered:
        parts += ["The same with the labelled cases remembered:", dice_table(remembered, ends)]
    parts.append(f"![Dice against the number of labels]({FIGURE})")
    if not comparisons:
        return parts
    return [
        *parts,
        f"Paired differences in Dice points, without memory; in brackets the 95 % t interval over {over} "
        f"({about_units(plan)}; the test cases are the same), in parentheses each of them; p of the two-sided paired t "
        "test, not corrected for the number of tests:",
        comparison_table(comparisons, scores.shots),
    ]


def about_data(data_seed: int) -> str:
    """Whether the phantoms may judge a recipe."""
    roles = {TEST_SEED: ", kept for judging"} | dict.fromkeys(TUNING_SEEDS, ", with which recipes were chosen")
    return f"Phantoms of data seed {data_seed}{roles.get(data_seed, '')}, generator {GENERATOR}."


def over_text(plan: Plan) -> str:
    """What means and intervals of Dice are over."""
    number, name = len(plan.units), "pretraining" if plan.settings.crossed_pretrainings else "seed"
    return f"{number} {name}" + ("s" if number > 1 else "")


def about_units(plan: Plan) -> str:
    """What an interval says, and does not say, of the luck of a pretraining."""
    if plan.settings.crossed_pretrainings:
        return "other pretrainings, crops and new layers; the labelled cases are the same"
    number = len(plan.settings.pretrain_seeds)
    other = "other labelled cases, crops and new layers; "
    if number == 1:
        return other + "but one pretraining an arm, whose luck is in no interval: `--pretrain_seeds`"
    again = "" if number == len(plan.settings.seeds) else ", some finetuned more than once"
    return other + f"{number} pretrainings an arm{again}"


def unfinished(plan: Plan, records: Records) -> list[str]:
    """`12 of 40 finetunings`: the learning jobs of a plan that are not done with its flags."""
    counts = {}
    for stage, name in {"pretrain": "pretrainings", "probe": "probes", "finetune": "finetunings"}.items():
        jobs = [job for batch in plan.batches(stage) for job in batch]
        counts[name] = (sum(not records.is_done(job) for job in jobs), len(jobs))
    return [f"{missing} of {number} {name}" for name, (missing, number) in counts.items() if missing]


def dice_summaries(scores: Scores) -> dict:
    """Arm -> number of labelled cases -> `dice_summary`, of what is done."""
    return {
        arm: {str(k): dice_summary(scores, arm, k) for k in scores.shots if (arm, k) in scores.dice}
        for arm in scores.arms
    }


def dice_summary(scores: Scores, arm: str, shots: int) -> dict:
    """Mean and spread over seeds, and every entry [seeds][cases]."""
    by_seed = scores.by_seed(arm, shots).tolist()
    return {**spread(by_seed), "by_seed": by_seed, "by_seed_and_case": scores.dice[arm, shots].tolist()}


def dice_table(scores: Scores, ends: dict[str, PretrainingEnd]) -> str:
    """One row an arm: the voxels that its pretraining has seen, and a column for each number of labelled cases."""
    lines = []
    for arm in scores.arms:
        seen = ends[arm].values["voxels_seen"] if arm in ends else None
        dice = (
            percent(spread(scores.by_seed(arm, shots).tolist())) if (arm, shots) in scores.dice else NOTHING
            for shots in scores.shots
        )
        lines.append([ARMS[arm].title, number(seen), *dice])
    return table(lines, ["", "voxels seen", *(f"{shots} labelled" for shots in scores.shots)])


def probe_table(probes: Probes) -> str:
    """One row an arm, one column a probe."""
    if not probes:
        return "Not probed (`--stages probe`)."
    titles = {probe: PROBE_TITLES[probe] for probe in PROBES if any(probe in by_probe for by_probe in probes.values())}
    lines = []
    for arm, by_probe in probes.items():
        title = ARMS[arm].title if arm in ARMS else "untrained networks"
        lines.append([title, *(percent(probe_spread(by_probe[probe])) for probe in titles)])
    return table(lines, ["", *titles.values()])


def probe_spread(by_pretraining: dict[int, list[float]]) -> dict[str, float]:
    """Over pretrainings of their means over splits; of one pretraining over its splits."""
    values = list(by_pretraining.values())
    return spread([nan_mean(splits) for splits in values] if len(values) > 1 else values[0])


def comparison_table(comparisons: list[Comparison], shots: tuple[int, ...]) -> str:
    """One row a pair of arms, one column a number of labelled cases."""
    pairs = dict.fromkeys((c.better, c.worse) for c in comparisons)
    by_key = {(c.better, c.worse, c.shots): c for c in comparisons}
    lines = [
        [
            f"{ARMS[one].title} − {ARMS[other].title}",
            *(points(by_key[one, other, k]) if (one, other, k) in by_key else NOTHING for k in shots),
        ]
        for one, other in pairs
    ]
    return table(lines, ["", *(f"{k} labelled" for k in shots)])


def monitor_table(ends: dict[str, PretrainingEnd]) -> str:
    """One row a monitor, one column an arm."""
    names = list(dict.fromkeys(name for end in ends.values() for name in end.values))
    lines = [["log K", *(number(end.out_dim and math.log(end.out_dim)) for end in ends.values())]]
    lines += [[name, *(number(end.values.get(name)) for end in ends.values())] for name in names]
    return table(lines, ["", *ends])


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return NOTHING if value is None else f"{value:.4g}"


def stage_seconds(records: Records) -> dict[str, dict[str, float]]:
    """Stage -> wall seconds from its first start to its last end, and the sum over jobs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, record in records.finished().items():
        found.setdefault(name.split("/")[0], []).append((record["started"], record["seconds"]))
    return {
        stage: {
            "wall": max(start + length for start, length in jobs) - min(start for start, _ in jobs),
            "sum": sum(length for _, length in jobs),
            "longest": max(length for _, length in jobs),
            "num_jobs": len(jobs),
        }
        for stage, jobs in found.items()
    }
