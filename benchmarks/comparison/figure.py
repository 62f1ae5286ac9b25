"""The figure: Dice against the number of labelled cases, one line an arm, and one with memory."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from benchmarks.comparison.arms import ARMS, UNTRAINED
from benchmarks.comparison.claims import MEMORY
from benchmarks.comparison.results import Scores
from datasets.store.files import write_bytes

MARKERS = "oosdv^DPX<>"  # of the arms, in their order; each has a colour of matplotlib's cycle
SPREAD = 0.02  # arms lie beside each other by this share of the axis, so that error bars can be told apart


def draw(alone: Scores, remembered: Scores | None, over: str, path: Path) -> None:
    """Write the figure as PNG: means and standard deviations of the mean Dice over test cases.

    Args:
        alone: of the networks by themselves.
        remembered: of the same with memory, dotted with open markers; None = they have none.
        over: what they are taken over, for the title, as "3 seeds".
    """
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for scores in (alone, remembered):
        if scores is not None:
            draw_arms(axes, scores, with_memory=scores is remembered)
    axes.set_xticks(np.arange(len(alone.shots)), [str(shots) for shots in alone.shots])
    axes.set_xlabel("labelled cases")
    axes.set_ylabel("Dice, mean over organs (%)")
    axes.set_title(f"{len(alone.cases)} held-out phantoms, mean ± std over {over}", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getbuffer())


def draw_arms(axes: Axes, scores: Scores, with_memory: bool) -> None:
    """A line for each arm, in its colour and with its marker."""
    places = np.arange(len(scores.shots), dtype=float)
    reach = SPREAD * max(1, len(scores.shots) - 1)
    for number, arm in enumerate(scores.arms):
        done = [shots for shots in scores.shots if (arm, shots) in scores.dice]
        by_seed = [100 * scores.by_seed(arm, shots) for shots in done]
        means = [values.mean() for values in by_seed]
        spreads = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in by_seed]
        place = list(ARMS).index(arm)
        axes.errorbar(
            places[[scores.shots.index(shots) for shots in done]] + (number - (len(scores.arms) - 1) / 2) * reach,
            means,
            spreads,
            color=f"C{place}",
            marker=MARKERS[place % len(MARKERS)],
            markerfacecolor="white" if with_memory else None,
            linestyle=":" if with_memory else "--" if arm in UNTRAINED else "-",
            capsize=2,
            linewidth=1.6,
            markersize=5,
            label=ARMS[arm].title + (MEMORY if with_memory else ""),
        )
