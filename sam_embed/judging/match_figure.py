"""Pictures of matches: one point with its similarity map, and many landmarks across two patients.

Planes are those of `datasets.ct.planes`, in true proportions, on a dark background, in a soft-tissue window.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets.ct.geometry import spacing_of, world_to_index
from datasets.ct.nifti import Volume
from datasets.ct.planes import PLANES, cut_plane
from sam_embed.judging.evaluate import PairErrors
from sam_embed.preprocess import cut_body

WINDOW_HU = (-160.0, 240.0)
DISPLAY_SPACING_MM = (2.0, 2.0, 2.0)
MARGIN_MM = 8.0
SLAB_MM = 18.0  # points at most so far from an axial slice are drawn on it
BACKGROUND, TEXT = "#101216", "#e8eaed"


def for_display(volume: Volume) -> Volume:
    """The patient on an isotropic 2 mm grid, without the air around: slices are cheap and fill the picture."""
    return cut_body(volume, DISPLAY_SPACING_MM, MARGIN_MM)[0]


def _extent(shape: Sequence[int], spacing: Sequence[float], plane: str) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a plane's picture, mm on the grid."""
    _, down, across, is_flipped = PLANES[plane]
    ends = [(-spacing[axis] / 2, shape[axis] * spacing[axis] - spacing[axis] / 2) for axis in (across, down)]
    return (*ends[0], *(ends[1] if is_flipped else ends[1][::-1]))


def _slice(array: np.ndarray, affine: np.ndarray, plane: str, through_mm: np.ndarray) -> np.ndarray:
    """The plane of an array nearest to a world point [3]."""
    index = np.rint(world_to_index(affine, through_mm)).astype(int)
    return cut_plane(array, plane, np.clip(index, 0, np.array(array.shape) - 1))


def show_plane(axes: Axes, volume: Volume, plane: str, through_mm: np.ndarray) -> None:
    """Draw the plane of a volume through a world point [3]; coordinates are mm on the volume's grid."""
    extent = _extent(volume.shape, volume.spacing_mm, plane)
    picture = _slice(volume.array, volume.affine, plane, through_mm)
    low, high = WINDOW_HU
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    axes.set_xlim(*extent[:2])
    axes.set_ylim(*extent[2:])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")


def place_on(volume: Volume, plane: str, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (across, down) of world points [N, 3] on a view drawn by `show_plane`."""
    on_grid = world_to_index(volume.affine, points_mm) * volume.spacing_mm
    return on_grid[..., PLANES[plane].across], on_grid[..., PLANES[plane].down]


def _overlay_similarity(
    axes: Axes, volume: Volume, plane: str, similarity: np.ndarray, affine: np.ndarray, at_mm: np.ndarray
) -> None:
    """Lay a similarity map's slice through a world point over the slice drawn before, in its place."""
    left, right, bottom, top = _extent(similarity.shape, spacing_of(affine), plane)
    shift_across, shift_down = place_on(volume, plane, affine[:3, 3])  # of the map's first voxel
    axes.imshow(
        _slice(similarity, affine, plane, at_mm),
        cmap="inferno",
        vmin=np.quantile(similarity, 0.5),
        vmax=similarity.max(),
        alpha=0.55,
        extent=(left + shift_across, right + shift_across, bottom + shift_down, top + shift_down),
        interpolation="bilinear",
    )


def mark_place(axes: Axes, volume: Volume, plane: str, point_mm: np.ndarray, colour: str) -> None:
    """Draw a ring and a cross of lines at a world point [3] on a view drawn by `show_plane`."""
    across, down = place_on(volume, plane, point_mm)
    axes.axvline(across, color=colour, lw=0.6, alpha=0.6)
    axes.axhline(down, color=colour, lw=0.6, alpha=0.6)
    axes.plot(across, down, "o", mfc="none", mec=colour, ms=9, mew=1.6)


def draw_match(
    query: Volume,
    key: Volume,
    point_mm: np.ndarray,
    match_mm: np.ndarray,
    score: float,
    cycle_mm: float,
    similarity: np.ndarray,
    similarity_affine: np.ndarray,
) -> Figure:
    """One point in three planes of the query (top), its match in the key (middle), the similarity map there (bottom).

    Args:
        query, key: canonical HU volumes.
        point_mm, match_mm: world mm [3] in either volume.
        score, cycle_mm: of the match, for the title.
        similarity: [d, h, w] of the point to the key's fine voxels, with its affine [4, 4].
    """
    query, key = for_display(query), for_display(key)
    figure = Figure(figsize=(12, 12.5), facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(3, 3)
    for column, plane in enumerate(PLANES):
        for row, (volume, place) in enumerate(((query, point_mm), (key, match_mm), (key, match_mm))):
            show_plane(grid[row, column], volume, plane, place)
        _overlay_similarity(grid[2, column], key, plane, similarity, similarity_affine, match_mm)
        mark_place(grid[0, column], query, plane, point_mm, "#4cc9f0")
        mark_place(grid[1, column], key, plane, match_mm, "#ffd166")
        mark_place(grid[2, column], key, plane, match_mm, "white")
        grid[0, column].set_title(plane, color=TEXT, fontsize=11)
    names = [Path(volume.path).name for volume in (query, key)]
    for row, label in enumerate((f"point in {names[0]}", f"match in {names[1]}", f"similarity in {names[1]}")):
        grid[row, 0].set_ylabel(label, color=TEXT, fontsize=11)
    point = ", ".join(f"{value:.0f}" for value in point_mm)
    match = ", ".join(f"{value:.0f}" for value in match_mm)
    title = f"({point}) mm matched to ({match}) mm   score {score:.2f}   cycle error {cycle_mm:.1f} mm"
    figure.suptitle(title, color=TEXT, fontsize=13)
    return figure


def draw_landmark_matches(
    query: Volume, key: Volume, errors: PairErrors, path: str | Path, num_landmarks: int = 16
) -> None:
    """Write a picture of numbered landmarks in one patient, and where they are found in another.

    Coronal above, axial below. In the key, a ring is the match, a cross the true place, and a line joins them. The
    coronal slice shows all points, the axial slice those within 18 mm of it.

    Args:
        query, key: the canonical HU volumes of `errors.query` and `errors.key`.
        errors: of `evaluate_pairs`.
        path: picture file.
        num_landmarks: how many to draw, spread over the body; matches outside of the key are left out.
    """
    matched = np.flatnonzero(np.isfinite(errors.match_mm).all(axis=1))
    chosen = matched[_spread(errors.query_mm[matched], num_landmarks)]
    query_mm, match_mm, true_mm = errors.query_mm[chosen], errors.match_mm[chosen], errors.key_mm[chosen]
    query, key = for_display(query), for_display(key)
    # Mixed with white, so that blue is readable on black.
    colours = [tuple(0.35 + 0.65 * part for part in colormaps["hsv"](n / len(chosen))[:3]) for n in range(len(chosen))]
    figure = Figure(figsize=(15, 11), facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(2, 3, width_ratios=[1, 1, 0.55])
    heights = world_to_index(query.affine, query_mm)[:, 0] * query.spacing_mm[0]
    is_near = np.abs(heights[:, None] - heights) <= SLAB_MM
    near = is_near[is_near.sum(axis=1).argmax()]  # of the point with most others near its axial slice
    for row, (plane, shown) in enumerate((("coronal", np.ones(len(chosen), bool)), ("axial", near))):
        show_plane(grid[row, 0], query, plane, query_mm[shown].mean(axis=0))
        show_plane(grid[row, 1], key, plane, true_mm[shown].mean(axis=0))
        for number in np.flatnonzero(shown):
            colour, place = colours[number], place_on(query, plane, query_mm[number])
            _numbered(grid[row, 0], place, number + 1, colour, mfc=colour, mec="black", ms=6, mew=0.6)
            match, truth = place_on(key, plane, match_mm[number]), place_on(key, plane, true_mm[number])
            grid[row, 1].plot([match[0], truth[0]], [match[1], truth[1]], "-", color=colour, lw=1.2)
            grid[row, 1].plot(*truth, "x", color=colour, ms=6, mew=1.6)
            _numbered(grid[row, 1], match, number + 1, colour, mfc="none", mec=colour, ms=8, mew=1.6)
    grid[0, 0].set_title("query", color=TEXT)
    grid[0, 1].set_title("key: ring = match, cross = true place", color=TEXT)
    names = [errors.landmarks[number] for number in chosen]
    _list_errors(grid[:, 2], names, np.linalg.norm(match_mm - true_mm, axis=1), colours)
    title = f"median error {np.median(errors.error_mm['sam'][matched]):.1f} mm over {len(matched)} landmarks"
    title = f"{errors.query} to {errors.key}: {title}, {len(chosen)} of them shown"
    figure.suptitle(title, color=TEXT, fontsize=14)
    save_figure(figure, path)


def _spread(points_mm: np.ndarray, num: int) -> np.ndarray:
    """Indices of up to `num` points far from each other, head to foot."""
    chosen = [0]
    while len(chosen) < min(num, len(points_mm)):
        distance = np.linalg.norm(points_mm[:, None] - points_mm[chosen], axis=2).min(axis=1)
        chosen.append(int(distance.argmax()))
    return np.array(sorted(chosen, key=lambda number: -points_mm[number, 2]))


def _numbered(axes: Axes, place: tuple, number: int, colour: tuple, **marker) -> None:
    axes.plot(*place, "o", **marker)
    words = {"xytext": (6, 5), "textcoords": "offset points", "color": colour, "fontsize": 9, "weight": "bold"}
    axes.annotate(str(number), place, **words)


def _list_errors(columns: Sequence[Axes], names: Sequence[str], errors_mm: np.ndarray, colours: list) -> None:
    """Numbers, names and errors, in the colours of the points, over the whole height of the last column."""
    for axes in columns:
        axes.axis("off")
    for number, (name, error, colour) in enumerate(zip(names, errors_mm, colours)):
        line, place = f"{number + 1:2d}  {name}: {error:.1f} mm", columns[0].transAxes
        columns[0].text(0, 1 - number * 0.056, line, color=colour, fontsize=10, transform=place)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure with its dark background; folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())
