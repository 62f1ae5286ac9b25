"""Phantom MR: signals follow the equations, noise is Rician, scales are arbitrary, and files repeat themselves."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.images import CT
from datasets.ct.mr import read_mr
from datasets.ct.nifti import read_label
from datasets.phantom.cases import PhantomCase, case_files, write_case
from datasets.phantom.magnetic import BIAS, SEQUENCES, bias_field, list_mr, measured, render_mr, tissue_signals
from scripts.make_phantom_dataset import main


def signals(weighting: str, seed: int = 0) -> dict[str, float]:
    return tissue_signals(np.random.default_rng(seed), *SEQUENCES[weighting])


@pytest.mark.parametrize("seed", range(5))
def test_contrast_is_that_of_the_weighting(seed):
    t1, t2 = signals("t1", seed), signals("t2", seed)
    assert t1["fat"] > t1["liver"] > t1["urine"] and t1["liver"] > t1["lung"]
    assert t2["urine"] > t2["spleen"] > t2["liver"] and t2["bile"] > t2["muscle"]
    assert signals("t1", seed) == t1 and t1["liver"] != signals("t1", seed + 100)["liver"]


def test_noise_without_signal_is_that_of_a_magnitude():
    """The mean of a Rayleigh distribution is sqrt(pi / 2) of its channels' deviation, its own deviation 0.655."""
    values = measured(np.zeros((60, 60, 60), np.float32), np.random.default_rng(0))
    assert values.std() / values.mean() == pytest.approx(0.655 / np.sqrt(np.pi / 2), rel=0.02)
    maxima = {round(float(measured(np.ones((8, 8, 8), np.float32), np.random.default_rng(s)).max())) for s in range(6)}
    assert max(maxima) > 2 * min(maxima)  # scales are arbitrary


def test_the_bias_field_is_smooth_and_bounded():
    field = np.log(bias_field((20, 24, 28), np.random.default_rng(1)))
    assert np.abs(field).max() == pytest.approx(BIAS, rel=1e-3)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.15


def test_two_contrasts_of_one_patient_in_one_file(tmp_path):
    case = replace(list_mr(0, 1, seed=3, num_channels=2)[0], coarsen=3.5)
    assert write_case(tmp_path, case, draw=render_mr) and not write_case(tmp_path, case, draw=render_mr)
    files = case_files(tmp_path, case)
    image, label = nib.load(files["image"]), read_label(files["label"])
    assert image.shape[3] == 2 and len(np.unique(label.array)) > 3
    assert json.loads(files["landmarks"].read_text())["modality"] == "mr t1 t2"
    one = render_mr(replace(case, weightings=("t1",)))
    both = render_mr(case)
    assert np.array_equal(one.hu, both.hu[..., 0]) and np.array_equal(one.label, both.label)
    correlation = np.corrcoef(*(both.hu[both.label > 0].T))[0, 1]
    assert correlation < 0.9  # the channels do not say the same
    with pytest.raises(ValueError, match=r"this case is mr t1 t2, expected ct \(--modality\)"):
        write_case(tmp_path, PhantomCase(case.name, 3, 1, True, coarsen=3.5))
    assert PhantomCase("a", 0, 1, True).modality == CT


def test_one_contrast_is_a_volume_that_maps(tmp_path):
    case = replace(list_mr(1, 0, seed=3)[0], coarsen=3.5)
    assert list_mr(2, 0, seed=3)[1].weightings != case.weightings
    write_case(tmp_path, case, draw=render_mr)
    volume = read_mr(case_files(tmp_path, case)["image"])
    assert volume.array.std() > 200


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    for words, message in (
        (["--modality", "mr", "--radiographs"], "--radiographs are projections of CT"),
        (["--num_channels", "2"], "--num_channels 2 is of MR: add --modality mr"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--out_dir", str(tmp_path), *words])
