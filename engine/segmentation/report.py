"""Tables of an evaluation: one CSV row per case and organ, a Markdown table, and a summary that programs can read.

Several folders (runs with different seeds or folds) join into one table, whose ± is the spread between their means.
Evaluations of 2-D networks also have `slice_dice_published`, beside the organ Dice per volume.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.segmentation.metrics import OrganScore, case_means, nan_mean

CASES, TABLE, SUMMARY = "cases.csv", "results.md", "results.json"
PLAIN_CASES = "cases_without_memory.csv"
MEASURES = ("dice", "nsd")
SLICE_DICE = "slice_dice_published"
PLAIN = {measure: f"{measure}_without_memory" for measure in MEASURES}  # of a network that has one
SLICE_DICE_NOTE = (
    "mean over slices of the Dice of the classes in each slice's label, background included, as published for 2-D "
    "networks; not comparable with organ Dice"
)
COLUMNS = tuple(field.name for field in dataclasses.fields(OrganScore))


def write_report(
    folder: str | Path,
    scores: list[OrganScore],
    description: dict,
    slice_dice: Sequence[float] = (),
    plain_scores: Sequence[OrganScore] = (),
) -> dict:
    """Write the three files of one evaluation, and with a memory the scores without it.

    Args:
        scores: of all cases, every case with the same organs.
        description: plain values that go into the summary (checkpoint, tolerance, ...).
        slice_dice: of all slices of a 2-D network, see `published_slice_dice`; empty in 3-D.
        plain_scores: of the same cases by the network without its memory; empty where it has none.

    Returns:
        The summary: "dice" and "nsd" with "mean", "std" over cases, and per organ the same under "organs"; in 2-D also
        SLICE_DICE, with "mean", "std" and "num" over slices; with a memory also both as PLAIN names them.
    """
    summary = summarise(scores) | ({SLICE_DICE: spread(list(slice_dice))} if slice_dice else {})
    (Path(folder) / PLAIN_CASES).unlink(missing_ok=True)  # of an earlier judgement
    if plain_scores:
        write_scores(Path(folder) / PLAIN_CASES, plain_scores)
        plain = summarise(list(plain_scores))
        for measure, name in PLAIN.items():
            summary[name] = plain[measure]
            for organ, values in plain["organs"].items():
                summary["organs"][organ][name] = values[measure]
    write_scores(Path(folder) / CASES, scores)
    return write_summary(folder, summary, "mean ± std over cases", description)


def write_scores(path: Path, scores: Sequence[OrganScore]) -> None:
    """Write a row per case and organ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows([as_cell(getattr(score, name)) for name in COLUMNS] for score in scores)


def write_joined(folder: str | Path, folders: Sequence[str | Path]) -> dict:
    """Write the joined table and summary of several evaluations; returns the summary."""
    meaning, description = f"mean ± std over {len(folders)} runs", {"runs": [str(path) for path in folders]}
    return write_summary(folder, join_reports(folders), meaning, description)


def write_summary(folder: str | Path, summary: dict, meaning: str, description: dict) -> dict:
    """Write a summary as JSON and as a table; returns it with its description."""
    folder, summary = Path(folder), summary | {"description": description}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(json.dumps(without_nan(summary), indent=2) + "\n")
    (folder / TABLE).write_text(markdown_table(summary, meaning))
    return summary


def summarise(scores: list[OrganScore]) -> dict:
    """Means and standard deviations over cases; of all organs, each case's mean over its organs counts once."""
    summary = {"num_cases": len({score.case for score in scores}), "organs": {}}
    for measure in MEASURES:
        summary[measure] = spread(list(case_means(scores, measure).values()))
    for organ in dict.fromkeys(score.organ for score in scores):
        own = [score for score in scores if score.organ == organ]
        summary["organs"][organ] = {m: spread([getattr(score, m) for score in own]) for m in MEASURES}
    return summary


def join_reports(folders: Sequence[str | Path]) -> dict:
    """One summary of several evaluations: mean and standard deviation over the folders' means.

    Raises:
        ValueError: a folder without cases.csv, or other organs in one of them.
    """
    summaries = [summarise(read_scores(Path(folder) / CASES)) for folder in folders]
    slice_means = [read_slice_dice(Path(folder) / SUMMARY) for folder in folders]
    organs = list(summaries[0]["organs"])
    for folder, summary in zip(folders, summaries):
        if list(summary["organs"]) != organs:
            raise ValueError(f"{folder}: other organs than {folders[0]} ({', '.join(summary['organs'])})")

    def joined(parts: list[dict]) -> dict:
        return {measure: spread([part[measure]["mean"] for part in parts]) for measure in MEASURES}

    counts = {"num_cases": sum(summary["num_cases"] for summary in summaries), "num_runs": len(summaries)}
    by_organ = {organ: joined([summary["organs"][organ] for summary in summaries]) for organ in organs}
    by_slice = {} if None in slice_means else {SLICE_DICE: spread(slice_means)}
    return counts | joined(summaries) | {"organs": by_organ} | by_slice


def spread(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation and number of the values that are numbers."""
    kept = [value for value in values if not math.isnan(value)]
    std = float(np.std(kept, ddof=1)) if len(kept) > 1 else float("nan")
    return {"mean": nan_mean(kept), "std": std, "num": len(kept)}


def read_scores(path: Path) -> list[OrganScore]:
    """The rows of a cases.csv.

    Raises:
        ValueError: missing, or not written by `write_report`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; evaluate the run first (scripts/evaluate_segmentation.py)")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {rows.fieldnames}, expected {', '.join(COLUMNS)}")
        return [OrganScore(row["case"], row["organ"], *(float(row[n] or "nan") for n in COLUMNS[2:])) for row in rows]


def read_slice_dice(path: Path) -> float | None:
    """The mean slice Dice in a results.json; None where it has none (3-D networks)."""
    return json.loads(path.read_text()).get(SLICE_DICE, {}).get("mean")


def markdown_table(summary: dict, meaning: str) -> str:
    """A table of Dice and NSD in percent, organs first, their mean last; below it, what the numbers are."""
    measured = {"dice": "Dice"} | ({"nsd": "NSD"} if summary["nsd"]["num"] else {})
    shown = {measure: f"{title} (%)" for measure, title in measured.items()}
    if PLAIN["dice"] in summary:
        shown |= {PLAIN[measure]: f"{title} without memory (%)" for measure, title in measured.items()}
    rows = [["organ", *shown.values(), "runs" if "num_runs" in summary else "cases"]]
    for organ, values in [*summary["organs"].items(), ("**mean**", summary)]:
        rows.append([organ, *(percent(values[measure]) for measure in shown), str(values["dice"]["num"])])
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    facts = "; ".join(f"{name}: {value}" for name, value in summary["description"].items())
    notes = [f"{meaning}; {summary['num_cases']} cases. {facts}"]
    if SLICE_DICE in summary:
        notes += ["", f"{SLICE_DICE}: {percent(summary[SLICE_DICE])} % ({SLICE_DICE_NOTE})"]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines, "", *notes, ""])


def percent(values: dict[str, float]) -> str:
    """`85.3 ± 2.1`, without ± where there is one value only."""
    if math.isnan(values["mean"]):
        return "–"
    text = f"{100 * values['mean']:.1f}"
    return text if math.isnan(values["std"]) else f"{text} ± {100 * values['std']:.1f}"


def as_cell(value: str | float) -> str:
    """A CSV cell; NaN is empty."""
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def without_nan(value: object) -> object:
    """NaN becomes None, which JSON knows."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
