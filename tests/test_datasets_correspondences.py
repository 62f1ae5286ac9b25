"""The correspondence table: written and read back, filtered, and refused when it does not fit."""

import json
import pickle
import zlib

import numpy as np
import pytest

from datasets.samples.correspondence_files import HEADER_FILE, OLD_ROW_DTYPE, ROW_DTYPE, ROWS_FILE
from datasets.samples.correspondences import ANY_MM, CorrespondenceTable

NAMES = ["a", "b", "c", "d"]


def make_rows(num: int = 200, num_cases: int = 3, seed: int = 0) -> np.ndarray:
    """Random rows in no order; the last of the four cases never is a query."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(num, ROW_DTYPE)
    rows["query_case"] = rng.integers(0, num_cases, num)
    rows["key_case"] = (rows["query_case"] + rng.integers(1, len(NAMES), num)) % len(NAMES)
    rows["query_mm"], rows["key_mm"] = rng.normal(0, 100, (2, num, 3))
    rows["score"], rows["cycle_mm"] = rng.uniform(0, 1, num), rng.uniform(0, 30, num)
    rows["spread_mm"] = rng.uniform(0, 30, num)
    rows["cycle_mm"][::10] = rows["spread_mm"][::7] = np.nan
    return rows


def test_write_then_load_keeps_every_row_and_the_provenance(tmp_path):
    rows = make_rows()
    provenance = {"spacing_mm": [2.0, 2.0, 2.0], "min_score": 0.3}
    sources = {"a": "store:1:2:3", "b": "", "c": "file:1:2"}
    table = CorrespondenceTable.write(tmp_path / "new" / "folder", NAMES, rows, provenance, sources)
    again = CorrespondenceTable.load(tmp_path / "new" / "folder" / ROWS_FILE)
    assert again.case_names == NAMES and again.provenance == provenance
    assert again.sources == {"a": "store:1:2:3", "c": "file:1:2"}
    assert isinstance(table.rows, np.memmap) and not again.rows.flags.writeable
    assert sorted(row.tobytes() for row in again.rows) == sorted(row.tobytes() for row in rows)
    assert again.rows["query_case"].tolist() == sorted(rows["query_case"])


@pytest.mark.parametrize(
    ("max_cycle_mm", "max_spread_mm"), [(ANY_MM, ANY_MM), (np.inf, 10.0), (10.0, ANY_MM), (15.0, 20.0)]
)
@pytest.mark.parametrize("allowed", [None, np.array([True, False, True, True])])
def test_select_equals_the_obvious_loop(allowed, max_cycle_mm, max_spread_mm, monkeypatch):
    monkeypatch.setattr("datasets.samples.correspondence_files.ROWS_PER_CHUNK", 17)  # several chunks
    table = CorrespondenceTable.from_rows(NAMES, make_rows())
    selection = table.select(0.4, max_cycle_mm, max_spread_mm, allowed)
    for case in range(4):
        expected = [
            i
            for i, row in enumerate(table.rows)
            if row["query_case"] == case
            and row["score"] >= 0.4
            and (max_cycle_mm >= ANY_MM or row["cycle_mm"] <= max_cycle_mm)
            and (max_spread_mm >= ANY_MM or row["spread_mm"] <= max_spread_mm)
            and (allowed is None or (allowed[row["query_case"]] and allowed[row["key_case"]]))
        ]
        assert selection.of_case(case).tolist() == expected
    assert selection.num_per_case.sum() == len(selection.rows) > 0


def test_summary_counts(tmp_path):
    rows = make_rows()
    table = CorrespondenceTable.from_rows(NAMES, rows)
    facts = table.summary()
    counts = np.bincount(rows["query_case"], minlength=len(NAMES))
    assert facts["num_rows"] == 200 and facts["rows_per_case_max"] == counts.max()
    assert facts["num_cases_without_rows"] == 1 and facts["rows_per_case_min"] == 0
    assert facts["mean_score"] == pytest.approx(rows["score"].mean(), rel=1e-5)
    assert CorrespondenceTable.from_rows(NAMES, rows[:0]).summary()["num_rows"] == 0


def test_pickle_carries_no_rows(tmp_path):
    table = CorrespondenceTable.write(tmp_path, NAMES, make_rows(20_000), {})
    packed = pickle.dumps(table)
    assert len(packed) < 5_000
    assert (pickle.loads(packed).rows["score"] == table.rows["score"]).all()


def test_missing_and_half_written_tables_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"correspondences\.json: no such file.*mine_pairs.*--embed_dir"):
        CorrespondenceTable.load(tmp_path)
    CorrespondenceTable.write(tmp_path, NAMES, make_rows(), {})
    (tmp_path / ROWS_FILE).unlink()
    with pytest.raises(ValueError, match=r"correspondences\.npy: no such file"):
        CorrespondenceTable.load(tmp_path)


def test_header_and_rows_of_two_tables_are_not_joined(tmp_path):
    CorrespondenceTable.write(tmp_path / "old", NAMES, make_rows(seed=0), {})
    CorrespondenceTable.write(tmp_path / "new", NAMES, make_rows(seed=1), {})
    (tmp_path / "new" / ROWS_FILE).replace(tmp_path / "old" / ROWS_FILE)  # as if a crash had come between the two
    with pytest.raises(ValueError, match="not those that correspondences.json describes"):
        CorrespondenceTable.load(tmp_path / "old")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: np.save(folder / ROWS_FILE, np.zeros((3, 3))), "expected a 1-D array with the fields"),
        (lambda folder: (folder / ROWS_FILE).write_bytes((folder / ROWS_FILE).read_bytes()[:-100]), "not readable"),
        (lambda folder: (folder / HEADER_FILE).write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / HEADER_FILE).write_text("[" * 200_000), "not readable as JSON"),
        (lambda folder: np.savez((folder / ROWS_FILE).open("wb"), rows=np.zeros(3)), "an archive of arrays"),
        (lambda folder: (folder / HEADER_FILE).write_text('{"num_rows": 3}'), "lacks case_names"),
        (lambda folder: edit_header(folder, case_names=NAMES[:3]), "do not fit together"),
        (
            lambda folder: edit_header(folder, case_names=5),
            r"json: case_names is 5, expected list; mine the table again",
        ),
        (lambda folder: edit_header(folder, case_names=[*NAMES[:3], "a"]), "none of them twice"),
        (lambda folder: edit_header(folder, case_names=[*NAMES[:3], 7]), "case_names and sources must hold text"),
        (lambda folder: edit_header(folder, sources={"a": 7}), "case_names and sources must hold text"),
        (lambda folder: edit_header(folder, sources=None), "sources is None, expected dict"),
        (lambda folder: edit_header(folder, offsets=["a"] * 5), "offsets must hold whole numbers"),
        (lambda folder: edit_header(folder, provenance=None), "provenance is None, expected dict"),
        (lambda folder: edit_header(folder, num_rows="many"), "num_rows is 'many', expected int"),
        (lambda folder: edit_header(folder, offsets=[0, 1, 2, 3, 200]), "not sorted by query case"),
        (lambda folder: edit_header(folder, format_version=9), "format version 9"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, damage, message):
    CorrespondenceTable.write(tmp_path, NAMES, make_rows(), {})
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        CorrespondenceTable.load(tmp_path)


def edit_header(folder, **changes) -> None:
    header = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("key_case", 4, "outside of the 4 cases"),
        ("query_case", -1, "do not fit together"),
        ("key_case", "own", "matches a case with itself"),
        ("query_mm", np.nan, "row .* non-finite query_mm"),
        ("score", np.inf, "non-finite score"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_written(tmp_path, field, value, message):
    rows = make_rows()
    rows[field][17] = rows["query_case"][17] if value == "own" else value
    with pytest.raises(ValueError, match=message):
        CorrespondenceTable.write(tmp_path, NAMES, rows, {})
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_older_table(tmp_path):
    CorrespondenceTable.write(tmp_path, NAMES, make_rows(), {"run": 1})
    with pytest.raises(TypeError):
        CorrespondenceTable.write(tmp_path, NAMES, make_rows(seed=3), {"not json": object()})
    assert CorrespondenceTable.load(tmp_path).provenance == {"run": 1}


def test_names_unknown_to_the_store_are_named_and_most_of_them_refused(caplog):
    table = CorrespondenceTable.from_rows(NAMES, make_rows())
    table.check_cases(["a", "b", "c", "d", "e"])
    assert not caplog.text
    table.check_cases(["a", "c"])
    assert "2 of its 4 cases are not in the volume store (b, d)" in caplog.text
    with pytest.raises(ValueError, match=r"3 of its 4 cases are not in the volume store \(b, c, d\); mine"):
        table.check_cases(["a"])
    with pytest.raises(ValueError, match="none of them twice"):
        CorrespondenceTable.from_rows(["a", "a"], make_rows(0))


def test_a_table_of_the_first_format_is_read_with_a_warning(tmp_path, caplog):
    rows = make_rows()
    CorrespondenceTable.write(tmp_path, NAMES, rows, {})
    old = np.zeros(len(rows), OLD_ROW_DTYPE)
    for name in OLD_ROW_DTYPE.names:
        old[name] = np.sort(rows, order="query_case", kind="stable")[name]
    np.save(tmp_path / ROWS_FILE, old)
    header = json.loads((tmp_path / HEADER_FILE).read_text())
    del header["sources"]
    header |= {"format_version": 1, "rows_crc32": zlib.crc32(old.tobytes())}
    (tmp_path / HEADER_FILE).write_text(json.dumps(header))
    assert not caplog.text
    table = pickle.loads(pickle.dumps(CorrespondenceTable.load(tmp_path)))
    assert "table of format 1" in caplog.text and "mine the table again" in caplog.text
    assert table.rows.dtype == ROW_DTYPE and np.isnan(table.rows["spread_mm"]).all() and table.sources == {}
    np.testing.assert_array_equal(table.rows["key_mm"], old["key_mm"])
    assert len(table.select().rows) == len(rows) and len(table.select(max_spread_mm=100.0).rows) == 0


def test_points_found_in_other_volumes_are_refused_by_name():
    sources = {"a": "store:1:1:AA", "b": "store:2:2:BB", "c": "store:3:3", "d": "file:9:9"}
    table = CorrespondenceTable.from_rows(NAMES, make_rows(), sources=sources)
    resampled = {"a": "store:7:7:AA", "b": "store:2:2:BB", "c": "store:8:8", "d": "store:4:4:DD", "new": "store:5:5:EE"}
    table.check_sources(resampled)  # the same files at another spacing, or nothing known of the files
    with pytest.raises(ValueError, match=r"2 of its 4 cases were mined from other files than the store's, first a, b;"):
        table.check_sources(resampled | {"a": "store:1:1:FF", "b": "store:2:2:AA"})
    with pytest.raises(ValueError, match="first a; embed and mine again from this --store_dir"):
        table.check_sources({"a": "store:1:1:FF"})
