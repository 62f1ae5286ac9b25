"""Phantom radiographs: exact projections of attenuation, masks where organs project, files that repeat themselves."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from datasets.ct.radiograph import read_mask_of, read_radiograph
from datasets.lists.label_classes import read_classes
from datasets.lists.search import find_cases
from datasets.phantom.radiographs import (
    LUNGS,
    MU_WATER_PER_MM,
    detect,
    develop,
    integrate_attenuation,
    list_radiographs,
    project_labels,
    to_picture,
    write_radiograph,
    write_radiographs,
)
from scripts.make_phantom_dataset import main

AIR_HU = -1000.0


def test_a_box_of_known_hu_gives_its_exact_integral():
    hu = np.full((6, 10, 7), AIR_HU)
    hu[1:4, 2:7, 3:5] = 500.0
    hu[2, 8, 3] = -2000.0  # padding attenuates nothing
    integral = integrate_attenuation(hu, depth_mm=3.0)
    expected = np.zeros((6, 7))
    expected[1:4, 3:5] = MU_WATER_PER_MM * 1.5 * 5 * 3.0
    np.testing.assert_allclose(integral, expected, rtol=1e-12)


def test_thickness_counts_and_mean_hu_does_not():
    """20 mm of water in air and 10 mm of bone of 1000 HU in air attenuate alike; their mean HU differ from lung's."""
    hu = np.full((2, 20, 1), AIR_HU)
    hu[0, :10], hu[1, :5] = 0.0, 1000.0
    water, bone = integrate_attenuation(hu, depth_mm=2.0)[:, 0]
    assert water == pytest.approx(bone) and water == pytest.approx(20 * MU_WATER_PER_MM)


def test_the_organ_with_the_longest_path_wins_beyond_5_mm():
    label = np.zeros((5, 10, 1), np.uint8)
    label[0, :4], label[0, 5:] = 1, 6  # 8 mm and 10 mm
    label[1, :6], label[1, 6:] = 1, 6  # 12 mm and 8 mm
    label[2, :2] = 13  # 4 mm are too few
    label[3, 4:7] = 13  # 6 mm
    assert project_labels(label, depth_mm=2.0)[:, 0].tolist() == [6, 1, 0, 13, 0]


def test_the_detector_counts_quanta():
    integral = np.full((200, 200), 2.0)
    signal = detect(integral, 1e4, np.random.default_rng(0))
    assert signal.mean() == pytest.approx(2.0, abs=0.01)
    assert signal.std() == pytest.approx(1 / np.sqrt(1e4 * np.exp(-2)), rel=0.05)
    assert np.isfinite(detect(np.full((3, 3), 100.0), 1e4, np.random.default_rng(0))).all()


def test_bone_is_bright_air_is_black_and_lung_is_dark():
    hu = np.full((120, 60, 120), AIR_HU)
    hu[20:100, 10:50, 10:110] = 40.0
    hu[30:50, 15:45, 40:80] = -850.0
    hu[70:74, 20:26, 40:80] = 900.0
    shown = develop(integrate_attenuation(hu, 4.0), pixel_mm=2.0)
    air, tissue, lung, bone = shown[5, 60], shown[85, 60], shown[40, 60], shown[72, 60]
    assert 0 == air <= lung < tissue < bone <= 1


def test_head_on_top_and_the_patients_right_on_the_left():
    plane = np.zeros((3, 5))
    plane[2, 4] = 1  # right (+x), head (+z)
    assert to_picture(plane).shape == (5, 3) and to_picture(plane)[0, 0] == 1


def small(num_unlabelled: int = 0, num_labelled: int = 2, seed: int = 3):
    return [replace(case, coarsen=4.0) for case in list_radiographs(num_unlabelled, num_labelled, seed)]


def test_same_seed_same_bytes(tmp_path):
    case = small()[0]
    for folder in "ab":
        assert write_radiograph(tmp_path / folder, case)
    assert not write_radiograph(tmp_path / "a", case)
    write_radiograph(tmp_path / "c", replace(case, seed=4))
    contents = [(tmp_path / folder / "images" / f"{case.name}.png").read_bytes() for folder in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_a_data_set_is_read_as_it_was_meant(tmp_path):
    cases = small(num_unlabelled=1)
    assert write_radiographs(tmp_path, cases, num_workers=0) == 3
    found = find_cases(tmp_path)
    assert [(case.name, case.label is not None) for case in found] == [
        ("Xray_00001", False), ("Xray_Tr_0001", True), ("Xray_Tr_0002", True)
    ]  # fmt: skip
    assert read_classes(tmp_path / "dataset.json").names[1:][-1] == "lungs"
    chest, abdomen = (read_radiograph(case.image) for case in found[1:])
    masks = [read_mask_of(image, case.label).array[0] for image, case in zip((chest, abdomen), found[1:])]
    assert chest.spacing_mm == pytest.approx((1.0, 8.0, 8.0), rel=1e-3)
    assert [image.bits for image in (chest, abdomen)] == [16, 8]
    assert int(chest.array.max()) + 32768 == 4095 and int(abdomen.array.max()) + 128 == 255
    lungs = masks[0] == LUNGS
    rows, columns = np.nonzero(lungs)
    height, width = lungs.shape
    assert 0.1 < lungs.mean() < 0.5 and rows.mean() < height / 2  # above the diaphragm
    assert (columns < width / 2).any() and (columns > width / 2).any()
    liver_columns = np.nonzero(masks[1] == 1)[1]
    assert liver_columns.mean() < width / 2  # the patient's right
    grey = np.asarray(Image.open(found[1].image)).astype(float)
    body = grey > 0.05 * grey.max()
    assert grey[lungs].mean() < grey[body & ~lungs].mean()  # lungs are dark


def test_the_script_refuses_what_radiographs_do_not_have(tmp_path):
    with pytest.raises(ValueError, match="--save_atlas_map"):
        main(["--out_dir", str(tmp_path), "--radiographs", "--save_atlas_map"])
