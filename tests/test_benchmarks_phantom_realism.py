"""Phantoms beside real CT: figures of volumes whose answer is known, and the whole benchmark on a fake real scan."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks import phantom_realism as benchmark
from benchmarks.real_ct_matching import SCANS
from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import Volume, write_nifti
from datasets.phantom.cases import GENERATOR

AFFINE = np.array([[0, 0, -3.0, 90], [0, -3.0, 0, 90], [3.0, 0, 0, 0], [0, 0, 0, 1]])


def soft_cylinder(sigma_vox: float, std_hu: float) -> Volume:
    """A cylinder of soft tissue with a rim of fat, 120 mm wide, in air; noise smoothed in the slice."""
    rng = np.random.default_rng(0)
    h, w = np.meshgrid(*(np.arange(60) - 29.5,) * 2, indexing="ij")
    radius = 3 * np.hypot(h, w)
    hu = np.select([radius < 50, radius < 60], [40.0, -100.0], -1000.0)
    noise = gaussian_filter(rng.standard_normal((20, 60, 60)), (0, sigma_vox, sigma_vox))
    hu = np.repeat(hu[None], 20, axis=0) + noise * (std_hu / noise.std())
    return Volume(hu.round().astype(np.int16), AFFINE, "cylinder")


def test_noise_is_measured():
    white, smooth = (benchmark.noise_figures(soft_cylinder(sigma, 12.0)) for sigma in (0.0, 0.8))
    assert white["noise_hu"] == pytest.approx(12, rel=0.2) and abs(white["noise_lag1"]) < 0.08
    assert smooth["noise_lag1"] > 0.4


def test_body_is_measured():
    found = benchmark.body_figures(soft_cylinder(0.0, 5.0))
    assert found["width_mm"] == pytest.approx(120, abs=6) and found["depth_mm"] == pytest.approx(120, abs=6)
    assert found["soft"] == pytest.approx(50**2 / 60**2, abs=0.05) and found["fat"] == pytest.approx(0.3, abs=0.05)


def test_a_phantom_is_turned_as_files_are_read():
    volume, label, _ = benchmark.make_phantom(0, 4, 5.0)
    spine = np.argwhere((volume.array > 300) & (label == 0))
    liver, spleen = (np.argwhere(label == value).mean(axis=0) for value in (1, 3))
    assert spine[:, 1].mean() > liver[1], "the spine lies behind"
    assert liver[2] < spleen[2] and index_to_world(volume.affine, liver)[0] > index_to_world(volume.affine, spleen)[0]


def test_benchmark_compares_and_draws(tmp_path):
    write_nifti(tmp_path / f"{SCANS[0]}.nii.gz", soft_cylinder(0.0, 10.0).array, AFFINE)
    command = ["--ct_dir", str(tmp_path), "--num_phantoms", "2", "--coarsen", "4", "--output", str(tmp_path / "o.json")]
    benchmark.main([*command, "--picture", str(tmp_path / "o.png"), "--markdown", str(tmp_path / "o.md")])
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["generator"] == GENERATOR and set(found["real"]) == {SCANS[0]} and len(found["phantoms"]) == 2
    low, middle, high = found["range"]["fat"]
    assert 0 < low <= middle <= high < 1
    assert Image.open(tmp_path / "o.png").size == (5 * 310, 2 * 230)
    assert "| width_mm |" in (tmp_path / "o.md").read_text()
