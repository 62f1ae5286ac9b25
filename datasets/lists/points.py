"""Lists of named points: CSV files, and the point lists of 3D Slicer (`.mrk.json`).

In memory, points are world mm in RAS+: x grows to the right, y to the front, z to the head. CSV files hold the same. A
file of Slicer states its coordinate system, RAS or LPS (x grows to the left, y to the back), and older ones state it by
a number. Its format: `Modules/Loadable/Markups/Resources/Schema` in Slicer's sources.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.store.files import write_text

CSV_SUFFIX, MARKUPS_SUFFIX = ".csv", ".mrk.json"
COLUMNS = ("name", "x_mm", "y_mm", "z_mm")
SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
# What a file calls its coordinate system, and the factors that lead from there to RAS+.
SYSTEMS = {"RAS": np.ones(3), "LPS": LPS_TO_RAS, "0": np.ones(3), "1": LPS_TO_RAS}
POINT_KIND = "Fiducial"


class PointFileError(ValueError):
    """A file of points that cannot be used; the message names the file, the place in it and what is wrong there."""


@dataclass(frozen=True)
class NamedPoints:
    """Points with unique names.

    Attributes:
        names: N texts, none empty.
        points_mm: float64 [N, 3], world mm in RAS+.
        path: the file that they come from.
    """

    names: tuple[str, ...]
    points_mm: np.ndarray
    path: str


def read_points(path: str | Path) -> NamedPoints:
    """Read points from a `.csv` with the columns name, x_mm, y_mm and z_mm (others are ignored), or from a `.mrk.json`.

    Raises:
        PointFileError: no such file, another kind of file, no points, a row without name or with coordinates that are
            not finite numbers, a name twice; in a `.mrk.json` also markups that are no points, points that are not
            placed, and coordinate systems other than RAS and LPS.
    """
    read = {CSV_SUFFIX: _read_csv, MARKUPS_SUFFIX: _read_markups}[suffix_of(path)]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Excel puts a byte-order mark in front
    except FileNotFoundError as error:
        raise PointFileError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PointFileError(f"{path}: not readable as text ({error})") from error
    places, names, points = [], [], []
    for place, name, point in read(text, path):
        if name in names:
            raise PointFileError(f"{place}: the name {name!r} stands there again, first at {places[names.index(name)]}")
        places.append(place)
        names.append(name)
        points.append(point)
    if not names:
        raise PointFileError(f"{path}: holds no points")
    return NamedPoints(tuple(names), np.array(points), str(path))


def suffix_of(path: str | Path) -> str:
    """`.csv` or `.mrk.json`.

    Raises:
        PointFileError: the name ends otherwise.
    """
    for suffix in (CSV_SUFFIX, MARKUPS_SUFFIX):
        if Path(path).name.lower().endswith(suffix):
            return suffix
    raise PointFileError(f"{path}: expected a name ending in {CSV_SUFFIX} or {MARKUPS_SUFFIX}")


def write_table(path: str | Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Write a CSV file. Numbers keep three decimals, NaN and None become empty; whole file or none appears."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def write_markups(path: str | Path, names: Sequence[str], points_mm: np.ndarray, descriptions: Sequence[str]) -> None:
    """Write a point list of 3D Slicer, in LPS as Slicer itself does; whole file or none appears.

    Args:
        names, descriptions: N texts.
        points_mm: [N, 3], world mm in RAS+. A point with NaN is listed as not placed.
    """
    rows = zip(names, np.asarray(points_mm, dtype=np.float64), descriptions)
    points = [_control_point(str(number), *row) for number, row in enumerate(rows, start=1)]
    markup = {"type": POINT_KIND, "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": points}
    write_text(path, json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=1) + "\n")


def _cell(value: object) -> object:
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if np.isfinite(value) else ""
    return value


def _control_point(number: str, name: str, point_mm: np.ndarray, description: str) -> dict:
    is_placed = bool(np.isfinite(point_mm).all())
    position = np.round(point_mm * LPS_TO_RAS, 3).tolist() if is_placed else [0.0, 0.0, 0.0]
    status = "defined" if is_placed else "undefined"
    return {"id": number, "label": name, "description": description, "position": position, "positionStatus": status}


# Where a point stands in its file, its name, and float64 [3], world mm in RAS+.
Entry = tuple[str, str, np.ndarray]


def _read_csv(text: str, path: str | Path) -> Iterator[Entry]:
    reader = csv.DictReader(io.StringIO(text))
    if lacking := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        received = ",".join(reader.fieldnames or ()) or "nothing"
        raise PointFileError(
            f"{path}, line 1: lacks the column {', '.join(lacking)}; expected {','.join(COLUMNS)}, received {received}"
        )
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise PointFileError(f"{place}: expected {len(reader.fieldnames)} values, as the first line has")
        yield place, _name(row["name"], place), _point([row[column] for column in COLUMNS[1:]], place)


def _read_markups(text: str, path: str | Path) -> Iterator[Entry]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PointFileError(f"{path}: not JSON ({error})") from error
    markups = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(markups, list) or not all(isinstance(markup, dict) for markup in markups):
        raise PointFileError(f'{path}: expected the markups of 3D Slicer, {{"markups": [...]}}')
    for markup in markups:
        to_ras = _checked_factors(markup, path)
        points = markup.get("controlPoints", [])
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise PointFileError(f"{path}: controlPoints is no list of points")
        for number, point in enumerate(points, start=1):
            place = f"{path}, control point {number}"
            name = _name(point.get("label"), place)
            if (status := point.get("positionStatus", "defined")) != "defined":
                raise PointFileError(f"{place}: {name!r} is not placed (positionStatus {status!r}); place or remove it")
            yield place, name, _point(point.get("position"), place) * to_ras


def _checked_factors(markup: dict, path: str | Path) -> np.ndarray:
    """The factors [3] from a markup's coordinate system to RAS+."""
    if (kind := markup.get("type")) != POINT_KIND:
        raise PointFileError(f"{path}: holds a markup of type {kind!r}, expected point lists ({POINT_KIND!r}) only")
    if (unit := markup.get("coordinateUnits", "mm")) != "mm":
        raise PointFileError(f"{path}: coordinateUnits is {unit!r}, expected 'mm'")
    system = markup.get("coordinateSystem")
    if str(system) not in SYSTEMS:
        raise PointFileError(f"{path}: coordinateSystem is {system!r}, expected one of {', '.join(SYSTEMS)}")
    return SYSTEMS[str(system)]


def _name(name: object, place: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise PointFileError(f"{place}: the point has no name")
    return name.strip()


def _point(values: object, place: str) -> np.ndarray:
    """Three finite coordinates, float64 [3]."""
    try:
        point = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        point = np.empty(0)
    if point.shape != (3,) or not np.isfinite(point).all():
        raise PointFileError(f"{place}: expected three coordinates in mm, received {values!r}")
    return point
