"""Trust in lines and tables: what `scripts/evaluate_matching.py` and `scripts/evaluate_pairs.py` print."""

from collections.abc import Mapping, Sequence

from sam_embed.judging.evaluate import CORRECT_MM
from sam_embed.judging.trust import Thresholds

SHARE = f"share_within_{CORRECT_MM:g}mm"
METHODS = {"sam": "SAM", "body_box": "same relative position in the body box", "body_affine": "affine fit of the body"}
HEADER = ("", "matches", "median", "90th pct", f"<= {CORRECT_MM:g} mm", "kept", "of these right")


def trust_lines(report: Mapping) -> list[str]:
    """All that `scripts/evaluate_matching.py` prints; `report` is what it writes as JSON."""
    methods = [
        f"{title}: median {report[name]['median_mm']:.1f} mm, 90th percentile {report[name]['p90_mm']:.1f} mm, "
        f"{report[name]['share_within_10mm']:.0%} within 10 mm"
        for name, title in METHODS.items()
        if report.get(name, {}).get("num_matches")
    ]
    lines = [f"{report['num_matches']:,} landmark matches between {report['num_cases']} cases", *methods]
    lines += ["", "Landmarks (mm):", *group_table(report["landmarks"]), *threshold_lines(report["landmarks"])]
    if report["mined"]:
        lines += ["", "Mined pairs (mm):", *mined_lines(report["mined"])]
    else:
        lines += [
            "",
            "No mined pairs were judged: that takes --num_points and phantoms, whose files state a seed.",
        ]
    return lines


def mined_lines(report: Mapping) -> list[str]:
    """A `trust_report` of mined pairs: the tables and what follows for the flags."""
    impossible = f"{1 - report['share_possible']:.0%} of the points lie where the other scan does not reach"
    return [*group_table(report), impossible, *threshold_lines(report)]


def threshold_lines(report: Mapping) -> list[str]:
    """The chosen thresholds, how they do on cases they were not chosen on, and what other shares would cost."""
    defaults = Thresholds(**report["defaults"])
    lines = [report["summary"], condition(report), f"as main_ddp.py has them by default, {defaults.line()}"]
    if other := report["on_other_cases"]:
        lines.append(
            f"chosen without a case and tried on it: {other['correct']:.1%} within {CORRECT_MM:g} mm, keeps "
            f"{other['kept']:.0%}"
        )
    for goal in report["goals"]:
        line = Thresholds(**goal).describe() if goal["is_reached"] else "cannot be reached"
        lines.append(f"  for {goal['wanted']:.0%}: {line}")
    return lines


def condition(report: Mapping) -> str:
    """What the chosen thresholds hold for."""
    network = f" and the network {report['network']}" if report["network"] else ""
    data = f"{report['all']['num_matches']:,} matches between {report['num_cases']} cases"
    return f"chosen on {data}: they hold for data like these{network}, not for others"


def group_table(report: Mapping) -> list[str]:
    """Errors of all matches, by region and by structure, and how many of them the chosen thresholds keep."""
    lines = [HEADER]
    kept = {"share": report["thresholds"]["kept"], SHARE: report["thresholds"]["correct"]}
    for name, found in {
        "all": {**report["all"], "kept": kept},
        **report["by_region"],
        **report["by_structure"],
    }.items():
        right = f"{found['kept'][SHARE]:.0%}" if SHARE in found["kept"] else "-"
        errors = (f"{found['median_mm']:.1f}", f"{found['p90_mm']:.1f}", f"{found[SHARE]:.0%}")
        lines.append((name, f"{found['num_matches']:,}", *errors, f"{found['kept']['share']:.0%}", right))
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines in columns as wide as their longest entry, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(entry.rjust(width) for entry, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
