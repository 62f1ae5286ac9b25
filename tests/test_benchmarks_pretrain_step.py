"""The benchmark of Alice's step runs, goes on after a setting that fails, and tells what did; speed is not tested."""

import json
import math

import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks import pretrain_step
from benchmarks.pretrain_step import Setting, ladder, memory_grid, setting_of

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (64, 32, 32)


def test_a_setting_out_of_memory_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    plain = pretrain_step.synthetic_batch

    def too_large_for_two(num_pairs: int, *given):
        if num_pairs == 2:
            raise torch.OutOfMemoryError("tried to allocate 200 GiB")
        return plain(num_pairs, *given)

    settings = [Setting("large", SMALL, 2), Setting("fits", SMALL, 1, "bf16", "auto", True, True)]
    monkeypatch.setattr(pretrain_step, "synthetic_batch", too_large_for_two)
    monkeypatch.setattr(pretrain_step, "plan", lambda flags, precision, device: (settings, settings[:1]))
    output, tables = tmp_path / "found.json", tmp_path / "found.md"
    pretrain_step.main(["--quick", "--device", "cpu", "--output", str(output), "--markdown", str(tables)])
    found = json.loads(output.read_text())
    failed, fits, again = (result["found"] for result in found["settings"])
    assert failed["error"].startswith("out of memory: tried") and again == failed
    assert math.isfinite(fits["step_ms"]) and fits["step_ms"] > 0
    assert fits["pairs_per_s"] == pytest.approx(1000 / fits["step_ms"])
    assert setting_of(found["settings"][1]["setting"]) == settings[1]
    assert all(len(row) == len(all_benchmarks.HEADER) for row in pretrain_step.rows(found))
    assert "| 64x32x32 | 2 | large |" in tables.read_text() and "out of memory" in tables.read_text()


def test_settings_after_the_time_limit_are_left_out(capsys):
    found = pretrain_step.run(
        pretrain_step.make_flags().parse_args(["--quick", "--device", "cpu", "--time_limit_s", "0"])
    )
    assert all("left out" in result["found"]["error"] for result in found["settings"])
    num_lines = len(ladder(SMALL, 1, "bf16", on_cpu=True)) - 1  # compiling is left out
    assert len(found["settings"]) == num_lines + len(memory_grid({SMALL: [1, 2]}, "bf16"))
    assert "- / -" in pretrain_step.markdown(found)


def test_each_line_of_the_ladder_changes_something():
    settings = ladder((96, 96, 96), 4, "bf16")
    choices = [tuple(vars(setting).values())[1:] for setting in settings]
    assert len(set(choices)) == len(choices)
    assert [setting.precision for setting in settings] == ["fp32"] + ["bf16"] * (len(settings) - 1)
