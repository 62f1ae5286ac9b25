"""The check for a GPU, rehearsed: every item runs, slow and broken ones are ended and named, what there is stays."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_parts import apart
from benchmarks.gpu_parts.apart import Item, Workplace
from benchmarks.gpu_parts.items import DEFAULT, FP32, NAIVE, TOY_SETTINGS, step_settings
from benchmarks.gpu_parts.methods import run_figures, step_profile
from benchmarks.gpu_parts.report import markdown
from models.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
CARD = {"device": "card", "memory_gb": 1.0, "cuda": "12.8", "torch": "2.11", "python": "3.12", "num_cpus": 16}
ABOUT = CARD | {"commit": "0123456789", "is_rehearsal": False, "date": "2026-01-01"}


# Stand-ins for items; they run in other processes


def known_card(place: Workplace) -> None:
    place.keep(CARD)


def fine(place: Workplace) -> None:
    place.keep({"passed": ["one", "two"], "failed": [], "skipped": []})


def broken(place: Workplace) -> None:
    place.keep({"first": 1})
    raise ValueError("no such kernel")


def endless(place: Workplace) -> None:
    """Starts a process that would outlive it, and does not hear the request to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    place.keep({"child": subprocess.Popen(["sleep", "600"]).pid})
    time.sleep(600)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie (Linux)."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def plan_of(monkeypatch) -> Callable[..., None]:
    """Replaces the items by stand-ins, as if there were a GPU."""

    def replace(*items: Item) -> None:
        monkeypatch.setattr(gpu_check, "plan", lambda parts: [Item("machine", 1, 300.0, known_card), *items])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(apart, "GRACE_S", 1.0)
    return replace


def results(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_slow_and_broken_items_are_named_and_the_others_run(tmp_path, plan_of, capsys):
    plan_of(Item("broken", 1, 100.0, broken), Item("endless", 1, 12.0, endless), Item("gpu_tests", 1, 100.0, fine))
    with pytest.raises(
        SystemExit, match=f"2 of 4 items failed:\n  broken: {tmp_path}/broken.log\n  endless: "
    ) as ended:
        gpu_check.main(["--output_dir", str(tmp_path)])
    assert isinstance(ended.value.code, str), "Python prints a text and ends with 1"
    items = results(tmp_path)["items"]
    assert items["broken"]["error"] == "ValueError: no such kernel" and items["broken"]["figures"] == {"first": 1}
    assert "Traceback" in (tmp_path / "broken.log").read_text()
    assert items["endless"]["error"] == "asked to end after 11 s" and not is_running(
        items["endless"]["figures"]["child"]
    )
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| 2 passed, 0 failed, 0 skipped |" in table and "- **broken failed**: ValueError: no such kernel" in table
    assert table.strip() in capsys.readouterr().out

    # Another part, later, in the same folder
    plan_of(Item("broken", 1, 100.0, fine))
    with pytest.raises(SystemExit, match="1 of 4 items failed"):
        gpu_check.main(["--output_dir", str(tmp_path)])
    again = results(tmp_path)["items"]
    assert again["broken"]["error"] is None and again["endless"] == items["endless"]


@pytest.mark.slow
def test_a_rehearsal_runs_every_item(tmp_path):
    gpu_check.main(["--rehearse", "--output_dir", str(tmp_path)])
    found = results(tmp_path)
    items = found["items"]
    assert list(items) == [item.name for item in gpu_check.plan(gpu_check.PARTS)]
    assert all(item["error"] is None for item in items.values()) and found["about"]["is_rehearsal"]
    assert set(items["step"]["figures"]) == set(TOY_SETTINGS) - {"default + --compile"}
    table = (tmp_path / "gpu_check.md").read_text()
    assert "toy sizes, no result" in table and "failed**" not in table
    assert all(wanted in table for wanted in (">= 3x", "<= 0.5x", "< 1 %", "0 failed"))
    for name in METHODS:
        figures = items[f"method_{name}"]["figures"]
        assert figures["num_steps"] == len(figures["losses"]) == 2 and figures["is_complete"]
        assert figures["profile"]["operators"][0]["ms"] > 0
        assert table.count(f"\n| `{name}` |") == 2, "a line of losses and one of operators"


def test_without_a_gpu_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here.*--rehearse"):
        gpu_check.main(["--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--part 4: expected one of 1, 2, 3"):
        gpu_check.main(["--part", "4"])
    assert not (tmp_path / "out").exists()


def test_an_item_without_time_is_left_out(tmp_path, plan_of, monkeypatch):
    plan_of(Item("gpu_tests", 1, 100.0, fine))
    monkeypatch.setattr(gpu_check, "PART_LIMIT_S", 1.0)
    with pytest.raises(SystemExit, match="2 of 2 items failed"):
        gpu_check.main(["--output_dir", str(tmp_path)])
    assert results(tmp_path)["items"]["gpu_tests"]["error"].startswith("left out")


def test_each_part_brings_what_it_needs():
    planned = [item.name for item in gpu_check.plan(gpu_check.PARTS)]
    assert planned[0] == "machine" and planned.count("corpus") == 1
    for part in (2, 3):
        assert [item.name for item in gpu_check.plan([part])][:2] == ["machine", "corpus"]
    assert gpu_check.PART_LIMIT_S < 4 * 60 and gpu_check.ALL_LIMIT_S < 9 * 60


def test_the_first_settings_compare_at_equal_precision():
    settings = step_settings((96, 96, 96), 8, "bf16")
    naive, default = settings[:2]
    assert (naive.name, naive.precision, naive.is_naive, naive.attention) == (NAIVE, "bf16", True, "monai")
    assert (default.name, default.precision, default.is_naive) == (DEFAULT, "bf16", False) and default.fused_optimizer
    assert default.channels_last and default.cudnn_benchmark, "as main_ddp.py runs on a GPU"
    assert {setting.precision for setting in settings if setting.name == FP32} == {"fp32"}
    assert sum(setting.is_compiled for setting in settings) == 1
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names) and set(TOY_SETTINGS) <= set(names)


def test_figures_of_another_commit_or_card_are_not_kept(tmp_path):
    path = tmp_path / "gpu_check.json"
    assert gpu_check.earlier_items(path, ABOUT) == {}
    path.write_text(json.dumps({"about": ABOUT, "items": {"step": {}}}))
    assert gpu_check.earlier_items(path, ABOUT | {"date": "2026-01-02"}) == {"step": {}}
    for changed in ({"commit": "f"}, {"device": "another card"}, {"is_rehearsal": True}):
        assert gpu_check.earlier_items(path, ABOUT | changed) == {}


def test_the_table_holds_ratios_and_what_is_missing_is_left_out():
    naive, ours = {"step_ms": 2000.0, "reserved_gb": 90.0}, {"step_ms": 500.0, "reserved_gb": 30.0}
    sizes = {"roi": [96, 96, 96], "num_pairs": 8, "precision": "bf16"}
    step = {NAIVE: sizes | naive, DEFAULT: sizes | ours, FP32: sizes | {"error": "out of memory"}}
    item = {"part": 1, "seconds": 1.0, "error": f"RuntimeError: {FP32}: out of memory", "figures": step}
    text = markdown({"about": ABOUT, "items": {"step": item}})
    assert text.startswith("2026-01-01, commit 0123456, card, PyTorch 2.11, CUDA 12.8, Python 3.12, 16 cores: `bash")
    assert "| 500 ms | 2000 ms, MONAI's form, eager, bf16 | 4.00x | >= 3x |" in text
    assert "| its memory | 30.0 GB | 90.0 GB | 0.33x | <= 0.5x |" in text
    assert "samples/s" not in text and text.endswith(f"- **step failed**: RuntimeError: {FP32}: out of memory")
    alone = markdown({"about": ABOUT, "items": {"step": item | {"figures": {DEFAULT: sizes | ours}}}})
    assert f"| 500 ms | {NAIVE} did not run |" in alone


def test_losses_of_both_ends_are_means_and_the_first_period_does_not_count_for_speed():
    losses, speeds = [4.0, 3.0, 9.0, 2.0, 1.0], [0.1, 5.0, 5.0, 5.0, 5.0]
    lines = [
        {"step": 10 * number, "loss": loss, "samples_per_s": speed, "data_wait_share": 0.5 / number}
        for number, loss, speed in zip(range(1, 6), losses, speeds)
    ]
    found = run_figures(lines)
    assert (found["loss_first"], found["loss_last"], found["samples_per_s"], found["num_steps"]) == (3.5, 1.5, 5.0, 50)
    assert found["data_wait_share"] < 0.5


def test_a_profile_names_the_costliest_operators_of_a_step():
    matrix = torch.rand(1000, 1000)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            (matrix @ matrix).sum()

    found = step_profile(train, torch.device("cpu"), 4)
    first = found["operators"][0]
    assert first["name"] == "aten::mm" and first["calls"] == 1 and 0.5 < first["share"] <= 1
    assert first["ms"] < found["operators_ms"] <= found["step_ms"]
