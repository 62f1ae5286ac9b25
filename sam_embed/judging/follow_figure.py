"""Picture of points that were followed into another scan: slices of both side by side, a row for each point."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from datasets.ct.nifti import Volume
from sam_embed.judging.match_figure import BACKGROUND, TEXT, for_display, mark_place, save_figure, show_plane
from sam_embed.matching.follow import DOUBTFUL, OUTSIDE, TRUSTED, Followed

SHOWN_PLANES = ("axial", "coronal")
COLOURS = {TRUSTED: "#80ed99", DOUBTFUL: "#ffd166", OUTSIDE: "#ef476f"}
QUERY_COLOUR = "#4cc9f0"
MOST_ROWS = 20  # a picture of more points is too tall to read


def draw_followed(
    query: Volume, key: Volume, names: Sequence[str], points_mm: np.ndarray, followed: Followed, path: str | Path
) -> None:
    """Write a picture: for each point the axial and the coronal plane of the query, then those of the key.

    Args:
        query, key: canonical HU volumes.
        names: of N points; the first 20 are drawn.
        points_mm: [N, 3], world mm in the query.
        followed: the points in the key.
        path: picture file.
    """
    query, key = for_display(query), for_display(key)
    num_rows = min(len(names), MOST_ROWS)
    figure = Figure(figsize=(13, 3.4 * num_rows), facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(num_rows, 2 * len(SHOWN_PLANES), squeeze=False)
    for number, row in enumerate(grid):
        verdict, place_mm = str(followed.verdict[number]), followed.points_mm[number]
        for plane, axes, key_axes in zip(SHOWN_PLANES, row, row[len(SHOWN_PLANES) :]):
            show_plane(axes, query, plane, points_mm[number])
            mark_place(axes, query, plane, points_mm[number], QUERY_COLOUR)
            if verdict == OUTSIDE:
                key_axes.axis("off")
            else:
                show_plane(key_axes, key, plane, place_mm)
                mark_place(key_axes, key, plane, place_mm, COLOURS[verdict])
        row[0].set_title(names[number], color=TEXT, fontsize=11)
        row[len(SHOWN_PLANES)].set_title(followed.describe(number), color=COLOURS[verdict], fontsize=11)
    figure.suptitle(f"{Path(query.path).name} (left), {Path(key.path).name} (right)", color=TEXT, fontsize=12)
    save_figure(figure, path)
