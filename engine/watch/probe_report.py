"""The table of frozen probes: one column per network and probe, one line per organ."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from engine.segmentation.metrics import nan_mean

RANDOM_PREFIX = "random weights "
PROBES = {"knn": "k-NN", "linear": "linear"}
MLP = "mlp"  # judged by Dice of whole volumes, where the others are judged by recall at chosen voxels
MEANS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "dice": "mean Dice"}
COLUMN = 18


def with_random_mean(results: dict[str, dict]) -> dict[str, dict]:
    """The results, with the randomly initialised networks joined under "random": means, and standard deviations of
    accuracy, balanced accuracy and the MLP's Dice under "std" (0 for a single network)."""
    random = [result for name, result in results.items() if name.startswith(RANDOM_PREFIX)]
    if not random:
        return results
    joined = {"seconds": statistics.fmean(result["seconds"] for result in random), "num_networks": len(random)}
    for probe in PROBES:
        found = [result[probe] for result in random]
        values = {name: [one[name] for one in found] for name in ("accuracy", "balanced_accuracy")}
        recall = {organ: statistics.fmean(one["recall"][organ] for one in found) for organ in found[0]["recall"]}
        joined[probe] = {name: statistics.fmean(numbers) for name, numbers in values.items()} | {"recall": recall}
        joined[probe]["std"] = {
            name: statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for name, numbers in values.items()
        }
    if MLP in random[0]:
        joined[MLP] = joined_dice([result[MLP] for result in random])
    return results | {"random": joined}


def joined_dice(found: list[dict]) -> dict:
    """Means over networks of what `engine.watch.frozen_mlp.probe_mlp` found, and the spread of the mean Dice."""
    parts = {
        part: {name: nan_mean([one[part][name] for one in found]) for name in found[0][part]}
        for part in ("organs", "cases")
    }
    values = [one["dice"] for one in found]
    std = {"dice": statistics.stdev(values) if len(values) > 1 else 0.0}
    return {"dice": statistics.fmean(values)} | parts | {"std": std}


def probe_table(report: dict) -> str:
    """Text for a terminal: percent of the judged voxels that each probe got right.

    Args:
        report: as scripts/probe_features.py writes it.
    """
    shown = {name: result for name, result in report["results"].items() if not name.startswith(RANDOM_PREFIX)}
    columns = [Column.of(name, result, probe) for name, result in shown.items() for probe in PROBES]
    columns += [Column.of(name, result, MLP) for name, result in shown.items() if MLP in result]
    cases, counts = report["cases"], report["num_voxels"]
    lines = [
        f"taught by {counts['taught']} voxels of {len(cases['taught'])} cases, judged on {counts['judged']} of "
        f"{len(cases['judged'])} others; chance is {100 / len(report['classes']):.1f} %",
        line("", [column.network for column in columns]),
        line("recall (%)", [column.title for column in columns]),
    ]
    for organ in report["classes"]:
        if any(organ in column.organs for column in columns):
            lines.append(line(organ, [percent(column.organs.get(organ)) for column in columns]))
    for name in MEANS:
        if any(name in column.scores for column in columns):
            lines.append(line(MEANS[name], [with_spread(column.scores, name) for column in columns]))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Column:
    """One network judged by one probe: values by organ, and the scores that hold its means."""

    network: str
    title: str
    organs: dict[str, float]
    scores: dict

    @classmethod
    def of(cls, name: str, result: dict, probe: str) -> "Column":
        """`result` of one network, as scripts/probe_features.py writes it."""
        title, part = ("MLP, Dice (%)", "organs") if probe == MLP else (PROBES[probe], "recall")
        return cls(heading(name), title, result[probe][part], result[probe])


def percent(value: float | None) -> str:
    """`41.2`; a dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def with_spread(scores: dict, name: str) -> str:
    """`41.2 ± 1.3`, in percent; without ± for a single network; a dash where the probe has no such mean."""
    spread = scores.get("std", {}).get(name, 0.0)
    return percent(scores.get(name)) + (f" ± {100 * spread:.1f}" if spread else "")


def heading(name: str) -> str:
    """A network's name in a column: its file's, or that of its folder for `checkpoint.pth`; its end where too long."""
    path = Path(name)
    short = path.parent.name if path.stem == "checkpoint" and path.parent.name else path.stem
    return short[-(COLUMN - 1) :]


def line(title: str, cells: list[str]) -> str:
    return f"{title:<22}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
