"""The report: comparison.md for people, comparison.json for programs, and the figure."""

import dataclasses
import json
import math

from benchmarks.comparison.arms import ARMS
from benchmarks.comparison.figure import draw
from benchmarks.comparison.jobs import Records
from benchmarks.comparison.results import (
    PROBES,
    Comparison,
    PretrainingEnd,
    Scores,
    compare_all,
    points,
    pretraining_ends,
    read_dice,
    read_probes,
    verdicts,
)
from benchmarks.comparison.stages import Plan
from benchmarks.results import table
from datasets.phantom.cases import GENERATOR
from datasets.store.files import write_text
from engine.flags import git_commit
from engine.segmentation.report import percent, spread, without_nan

FIGURE, TABLES, SUMMARY = "dice_over_labels.png", "comparison.md", "comparison.json"


def write_report(plan: Plan, records: Records, command: str) -> str:
    """Write the three files to `plan.root/report`; returns the text of the first."""
    scores, folder = read_dice(plan, records), plan.root / "report"
    comparisons, ends, probes = compare_all(scores), pretraining_ends(plan), read_probes(plan, records)
    seconds = stage_seconds(records)
    summary = {
        "command": command,
        "commit": git_commit(),
        "settings": dataclasses.asdict(plan.settings),
        "phantom_generator": GENERATOR,
        "verdicts": verdicts(comparisons),
        "dice": {arm: {str(k): dice_summary(scores, arm, k) for k in scores.shots} for arm in scores.arms},
        "test_cases": scores.cases,
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
        "probes": probes,
        "pretraining": {arm: dataclasses.asdict(end) for arm, end in ends.items()},
        "seconds": seconds,
    }
    write_text(folder / SUMMARY, json.dumps(without_nan(summary), indent=1) + "\n")
    parts = [
        "# Pretrainings compared",
        f"`{command}`, commit {summary['commit']}",
        "\n".join(f"- {line}" for line in summary["verdicts"]),
        f"Dice in percent, mean over organs and {len(scores.cases)} held-out phantoms of generator {GENERATOR} in "
        "their files' own spacing; "
        f"mean ± std over {len(plan.settings.seeds)} seeds, each with the labelled cases of another fold (folds share "
        f"cases where five of them need more than {plan.settings.num_labelled}):",
        dice_table(scores, ends),
        f"![Dice against the number of labels]({FIGURE})",
        "Paired differences in Dice points; in brackets the 95 % t interval over seeds (other labelled cases, crops "
        f"and new layers; {about_pretrainings(plan)}; the test cases are the same), in parentheses every seed; p of "
        "the two-sided paired t test over seeds, not corrected for the number of tests:",
        comparison_table(comparisons, scores.shots),
        f"Frozen encoders: balanced accuracy in percent over voxels of the organs and background, taught by "
        f"{min(plan.settings.shots)} labelled, judged on the same held-out phantoms; mean ± std over "
        f"{len(plan.settings.seeds)} splits:",
        probe_table(probes),
        "How the pretrainings ended (means of the last epoch; `start_`: of the first; `_share`: of log K, which a "
        "uniform distribution costs in the cls and token losses):",
        monitor_table(ends),
        "\n".join(f"- {arm}: {warning}" for arm, end in ends.items() for warning in end.warnings) or "No collapse.",
        "Time, seconds: from the stage's first job to the end of its last, and all its jobs added up:",
        table(
            [[stage, *(f"{value:.0f}" for value in times.values())] for stage, times in seconds.items()],
            ["stage", "wall", "sum of jobs", "longest job", "jobs"],
        ),
        "Settings: " + ", ".join(f"{name} {value}" for name, value in summary["settings"].items()),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / TABLES, text)
    draw(scores, len(plan.settings.seeds), folder / FIGURE)
    return text


def about_pretrainings(plan: Plan) -> str:
    """What the seeds say, and do not say, of the luck of a pretraining."""
    number = len(plan.settings.pretrain_seeds)
    if number == 1:
        return "but one pretraining an arm, whose luck is in no interval: `--pretrain_seeds`"
    again = "" if number == len(plan.settings.seeds) else ", some finetuned more than once"
    return f"{number} pretrainings an arm{again}"


def dice_summary(scores: Scores, arm: str, shots: int) -> dict:
    """Mean and spread over seeds, and every entry [seeds][cases]."""
    by_seed = scores.by_seed(arm, shots).tolist()
    return {**spread(by_seed), "by_seed": by_seed, "by_seed_and_case": scores.dice[arm, shots].tolist()}


def dice_table(scores: Scores, ends: dict[str, PretrainingEnd]) -> str:
    """One row an arm: the voxels that its pretraining has seen, and a column for each number of labelled cases."""
    lines = []
    for arm in scores.arms:
        seen = ends[arm].values["voxels_seen"] if arm in ends else None
        dice = (percent(spread(scores.by_seed(arm, shots).tolist())) for shots in scores.shots)
        lines.append([ARMS[arm].title, number(seen), *dice])
    return table(lines, ["", "voxels seen", *(f"{shots} labelled" for shots in scores.shots)])


def probe_table(probes: dict[str, dict[str, list[float]]]) -> str:
    """One row an arm, one column a probe."""
    if not probes:
        return "Not probed (`--stages probe`)."
    lines = []
    for arm, by_probe in probes.items():
        title = ARMS[arm].title if arm in ARMS else "untrained networks"
        lines.append([title, *(percent(spread(by_probe[probe])) for probe in PROBES)])
    return table(lines, ["", "k-NN", "linear"])


def comparison_table(comparisons: list[Comparison], shots: tuple[int, ...]) -> str:
    """One row a pair of arms, one column a number of labelled cases."""
    pairs = dict.fromkeys((c.better, c.worse) for c in comparisons)
    by_key = {(c.better, c.worse, c.shots): c for c in comparisons}
    lines = [
        [f"{ARMS[one].title} − {ARMS[other].title}", *(points(by_key[one, other, k]) for k in shots)]
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
    return "–" if value is None else f"{value:.4g}"


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
