"""The table of frozen probes: one column per network and probe, one line per organ."""

import statistics
from pathlib import Path

RANDOM_PREFIX = "random weights "
PROBES = ("knn", "linear")
COLUMN = 18


def with_random_mean(results: dict[str, dict]) -> dict[str, dict]:
    """The results, with the randomly initialised networks joined under "random": means, and standard deviations of
    accuracy and balanced accuracy under "std" (0 for a single network)."""
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
    return results | {"random": joined}


def probe_table(report: dict) -> str:
    """Text for a terminal: percent of the judged voxels that each probe got right.

    Args:
        report: as scripts/probe_features.py writes it.
    """
    shown = {name: result for name, result in report["results"].items() if not name.startswith(RANDOM_PREFIX)}
    columns = [(result[probe], probe, name) for name, result in shown.items() for probe in PROBES]
    cases, counts = report["cases"], report["num_voxels"]
    lines = [
        f"taught by {counts['taught']} voxels of {len(cases['taught'])} cases, judged on {counts['judged']} of "
        f"{len(cases['judged'])} others; chance is {100 / len(report['classes']):.1f} %",
        line("", [heading(name) for _, _, name in columns]),
        line("recall (%)", [{"knn": "k-NN", "linear": "linear"}[probe] for _, probe, _ in columns]),
    ]
    for organ in report["classes"]:
        if organ in columns[0][0]["recall"]:
            lines.append(line(organ, [f"{100 * scores['recall'][organ]:.1f}" for scores, _, _ in columns]))
    for name, title in (("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy")):
        lines.append(line(title, [with_spread(scores, name) for scores, _, _ in columns]))
    return "\n".join(lines) + "\n"


def with_spread(scores: dict, name: str) -> str:
    """`41.2 ± 1.3`, in percent; without ± for a single network."""
    spread = scores.get("std", {}).get(name, 0.0)
    return f"{100 * scores[name]:.1f}" + (f" ± {100 * spread:.1f}" if spread else "")


def heading(name: str) -> str:
    """A network's name in a column: its file's, or that of its folder for `checkpoint.pth`; its end where too long."""
    path = Path(name)
    short = path.parent.name if path.stem == "checkpoint" and path.parent.name else path.stem
    return short[-(COLUMN - 1) :]


def line(title: str, cells: list[str]) -> str:
    return f"{title:<22}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
