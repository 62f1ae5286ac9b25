"""The correspondence table: written and read back, filtered, and refused when it does not fit."""

import json
import pickle

import numpy as np
import pytest

from datasets.samples.correspondences import (
    HEADER_FILE,
    ROW_DTYPE,
    ROWS_FILE,
    CorrespondenceTable,
)

NAMES = ["a", "b", "c", "d"]


def make_rows(num: int = 200, num_cases: int = 3, seed: int = 0) -> np.ndarray:
    """Random rows in no order; the last of the four cases never is a query."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(num, ROW_DTYPE)
    rows["query_case"] = rng.integers(0, num_cases, num)
    rows["key_case"] = rng.integers(0, len(NAMES), num)
    rows["query_mm"], rows["key_mm"] = rng.normal(0, 100, (2, num, 3))
    rows["score"], rows["cycle_mm"] = rng.uniform(0, 1, num), rng.uniform(0, 30, num)
    rows["cycle_mm"][::10] = np.nan
    return rows


def test_write_then_load_keeps_every_row_and_the_provenance(tmp_path):
    rows = make_rows()
    provenance = {"spacing_mm": [2.0, 2.0, 2.0], "min_score": 0.3}
    table = CorrespondenceTable.write(tmp_path / "new" / "folder", NAMES, rows, provenance)
    again = CorrespondenceTable.load(tmp_path / "new" / "folder" / ROWS_FILE)
    assert again.case_names == NAMES and again.provenance == provenance
    assert isinstance(table.rows, np.memmap) and not again.rows.flags.writeable
    assert sorted(row.tobytes() for row in again.rows) == sorted(row.tobytes() for row in rows)
    assert again.rows["query_case"].tolist() == sorted(rows["query_case"])


@pytest.mark.parametrize("max_cycle_mm", [np.inf, 10.0])
@pytest.mark.parametrize("allowed", [None, np.array([True, False, True, True])])
def test_select_equals_the_obvious_loop(allowed, max_cycle_mm, monkeypatch):
    monkeypatch.setattr("datasets.samples.correspondences._ROWS_PER_CHUNK", 17)  # several chunks
    table = CorrespondenceTable.from_rows(NAMES, make_rows())
    selection = table.select(0.4, max_cycle_mm, allowed)
    for case in range(4):
        expected = [
            i
            for i, row in enumerate(table.rows)
            if row["query_case"] == case
            and row["score"] >= 0.4
            and (np.isinf(max_cycle_mm) or row["cycle_mm"] <= max_cycle_mm)
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
        (lambda folder: (folder / HEADER_FILE).write_text('{"num_rows": 3}'), "lacks case_names"),
        (lambda folder: edit_header(folder, case_names=NAMES[:3]), "do not fit together"),
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
        ("query_mm", np.nan, "row .* non-finite query_mm"),
        ("score", np.inf, "non-finite score"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_written(tmp_path, field, value, message):
    rows = make_rows()
    rows[field][17] = value
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
