"""The benchmark of Alice's step runs, goes on after a setting that fails, and tells what did; speed is not tested."""

import copy
import json
import math

import pytest
import torch

from benchmarks import pretrain_step, step_overheads
from benchmarks.naive_step import take_views_apart
from benchmarks.pretrain_step import Setting, ladder, memory_grid, setting_of
from benchmarks.results import HEADER

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (64, 32, 32)


def test_a_setting_out_of_memory_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    plain = pretrain_step.synthetic_batch

    def too_large_for_two(num_pairs: int, *given):
        if num_pairs == 2:
            raise torch.OutOfMemoryError("tried to allocate 200 GiB")
        return plain(num_pairs, *given)

    settings = [Setting("large", SMALL, 2), Setting("fits", SMALL, 1, "fp32", "auto", True, True)]
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
    assert all(len(row) == len(HEADER) for row in pretrain_step.rows(found))
    assert "| 64x32x32 | 2 | large |" in tables.read_text() and "out of memory" in tables.read_text()


def test_settings_after_the_time_limit_are_left_out(capsys):
    found = pretrain_step.run(
        pretrain_step.make_flags().parse_args(["--quick", "--device", "cpu", "--time_limit_s", "0"])
    )
    assert all("left out" in result["found"]["error"] for result in found["settings"])
    precision = pretrain_step.fast_precision(torch.device("cpu"))
    num_lines = len(ladder(SMALL, 1, precision, on_cpu=True)) - 1  # compiling is left out
    assert len(found["settings"]) == num_lines + len(memory_grid({SMALL: [1, 2]}, precision, on_cpu=True))
    assert "- / -" in pretrain_step.markdown(found)


@pytest.mark.parametrize(
    ("has_units", "has_amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_a_cpu_is_timed_in_bf16_where_it_has_units_for_it(monkeypatch, has_units, has_amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    assert pretrain_step.fast_precision(torch.device("cpu")) == expected
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert pretrain_step.fast_precision(torch.device("cpu")) == ("bf16" if has_amx else "fp32")


def test_each_line_of_the_ladder_changes_something():
    settings = ladder((96, 96, 96), 4, "bf16")
    choices = [tuple(vars(setting).values())[1:] for setting in settings]
    assert len(set(choices)) == len(choices)
    assert [setting.precision for setting in settings] == ["fp32"] * 3 + ["bf16"] * (len(settings) - 3)
    on_cpu = ladder((96, 96, 96), 1, "fp32", on_cpu=True)
    assert {setting.precision for setting in on_cpu} == {"fp32"} and len(set(map(str, on_cpu))) == len(on_cpu)


def test_views_apart_give_the_same_loss_and_gradients():
    torch.manual_seed(0)
    joined = pretrain_step.make_alice(SMALL, **pretrain_step.QUICK)
    batch = pretrain_step.synthetic_batch(2, SMALL, torch.device("cpu"))
    found = []
    for is_apart in (False, True):
        method = copy.deepcopy(joined)
        if is_apart:
            take_views_apart(method)
        total, _ = method(batch, pretrain_step.NOW)
        total.backward()
        gradients = [p.grad.flatten() for p in method.student.parameters() if p.requires_grad]
        method.after_step(
            pretrain_step.NOW, was_skipped=torch.tensor(False)
        )  # the wider teacher finds every name in the student
        found.append((total.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert (found[1][1] - found[0][1]).norm() < 1e-3 * found[0][1].norm()


def test_a_loss_that_is_not_finite_is_an_error_of_its_setting(monkeypatch):
    bench = pretrain_step.make_bench(pretrain_step.make_flags().parse_args(["--quick", "--device", "cpu"]))
    broken = pretrain_step.synthetic_batch(1, SMALL, bench.device)
    broken["crop"][:] = math.nan
    monkeypatch.setattr(pretrain_step, "synthetic_batch", lambda *given: broken)
    assert "not finite" in bench.measure(Setting("broken", SMALL, 1), num_steps=1)["error"]


def test_every_part_of_the_overhead_is_timed():
    found = step_overheads.run(step_overheads.make_flags().parse_args(["--quick", "--device", "cpu"]))
    assert len(found["parts_wall_s"]) == 4 and all(seconds > 0 for seconds in found["parts_wall_s"].values())
    assert found["step_wall_s"] > max(found["parts_wall_s"].values())
    assert [len(row) for row in step_overheads.rows(found)] == [len(HEADER)]
