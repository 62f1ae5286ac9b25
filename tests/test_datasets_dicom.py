"""Folders of DICOM slices: HU and places as in NIfTI, and errors for folders that hold no even, straight CT stack."""

import itertools
import locale
import os
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.file_grid import read_file_grid
from datasets.ct.formats import files_of
from datasets.ct.itk_files import USERS_LOCALE
from datasets.ct.nifti import CTReadError, read_ct, read_label_of
from datasets.lists.data_list import Case
from datasets.store.volumes import VolumeStore, build_store
from tests.itk_writer import INTERCEPT, SLOPE, write_itk, write_series

AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])  # LPS


def hounsfield(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 1000, size=shape).astype(np.int16) * 2


def as_nifti(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)
    return read_ct(path)


def right_handed() -> list[np.ndarray]:
    """All 24 ways in which a stack's axes may run through the patient, each turned a little."""
    angle = np.deg2rad(12)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    found = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        axes = np.eye(3)[:, list(order)] * signs
        if np.linalg.det(axes) > 0:
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = turn @ axes * (0.8, 0.9, 2.5), (10, -20, 30)
            found.append(affine)
    return found


def test_every_orientation_is_read_as_from_nifti(tmp_path):
    array = hounsfield((6, 7, 4))
    for number, affine in enumerate(right_handed()):
        wanted = as_nifti(tmp_path / "ct.nii", array, affine)
        volume = read_ct(write_series(tmp_path / f"series{number}", array, affine))
        np.testing.assert_array_equal(volume.array, wanted.array)
        np.testing.assert_allclose(volume.affine, wanted.affine, atol=1e-4)
        assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path):
    wanted = as_nifti(tmp_path / "ct.nii", hounsfield(), AFFINE)
    folder = write_series(
        tmp_path / "series",
        hounsfield(),
        AFFINE,
        tags_of=lambda number: {SLOPE: "2", INTERCEPT: "-1024"} if number % 2 else {SLOPE: "1", INTERCEPT: "0"},
    )
    np.testing.assert_array_equal(read_ct(folder).array, wanted.array)


def test_what_is_no_dicom_is_left_out_and_counted(tmp_path, caplog):
    folder = write_series(tmp_path / "series", hounsfield(), AFFINE)
    plain = read_ct(folder)
    assert not caplog.text
    for name in ("readme.txt", ".hidden", "DICOMDIR", "empty"):
        (folder / name).write_bytes(b"" if name == "empty" else bytes(128) + b"DICM" * (name == "DICOMDIR"))
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    np.testing.assert_array_equal(read_ct(folder).array, plain.array)
    assert "series: 4 of 12 files are no DICOM and left out" in caplog.text
    assert len(files_of(folder)) == 8


def test_labels_and_grids_of_a_series(tmp_path):
    folder = write_series(tmp_path / "series", hounsfield(), AFFINE)
    labels = (hounsfield() > 500).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "label.nii.gz")
    image = read_ct(folder)
    np.testing.assert_array_equal(read_label_of(image, tmp_path / "label.nii.gz").array, labels.transpose(2, 1, 0))
    grid = read_file_grid(folder)
    assert grid.canonical()[0] == image.shape
    np.testing.assert_allclose(grid.canonical()[1], image.affine)


def test_a_stored_case_follows_all_of_its_files(tmp_path):
    """A changed slice, or changed voxels beside an unchanged header, make the case anew."""
    folder = write_series(tmp_path / "series", hounsfield(), AFFINE)
    meta = write_itk(tmp_path / "ct.mhd", hounsfield(), AFFINE)
    cases = [Case("series", folder), Case("meta", meta)]

    def built() -> set[str]:
        return set(build_store(cases, tmp_path / "store", progress=False).built)

    assert built() == {"series", "meta"} and built() == set()
    meta.with_suffix(".raw").write_bytes((hounsfield() + 2).tobytes(order="F"))
    assert built() == {"meta"}
    write_series(folder, hounsfield() + 4, AFFINE, skip=range(7))
    assert built() == {"series"}
    store = VolumeStore(tmp_path / "store")
    assert np.array_equal(store.read("meta").array, read_ct(meta).array)
    assert np.array_equal(store.read("series").array, read_ct(folder).array)


def two_series(folder):
    write_series(folder, hounsfield(), AFFINE)
    tags = {"0020|000e": "9.8.7", "0008|103e": "LUNG"}
    write_series(folder, hounsfield((6, 7, 3)), AFFINE, tags)


def other_modality(folder):
    write_series(folder, hounsfield(), AFFINE, {"0008|0060": "MR"})


def no_modality(folder):
    write_series(folder, hounsfield(), AFFINE, {"0008|0060": ""})


def missing_slice(folder):
    write_series(folder, hounsfield(), AFFINE, skip=(3,))


def missing_slice_near_the_end(folder):
    write_series(folder, hounsfield((4, 4, 60)), AFFINE, skip=(58,))


def growing_gaps(folder):
    write_series(
        folder, hounsfield((4, 4, 40)), AFFINE, position_of=lambda number, place: place + [0, 0, 0.002 * number**2]
    )


def two_phases(folder):
    write_series(
        folder, hounsfield(), AFFINE, position_of=lambda number, place: place * [1, 1, 0] + [0, 0, number // 2]
    )


def tilted(folder):
    write_series(folder, hounsfield(), AFFINE, position_of=lambda number, place: place + [0, 0.6 * number, 0])


def other_direction(folder):
    write_series(
        folder, hounsfield(), AFFINE, tags_of=lambda number: {"0020|0037": "1\\0\\0\\0\\0\\1"} if number else {}
    )


def other_size(folder):
    write_series(folder, hounsfield(), AFFINE, skip=(7,))
    write_series(folder, hounsfield((5, 5, 8)), AFFINE, skip=range(7))


def single_slice(folder):
    write_series(folder, hounsfield(), AFFINE, skip=range(1, 8))


def truncated_slice(folder):
    write_series(folder, hounsfield((60, 60, 8)), AFFINE)
    slices = sorted(folder.iterdir())
    slices[4].write_bytes(slices[4].read_bytes()[:-2000])


def lost_slice(folder):
    """At the end of the stack, where no gap would show it."""
    write_series(folder, hounsfield(), AFFINE)
    last = folder / "1.2.3.4_049.dcm"
    last.write_bytes(last.read_bytes()[:100])


def no_dicom(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("a")


def empty(folder):
    folder.mkdir()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (two_series, r"holds 2 DICOM series, expected one.*: 8 files 'THIN' \(CT\); 3 files 'LUNG' \(CT\)$"),
        (other_modality, "a DICOM series of modality MR, expected CT"),
        (no_modality, "a DICOM series of modality unknown, expected CT"),
        (missing_slice, r"mostly 2.5 mm, from 2.5 to 5 mm; 5 mm between -295.0 and -290.0 mm. Is a slice missing\?"),
        (missing_slice_near_the_end, r"5 mm between -157.5 and -152.5 mm. Is a slice missing\?"),
        (growing_gaps, "gaps between slices are not equal: mostly 2.5"),
        (two_phases, "4 of its 8 slices lie where another one does, first 1.2.3.4_000.dcm and 1.2.3.4_007.dcm"),
        (tilted, "the gantry was tilted by 13 degrees.*dcm2niix"),
        (other_direction, r"1.2.3.4_007.dcm: .* but 1.2.3.4_000.dcm of the same series has \(6, 7\) pixels"),
        (other_size, r"1.2.3.4_049.dcm: \(5, 5\) pixels.* but 1.2.3.4_000.dcm of the same series has \(6, 7\) pixels"),
        (single_slice, "holds a single DICOM slice, expected a volume"),
        (truncated_slice, r"1.2.3.4_028.dcm: truncated, damaged or not of its format"),
        (lost_slice, "1.2.3.4_049.dcm: named like a slice, but not DICOM"),
        (no_dicom, r"a folder without DICOM files \(1 others\)"),
        (empty, r"a folder without DICOM files \(0 others\)"),
    ],
)
def test_folders_that_hold_no_even_straight_ct_stack(tmp_path, make, reason):
    make(tmp_path / "series")
    with pytest.raises(CTReadError, match=reason) as caught:
        read_ct(tmp_path / "series")
    assert str(tmp_path / "series") in str(caught.value)


def test_places_that_are_rounded_are_even(tmp_path):
    """Positions are written with a few digits; a tenth of a gap is no missing slice."""
    folder = write_series(
        tmp_path / "series", hounsfield(), AFFINE, position_of=lambda number, place: np.round(place, 1) + [0, 0, 0.01]
    )
    assert read_ct(folder).spacing_mm[0] == pytest.approx(2.5, abs=0.02)


def test_text_files_read_afterwards_are_still_in_the_users_encoding(tmp_path):
    """ITK leaves the C locale behind where several threads read, and Python would then open text files as ASCII."""
    folders = [write_series(tmp_path / f"{number}", hounsfield(), AFFINE) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_ct, folders))
    assert locale.setlocale(locale.LC_CTYPE) == USERS_LOCALE
