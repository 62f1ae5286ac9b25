"""The benchmarks run, what they compare agrees, and their figures are figures; how fast is not tested."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import all as all_benchmarks
from benchmarks import data_wait, layouts, matching, pairing, store_building
from benchmarks.results import HEADER, run_command

pytestmark = pytest.mark.usefixtures("one_thread")
TINY_MATCHING = ["--quick", "--grid", "[32,48,48]", "--num_channels", "8", "--num_points", "12"]
TINY_PAIRING = (
    ["--quick", "--coarsen", "4", "--roi", "32", "--num_channels", "8", "--num_rows", "4"]
    + ["--num_samples", "6", "--num_published", "2"]
)  # fmt: skip


def figures(benchmark, argv: list[str], tmp_path, least: int = 5) -> dict:
    """What a benchmark writes with --output, its times and ratios checked to be positive, `least` or more of them."""
    output = tmp_path / "found.json"
    benchmark.main([*argv, "--output", str(output)])
    found = json.loads(output.read_text())
    checked = [value for name, value in found.items() if name.endswith("wall_s") or name.startswith("speedup")]
    assert len(checked) >= least
    assert all(np.isfinite(value) and value > 0 for value in checked)
    assert all(len(row) == len(HEADER) for row in benchmark.rows(found))
    return found


def test_matching_agrees_with_one_map_per_point(tmp_path):
    found = figures(matching, TINY_MATCHING, tmp_path)
    assert found["agree"] is True
    assert found["same_voxel"] == 1.0
    assert found["score_difference"] < 1e-4
    assert found["fine_shape"] == [8, 16, 24, 24]
    assert found["coarse_shape"] == [8, 8, 3, 3]


def test_matching_stops_when_the_ways_disagree(monkeypatch):
    wrong = matching.Place(np.array([0, 0, 0]), -1.0)
    monkeypatch.setattr(matching, "place_by_map", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="disagree"):
        matching.main(TINY_MATCHING)


def test_pairing_gives_the_published_way_s_crops(tmp_path):
    found = figures(pairing, TINY_PAIRING, tmp_path)
    assert found["agree"] is True
    assert found["crop_difference"] < 1e-5


def test_pairing_stops_when_the_crops_differ(monkeypatch):
    right = pairing.place_by_map
    monkeypatch.setattr(pairing, "place_by_map", lambda *given: right(*given)._replace(index=np.array([2, 2, 2])))
    with pytest.raises(RuntimeError, match="differ"):
        pairing.main(TINY_PAIRING)


def test_both_ways_of_building_a_store_write_the_same_volumes(tmp_path, monkeypatch):
    found = figures(store_building, ["--quick", "--num_cases=2", "--num_slices=20"], tmp_path, least=3)
    assert found["mean_difference_hu"] < store_building.MAX_MEAN_DIFFERENCE_HU
    monkeypatch.setattr(store_building, "MAX_MEAN_DIFFERENCE_HU", -1.0)
    with pytest.raises(RuntimeError, match="differ by"):
        store_building.main(["--quick", "--num_cases=2", "--num_slices=20"])


def test_a_real_run_tells_how_long_it_waited_for_data(tmp_path):
    data_wait.main(["--quick", "--device=cpu", "--num_workers=0", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_periods"] == data_wait.PERIODS - 1, "the first one does not count"
    assert 0 < found["data_wait_share"] <= found["data_wait_most"] <= 1 and found["num_workers"] == 0
    assert found["pairs_per_s"] > 0 and found["one_process_pairs_per_s"] > 0
    assert all(len(row) == len(HEADER) for row in data_wait.rows(found))


def test_a_failed_run_is_no_figure():
    words = ["--flags=--no_such_flag=1", "--num_steps=12", "--batch_size=1", "--num_workers=0"]
    flags = data_wait.make_flags().parse_args(words)
    with pytest.raises(RuntimeError, match="main_ddp failed: .*no_such_flag"):
        run_command("main_ddp", data_wait.run_words(Path("nowhere"), flags))


def test_all_prints_one_table_and_saves_every_figure(tmp_path, capsys):
    all_benchmarks.main(["--quick", "--only", "[store_building]", "--output", str(tmp_path / "all.json")])
    shown = capsys.readouterr().out.splitlines()
    assert any([cell.strip() for cell in line.strip("|").split("|")] == list(HEADER) for line in shown)
    assert any(line.startswith("| building the store") and ">= 2x" in line for line in shown)
    assert set(json.loads((tmp_path / "all.json").read_text())) == {"store_building", "commit"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--only names nonsense"):
        all_benchmarks.main(["--only", "[nonsense]"])


def test_layouts_are_compared_on_equal_outputs(capsys):
    layouts.main(["--quick", "--device=cpu", "--num_threads=1"])
    printed = capsys.readouterr().out
    assert all(f"| {way} |" in printed for way in layouts.WAYS) and "20 instance norms, fp32 on cpu" in printed
    found = layouts.run(layouts.make_flags().parse_args(["--quick", "--device=cpu", "--num_threads=1"]))
    assert found["largest_difference"] < 1e-3
