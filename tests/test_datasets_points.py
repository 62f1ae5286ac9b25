"""Files of named points: both kinds, coordinate systems, and mistakes named by file and place."""

import json

import numpy as np
import pytest

from datasets.lists.points import PointFileError, read_points, write_markups, write_table

RAS = [[-40.0, 10.5, -550.0], [20.0, 20.0, -480.25]]


def markups(system: object = "LPS", kind: str = "Fiducial", **changes) -> dict:
    """Two points as Slicer stores them; the positions are those of `RAS` where the system is LPS."""
    points = [
        {"id": "1", "label": "lesion 1", "position": [40.0, -10.5, -550.0], "positionStatus": "defined"},
        {"id": "2", "label": "heart", "position": [-20.0, -20.0, -480.25]},
    ]
    markup = {"type": kind, "coordinateSystem": system, "coordinateUnits": "mm", "controlPoints": points}
    return {"@schema": "...", "markups": [markup | changes]}


def write(folder, content: dict | str, name: str):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_csv(start, tmp_path):
    text = f'{start}name,x_mm,y_mm,z_mm,note\nlesion 1,-40,10.5,-550,"round, soft"\nheart,20,20,-480.25,\n'
    points = read_points(write(tmp_path, text, "p.csv"))
    assert points.names == ("lesion 1", "heart") and points.path.endswith("p.csv")
    np.testing.assert_array_equal(points.points_mm, RAS)


@pytest.mark.parametrize("system, signs", [("LPS", 1), ("1", 1), (1, 1), ("RAS", -1), ("0", -1), (0, -1)])
def test_markups_are_read_in_the_system_that_they_state(system, signs, tmp_path):
    points = read_points(write(tmp_path, markups(system), "p.mrk.json"))
    assert points.names == ("lesion 1", "heart")
    np.testing.assert_array_equal(points.points_mm, np.array(RAS) * [signs, signs, 1])


def test_markups_are_written_in_lps(tmp_path):
    path = tmp_path / "new" / "out.mrk.json"
    write_markups(path, ["a", "b"], np.array([RAS[0], [np.nan] * 3]), ["trusted", "outside"])
    (markup,) = json.loads(path.read_text())["markups"]
    first, second = markup["controlPoints"]
    assert (markup["type"], markup["coordinateSystem"]) == ("Fiducial", "LPS")
    assert (first["label"], first["position"], first["description"]) == ("a", [40.0, -10.5, -550.0], "trusted")
    assert (first["positionStatus"], second["positionStatus"]) == ("defined", "undefined")
    with pytest.raises(PointFileError, match="out.mrk.json, control point 2: 'b' is not placed"):
        read_points(path)
    write_markups(path, ["a", "b"], np.array(RAS), ["", ""])
    np.testing.assert_array_equal(read_points(path).points_mm, RAS)


def test_a_table_has_three_decimals_and_leaves_unknown_numbers_empty(tmp_path):
    row = {"name": "a, b", "x_mm": np.float64(1.23456), "score": np.float32(np.nan)}
    write_table(tmp_path / "t.csv", ("name", "x_mm", "score"), [row])
    assert (tmp_path / "t.csv").read_text() == 'name,x_mm,score\n"a, b",1.235,\n'


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("name,x,y,z\na,1,2,3\n", r"p.csv, line 1: lacks the column x_mm, y_mm, z_mm; .* received name,x,y,z"),
        ("", "p.csv, line 1: lacks the column name, .* received nothing"),
        ("name,x_mm,y_mm,z_mm\n", "p.csv: holds no points"),
        ("name,x_mm,y_mm,z_mm\na,1,2,3\nb,1,two,3\n", r"p.csv, line 3: expected three coordinates .*'two'"),
        ("name,x_mm,y_mm,z_mm\na,1,2,nan\n", "p.csv, line 2: expected three coordinates"),
        ("name,x_mm,y_mm,z_mm\na,1,2\n", "p.csv, line 2: expected 4 values"),
        ("name,x_mm,y_mm,z_mm\na,1,2,3,4\n", "p.csv, line 2: expected 4 values"),
        ("name,x_mm,y_mm,z_mm\n ,1,2,3\n", "p.csv, line 2: the point has no name"),
        ("name,x_mm,y_mm,z_mm\na,1,2,3\na,4,5,6\n", "p.csv, line 3: the name 'a' stands there again, .* line 2"),
    ],
)
def test_mistakes_in_a_csv_are_named(text, complaint, tmp_path):
    with pytest.raises(PointFileError, match=complaint):
        read_points(write(tmp_path, text, "p.csv"))


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "p.mrk.json: not JSON"),
        ({"points": []}, "p.mrk.json: expected the markups of 3D Slicer"),
        (markups(kind="ROI"), "p.mrk.json: holds a markup of type 'ROI', expected point lists"),
        (markups(system="IJK"), "p.mrk.json: coordinateSystem is 'IJK', expected one of RAS, LPS, 0, 1"),
        (markups(system=None), "p.mrk.json: coordinateSystem is None"),
        (markups(coordinateUnits="um"), "p.mrk.json: coordinateUnits is 'um'"),
        (markups(controlPoints=[]), "p.mrk.json: holds no points"),
        (markups(controlPoints=["a"]), "p.mrk.json: controlPoints is no list of points"),
        (markups(controlPoints=[{"label": "a", "position": [1, 2]}]), r"control point 1: expected three .*\[1, 2\]"),
        (markups(controlPoints=[{"position": [1, 2, 3]}]), "p.mrk.json, control point 1: the point has no name"),
    ],
)
def test_mistakes_in_markups_are_named(content, complaint, tmp_path):
    with pytest.raises(PointFileError, match=complaint):
        read_points(write(tmp_path, content, "p.mrk.json"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(PointFileError, match="p.fcsv: expected a name ending in .csv or .mrk.json"):
        read_points(tmp_path / "p.fcsv")
    with pytest.raises(PointFileError, match="gone.csv: no such file"):
        read_points(tmp_path / "gone.csv")
    (tmp_path / "packed.csv").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(PointFileError, match="packed.csv: not readable as text"):
        read_points(tmp_path / "packed.csv")
