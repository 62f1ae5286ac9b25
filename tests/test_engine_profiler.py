"""A trace of a few steps: the steps that were asked for, whole, and the same batches pass through."""

import gzip
import json

import pytest
import torch

import main_ddp
from engine.profiler import FIRST_STEPS, WARM_UP_STEPS, profiled
from tests.tiny_run import add_store_and_table, arguments, log_of, make_corpus

SKIPPED = FIRST_STEPS + WARM_UP_STEPS


def names_in(trace) -> list[str]:
    with gzip.open(trace, "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


@pytest.mark.parametrize(("num_given", "num_recorded"), [(20, 2), (2 * SKIPPED + 2, 1)])
def test_records_whole_steps_after_the_first_ones(tmp_path, num_given, num_recorded):
    """Two batches a step, two steps wanted; a batch is one matrix product. A run may end before all are recorded."""
    told, batches = [], [{"number": number} for number in range(num_given)]
    seen = []
    for batch in profiled(iter(batches), 2, 2, tmp_path / "new" / "trace.json.gz", told.append):
        torch.ones(4, 4) @ torch.ones(4, 4)
        seen.append(batch)
    assert seen == batches
    assert names_in(tmp_path / "new" / "trace.json.gz").count("aten::matmul") == 2 * num_recorded
    assert "aten::mm" in told[0] and "trace.json.gz" in told[1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.json.gz"]


def test_a_place_that_cannot_be_written_to_ends_no_training(tmp_path):
    (tmp_path / "file").write_text("")
    told, batches = [], [{}] * (SKIPPED + 3)
    passed = list(profiled(iter(batches), 1, 1, tmp_path / "file" / "trace.json.gz", told.append))
    assert len(passed) == len(batches) and "warning: no trace" in told[1]


def test_a_pretraining_leaves_its_trace_and_is_not_changed(tmp_path):
    corpus = add_store_and_table(make_corpus(tmp_path))
    for name, profile_steps in (("plain", 0), ("traced", 1)):
        main_ddp.main(
            arguments(
                corpus, tmp_path / name, backbone="unet", roi_z=32, epochs=2, lambda2=0, profile_steps=profile_steps
            )
        )
    losses = [[entry["loss"] for entry in log_of(tmp_path / name, "train")] for name in ("plain", "traced")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert "aten::convolution" in names_in(tmp_path / "traced" / "trace.json.gz")
    assert not (tmp_path / "plain" / "trace.json.gz").exists()
