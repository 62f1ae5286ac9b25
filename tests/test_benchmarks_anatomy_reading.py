"""The benchmark of reading vectors at points runs, and its figures are figures; how fast is not tested."""

import json

import numpy as np
import pytest

from benchmarks import anatomy_reading
from benchmarks.results import HEADER

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shares_and_memory_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(anatomy_reading, "NUM_SAMPLES", 2)
    anatomy_reading.main(["--quick", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["shares"]) == {"distil_32", "across_32"} and found["num_cases"] == 20
    figures = [value for taken in found["shares"].values() for value in taken.values()]
    figures += [found[name] for name in ("compact_mb", "opened_mb", "open_ms", "read_ms", "private_mb_at_the_end")]
    assert all(np.isfinite(value) and value > 0 for value in figures)
    assert all(len(row) == len(HEADER) for row in anatomy_reading.rows(found))
