"""Labels from phantoms: the whole benchmark on a phantom in the real abdomen's place, with tiny weights."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import labels_from_phantoms as benchmark
from benchmarks.real_ct_matching import ABDOMEN
from datasets.ct.nifti import read_label, write_nifti
from datasets.lists.label_classes import FLARE22
from datasets.phantom.cases import GENERATOR, PhantomCase, list_cases, render

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ct_dir(tmp_path_factory):
    """A phantom with the real abdomen's file names and label names, but without a spleen in the label."""
    folder = tmp_path_factory.mktemp("ct")
    done = render(PhantomCase("real", 5, 1, True, range_name="abdomen", coarsen=4.0))
    affine = done.affine @ np.eye(4)[:, [2, 1, 0, 3]]
    write_nifti(folder / f"{ABDOMEN}.nii.gz", done.hu.transpose(2, 1, 0).round().astype(np.int16), affine)
    label = done.label.transpose(2, 1, 0).copy()
    label[label == FLARE22.index("spleen") + 1] = 0
    write_nifti(folder / f"{ABDOMEN}_label.nii.gz", label + 20 * (label > 0).astype(np.uint8), affine)
    names = {value + 20: benchmark.OTHER_NAMES.get(name, name) for value, name in enumerate(FLARE22, start=1)}
    (folder / f"{ABDOMEN}_label_names.json").write_text(json.dumps(names))
    return folder


def test_other_names_become_flare22_values(ct_dir):
    truth = benchmark.read_truth(ct_dir)
    stored = read_label(ct_dir / f"{ABDOMEN}_label.nii.gz").array
    assert np.array_equal(truth.array, np.where(stored > 0, stored - 20, 0))
    assert {2, 13, 6, 7, 8} <= set(np.unique(truth.array))


def test_benchmark_runs_and_a_second_run_reuses_its_stages(ct_dir, tmp_path, monkeypatch, capsys):
    small = [dataclasses.replace(case, coarsen=4.0, range_name="abdomen") for case in list_cases(0, 4, 0)]
    monkeypatch.setattr("scripts.make_phantom_dataset.list_cases", lambda *_: small)
    monkeypatch.setattr("benchmarks.labels_from_phantoms.available_cpus", lambda: 1)
    command = ["--quick", "--ct_dir", str(ct_dir), "--work_dir", str(tmp_path / "work"), "--num_threads", "1"]
    benchmark.main([*command, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["generator"] == GENERATOR and found["num_phantoms"] == 4 and found["commit"]
    dice = found["dice"]["seed0"]
    assert "spleen" not in dice and len(dice) == 13, "organs that the scan does not show are left out"
    assert dice["mean"] == pytest.approx(np.mean([value for organ, value in dice.items() if organ != "mean"]))
    assert 0 < dice["liver"] < 1
    weights = tmp_path / "work" / f"generator{GENERATOR}" / "sam_seed0" / "checkpoint_best.pth"
    stamp = weights.stat().st_mtime_ns
    capsys.readouterr()
    benchmark.main([*command, "--output", str(tmp_path / "again.json")])
    assert weights.stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "again.json").read_text())["dice"] == found["dice"]
    assert "| liver |" in capsys.readouterr().out


def test_what_ships_is_judged_alone_and_together(ct_dir, tmp_path, monkeypatch):
    references, classes = benchmark.open_phantoms()
    monkeypatch.setattr(benchmark, "open_phantoms", lambda: (references[:2], classes))
    benchmark.main(["--shipped", "--ct_dir", str(ct_dir), "--output", str(tmp_path / "found.json")])
    dice = json.loads((tmp_path / "found.json").read_text())["dice"]
    assert list(dice) == ["phantoms' labels", "network", "both"] and all(len(found) == 13 for found in dice.values())
    assert dice["both"]["mean"] > dice["phantoms' labels"]["mean"] and dice["both"]["liver"] > 0.7
    assert dice["network"]["liver"] > 0.5, "a phantom, as the network knows them"


def test_without_real_ct_it_is_skipped(tmp_path, capsys):
    benchmark.main(["--ct_dir", str(tmp_path), "--output", str(tmp_path / "out.json")])
    assert "skipped: no real CT" in capsys.readouterr().out and not (tmp_path / "out.json").exists()
