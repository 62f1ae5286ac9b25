"""The benchmark of a large corpus, in its small version: every case is drawn, broken volumes are named once."""

import json

import pytest

from benchmarks import corpus_scale
from benchmarks.results import HEADER

pytestmark = pytest.mark.usefixtures("one_thread")


def test_corpus_benchmark_measures_a_small_one(tmp_path):
    corpus_scale.main(["--quick", "--num_workers", "1", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_cases"] == 80
    assert found["broken_named"] == ["case00001", "case00040"] and found["broken_lines"] == [1, 1]
    assert found["broken_samples_replaced"] >= 2 and found["broken_agree"] is True
    assert 1 <= found["pairs_per_case_and_epoch_min"] <= found["pairs_per_case_and_epoch_median"] <= 3
    assert found["pairs_per_case_and_epoch_median"] == pytest.approx(2, abs=0.5)  # two cases a pair
    assert found["first_step_wall_s"] > 0 and found["wait_longest_elsewhere_ms"] > 0
    assert all(worker["pss"] > 10 for part in found["worker_memory_mb"].values() for worker in part)
    assert all(len(row) == len(HEADER) for row in corpus_scale.rows(found))
