"""The benchmark on real CT: where points land, which levels two scans share, and the whole of it with tiny weights."""

import json

import numpy as np
import pytest
import torch

from benchmarks import real_ct_matching as benchmark
from datasets.lists.data_list import Case, load_data_list, write_data_list
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from scripts import train_sam
from tests.sam_fakes import compact_options, save_embedder
from tests.shared import shared_file

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(depth: int, lung_from: int, lowest_mm: float) -> benchmark.Labelled:
    """2 mm voxels; the left lung fills the slices from `lung_from` on, the cord every slice."""
    array = np.zeros((depth, 6, 20), dtype=np.uint8)
    array[lung_from:, :, 12:] = 2
    array[:, :, 2:4] = 1
    affine = np.array([[0, 0, -2.0, 5], [0, -2.0, 0, 7], [2.0, 0, 0, lowest_mm], [0, 0, 0, 1]])
    return benchmark.Labelled(array, affine, {1: "spinal cord", 2: "left lung"})


def test_distance_to_an_organ_is_zero_inside_and_infinite_outside_of_the_scan():
    label = labelled(30, 10, -100.0)

    def at(d: float, h: float, w: float) -> np.ndarray:
        return (label.affine @ [d, h, w, 1])[:3]

    points = np.stack([at(12, 3, 15), at(4, 3, 15), at(20, 3, 7), at(40, 3, 15), [np.nan] * 3])
    np.testing.assert_allclose(label.distance_mm("left lung", points), [0, 12, 10, np.inf, np.inf], atol=1e-6)
    found = benchmark.landing(label.distance_mm("left lung", points), np.array([1.0, 2, 3, 4, np.nan]))
    assert found == {"num_points": 5, "in_organ": 0.2, "near_organ": 0.4, "median_cycle_mm": 2.5}


def test_levels_are_those_that_both_scans_show():
    """Heights count from the lungs' lower end, whatever the world coordinates."""
    low, high = labelled(60, 50, 300.0), labelled(80, 10, -900.0)
    levels = benchmark.shared_levels({"low": low, "high": high})
    assert levels == pytest.approx((-20 + benchmark.LEVEL_MARGIN_MM, 18 - benchmark.LEVEL_MARGIN_MM))
    for label in (low, high):
        points = benchmark.organ_points(label, "spinal cord", levels, 1000)
        height = points[:, 2] - label.lowest_lung_mm
        assert height.min() >= -15 and height.max() <= 13 and len(np.unique(height)) == 14
        assert label.distance_mm("spinal cord", points).max() < benchmark.INSIDE_MM
    assert len(benchmark.organ_points(low, "spinal cord", levels, 7)) == 7


def test_means_weigh_organs_alike():
    rows = [{"num_points": 90, "in_organ": 1.0, "of_kept": None}, {"num_points": 10, "in_organ": 0.0, "of_kept": 0.4}]
    assert benchmark.mean_of(rows) == {"num_points": 100, "in_organ": 0.5, "of_kept": 0.4}


def test_absent_scans_are_skipped(tmp_path, capsys):
    benchmark.main(["--ct_dir", str(tmp_path), "--checkpoint_files", "sam.pth", "--output", str(tmp_path / "out.json")])
    assert "skipped: no real CT" in capsys.readouterr().out and not (tmp_path / "out.json").exists()


def test_training_list_joins_phantoms_and_scans(tmp_path, capsys):
    ct_dir, phantoms = tmp_path / "ct", tmp_path / "phantom"
    for folder, names in ((ct_dir, benchmark.SCANS), (phantoms, ("Case_00001", "Case_00002"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.nii.gz").touch()
    cases = [Case(name, phantoms / f"{name}.nii.gz") for name in ("Case_00001", "Case_00002")]
    write_data_list(tmp_path / "phantom.json", phantoms, cases[:1], cases[1:])
    command = ["--ct_dir", str(ct_dir), "--write_list", str(tmp_path / "both.json")]
    benchmark.main([*command, "--data_dir", str(phantoms), "--json_list", str(tmp_path / "phantom.json")])
    training = load_data_list(tmp_path / "both.json", phantoms)
    assert [case.name for case in training] == ["Case_00001", *benchmark.SCANS]
    assert [case.name for case in load_data_list(tmp_path / "both.json", phantoms, "validation")] == ["Case_00002"]
    words = capsys.readouterr().out.split()
    assert words[:2] == ["python", "scripts/train_sam.py"]
    assert train_sam.make_flags().parse_args(words[2:]).json_list == str(tmp_path / "both.json")


def test_weights_are_measured_on_the_scans(tmp_path, capsys):
    ct_dir = shared_file("ct", f"{benchmark.ABDOMEN}_label_names.json").parent
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(tmp_path / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    command = ["--quick", "--ct_dir", str(ct_dir), "--device", "cpu", "--num_points", "8", "--num_organ_points", "4"]
    output = tmp_path / "real.json"
    benchmark.main([*command, "--checkpoint_files", f"tiny={tmp_path / 'sam.pth'}", "--output", str(output)])
    found = json.loads(output.read_text())["weights"]["tiny"]
    assert len(found["cycle"]) == 12 and len(found["across"]) == 6 and len(found["around"]) == 3
    for organs in found["around"].values():
        assert set(organs) == {"mean", *benchmark.UPPER_ORGANS}
        assert all(row["num_points"] == 4 for name, row in organs.items() if name != "mean")
    assert "| spinal cord, chest_2mm to abdomen_pelvis_3mm |" in capsys.readouterr().out
