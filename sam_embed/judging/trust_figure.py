"""A picture of trust: how the error of matches falls with their score and grows with cycle error and spread."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from datasets.samples.correspondences import ANY_MM
from sam_embed.judging.evaluate import CORRECT_MM
from sam_embed.judging.trust import ANY_SCORE, Thresholds

MEDIAN_COLOUR, P90_COLOUR, SHARE_COLOUR = "#1f5fa8", "#7fb0e0", "#c2570c"
TICKS_MM = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
SHARE = f"share_within_{CORRECT_MM:g}mm"
LINES = (("median_mm", "median error", MEDIAN_COLOUR), ("p90_mm", "90th percentile of the error", P90_COLOUR))


def save_trust_figure(report: dict, what: str, path: str | Path) -> None:
    """Draw errors in mm (left axis) and the share that is correct, against score, cycle error and spread, into a file.

    Args:
        report: of `trust_report`.
        what: the matches it is about, for the title.
        path: picture file; folders are made.
    """
    thresholds = Thresholds(**report["thresholds"])
    curves = (
        ("by_score", "score (similarity)", thresholds.min_score),
        ("by_cycle_mm", "cycle error (mm)", thresholds.max_cycle_mm),
        ("by_spread_mm", "disagreement of the neighbours (mm)", thresholds.max_spread_mm),
    )
    curves = [curve for curve in curves if report[curve[0]]]  # what was not measured has none
    figure = Figure(figsize=(6 * len(curves), 4.8), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (key, label, limit) in zip(panels, curves):
        right = _draw_curve(axes, report[key], label)
        if limit not in (ANY_SCORE, ANY_MM):
            axes.axvline(limit, color="0.35", lw=1.2, ls="--")
            axes.annotate(
                f"{limit:g}", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -12),
                textcoords="offset points", color="0.35", ha="right",
            )  # fmt: skip
        if key != "by_score":
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
    panels[0].set_ylabel("error (mm)")
    right.set_ylabel(f"share within {CORRECT_MM:g} mm", color=SHARE_COLOUR)
    handles = [*panels[0].get_lines()[: len(LINES)], right.get_lines()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{what}\n{thresholds.describe()}", fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_curve(axes: Axes, bins: list[dict], label: str) -> Axes:
    """One panel; returns its right axis, which holds the share."""
    places = [part["middle"] for part in bins]
    for name, title, colour in LINES:
        axes.plot(places, [part[name] for part in bins], "o-", color=colour, ms=4, lw=1.8, label=title)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xlabel(f"{label}; a point is {bins[0]['num_matches']:,} matches")
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(
        places, [part[SHARE] for part in bins], "s-", color=SHARE_COLOUR, ms=4, lw=1.8, label="share that is correct"
    )
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.tick_params(axis="y", colors=SHARE_COLOUR)
    return right


def _plain_ticks(axis: Axis) -> None:
    """Round mm on a logarithmic axis, written out."""
    axis.set_major_locator(FixedLocator(TICKS_MM))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
