"""Masks of single organs become one label map a case, which create_json.py finds with its names."""

import json

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.nifti import read_ct, read_label_of
from datasets.lists.data_list import DataListError, load_data_list
from datasets.lists.search import search
from scripts import create_json, merge_organs

AFFINE = np.array([[0, 0, 1.5, -20], [-1.2, 0, 0, 30], [0, 2.0, 0, 5], [0, 0, 0, 1.0]])
SHAPE = (9, 8, 7)


def box(*ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(*limits) for limits in ranges)] = 1
    return mask


LIVER, GALLBLADDER, RIB = box((0, 5), (0, 8), (0, 7)), box((4, 6), (2, 4), (2, 4)), box((8, 9), (0, 8), (0, 1))


def put(path, array, affine=AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def put_case(folder, masks) -> None:
    put(folder / "ct.nii.gz", np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16))
    for name, mask in masks.items():
        put(folder / "segmentations" / f"{name}.nii.gz", mask)


def label_of(folder) -> np.ndarray:
    """The label map in the file's own axes; it lies on its image."""
    read_label_of(read_ct(folder / "ct.nii.gz"), folder / "label.nii.gz")
    return np.asarray(nib.load(folder / "label.nii.gz").dataobj)


def run(data_dir, *words: str) -> None:
    merge_organs.main(["--data_dir", str(data_dir), "--num_workers", "2", *words])


def test_masks_of_both_data_sets_get_flare22_values(tmp_path, capsys):
    put_case(tmp_path / "s0001", {"liver": LIVER, "gallbladder": GALLBLADDER, "rib_left_1": RIB})
    put_case(tmp_path / "BDMAP_00000001", {"postcava": RIB, "gall_bladder": GALLBLADDER, "stomach": np.zeros_like(RIB)})
    assert "6 masks beside a ct (of single organs? scripts/merge_organs.py" in search(tmp_path).describe_not_taken()
    run(tmp_path)
    told = capsys.readouterr().out
    expected = np.where(GALLBLADDER == 1, 9, LIVER)
    np.testing.assert_array_equal(label_of(tmp_path / "s0001"), expected)
    np.testing.assert_array_equal(label_of(tmp_path / "BDMAP_00000001"), RIB * 6 + GALLBLADDER * 9)
    assert "2 label maps of 13 organs written, 0 were there and kept, 0 cases failed" in told
    assert "organs left out (cases): rib_left_1 (1)\n" in told
    assert "background there (cases): aorta (2), " in told
    assert "overlaps, the smaller organ is kept (voxels): gallbladder over liver (4)\n" in told

    create_json.main(["--data_dir", str(tmp_path), "--output", str(tmp_path / "list.json"), "--cases", "labelled"])
    cases = load_data_list(tmp_path / "list.json", tmp_path)
    assert {case.name: case.label.name for case in cases} == {
        "s0001": "label.nii.gz", "BDMAP_00000001": "label.nii.gz",
    }  # fmt: skip
    assert json.loads((tmp_path / "list.json").read_text())["labels"]["9"] == "gallbladder"
    assert "merge_organs" not in search(tmp_path).describe_not_taken()


def test_chosen_organs_may_share_a_value(tmp_path):
    put_case(tmp_path / "a", {"rib_left_1": RIB, "rib_left_2": GALLBLADDER, "liver": LIVER})
    run(tmp_path, "--organs", "rib_left_1=300", "rib_left_2=300", "liver=2")
    expected = np.where((RIB == 1) | (GALLBLADDER == 1), 300, LIVER.astype(np.int16) * 2)
    np.testing.assert_array_equal(label_of(tmp_path / "a"), expected)
    labels = json.loads((tmp_path / "dataset.json").read_text())["labels"]
    assert labels == {"0": "background", "2": "liver", "300": "rib left 1"}


def test_finished_cases_are_kept_until_overwrite(tmp_path, capsys):
    put_case(tmp_path / "a", {"liver": LIVER})
    run(tmp_path)
    put(tmp_path / "a/segmentations/liver.nii.gz", RIB)
    run(tmp_path)
    np.testing.assert_array_equal(label_of(tmp_path / "a"), LIVER)
    assert "0 label maps of 13 organs written, 1 were there and kept" in capsys.readouterr().out
    run(tmp_path, "--overwrite")
    np.testing.assert_array_equal(label_of(tmp_path / "a"), RIB)
    with pytest.raises(DataListError, match="dataset.json: names the label values .* asks for .*'liver'.*--overwrite"):
        run(tmp_path, "--organs", "liver=4")


def test_cases_that_cannot_be_joined_are_named(tmp_path, capsys):
    put_case(tmp_path / "fine", {"liver": LIVER})
    put_case(tmp_path / "shifted", {"liver": LIVER})
    put(tmp_path / "shifted/segmentations/spleen.nii.gz", RIB, AFFINE + np.array([[0, 0, 0, 40]] + [[0] * 4] * 3))
    put_case(tmp_path / "many", {"liver": LIVER + GALLBLADDER})
    put_case(tmp_path / "none", {"rib_left_1": RIB})
    run(tmp_path)
    told = capsys.readouterr()
    assert "1 label maps of 13 organs written, 0 were there and kept, 3 cases failed" in told.out
    assert "spleen.nii.gz: label lies 40.0 mm beside its image" in told.err
    assert "liver.nii.gz: holds the values [1, 2], expected the mask of one organ" in told.err
    assert "none/ct.nii.gz: none of its 1 masks is of --organs" in told.err
    assert [folder.parent.name for folder in tmp_path.glob("*/label.nii.gz")] == ["fine"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["liver"], "--organs liver: expected FILE=VALUE"),
        (["liver=0"], "--organs liver=0: expected FILE=VALUE with a value from 1"),
        (["liver=1.5"], "--organs liver=1.5: expected"),
        (["liver=1", "liver=2"], "--organs: liver has the values 1 and 2"),
    ],
)
def test_wrong_organs(tmp_path, words, reason):
    put_case(tmp_path / "a", {"liver": LIVER})
    with pytest.raises(ValueError, match=reason):
        run(tmp_path, "--organs", *words)
    assert not (tmp_path / "dataset.json").exists()


def test_a_folder_without_masks(tmp_path):
    put(tmp_path / "a" / "ct.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(DataListError, match="no CASE/ct.nii.gz with masks in CASE/segmentations"):
        run(tmp_path)
