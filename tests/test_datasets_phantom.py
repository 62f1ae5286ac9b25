"""The phantom CT: the same seed repeats every byte, the deformation is invertible, and the files tell the truth."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from datasets.phantom.cases import (
    PhantomCase,
    atlas_coordinates,
    case_files,
    list_cases,
    nifti_bytes,
    render,
    write_case,
    write_dataset,
)
from datasets.phantom.deform import MIN_DETERMINANT
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.patient import PHASES, TISSUE_HU
from datasets.phantom.scan import ORIENTATIONS, SCAN_RANGES
from datasets.phantom.variants import Shares
from scripts import show_phantom
from scripts.make_phantom_dataset import main
from tests.phantom_facts import LABEL_HU_RANGE, ORGAN_LANDMARKS

TINY = 2.5
SEED = 7  # its first four cases meet all contrast phases and four orientations


def tiny(index: int, labelled: bool = True, range_name: str | None = "abdomen", coarsen: float = TINY) -> PhantomCase:
    name = f"FLARE22_Tr_{index:04d}" if labelled else f"Case_{index:05d}"
    return PhantomCase(name, SEED, index, labelled, range_name=range_name, coarsen=coarsen, shares=Shares.none())


def read_written(out_dir, case: PhantomCase):
    """Image, label image and landmarks as a user would read them."""
    files = case_files(out_dir, case)
    landmarks = json.loads(files["landmarks"].read_text())["landmarks_mm"]
    return nib.load(files["image"]), nib.load(files["label"]), landmarks


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path):
    case = tiny(1)
    other = dataclasses.replace(case, seed=SEED + 1)
    for folder, chosen in (("a", case), ("b", case), ("c", other)):
        assert write_case(tmp_path / folder, chosen)
    contents = {
        folder: {kind: path.read_bytes() for kind, path in case_files(tmp_path / folder, case).items()}
        for folder in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"]["image"] != contents["c"]["image"]


def test_a_case_does_not_depend_on_the_processes_that_make_it(tmp_path):
    cases = [tiny(1), tiny(2, labelled=False, range_name=None)]
    assert write_dataset(tmp_path / "one", cases, num_workers=0) == 2
    assert write_dataset(tmp_path / "two", cases, num_workers=2) == 2
    for case in cases:
        for kind, path in case_files(tmp_path / "one", case).items():
            assert path.read_bytes() == case_files(tmp_path / "two", case)[kind].read_bytes(), (case.name, kind)


@pytest.mark.parametrize("index", range(1, 9))
def test_jacobian_stays_positive_and_landmarks_come_back(index):
    patient = tiny(index).sample()[0]
    deformation = patient.deformation
    assert deformation.min_determinant() > MIN_DETERMINANT
    points = np.array(list(atlas_landmarks().values()))
    world = deformation.to_world(points)
    assert np.linalg.norm(deformation.to_atlas(world) - points, axis=1).max() < 0.01


def test_jacobian_agrees_with_differences_of_the_map():
    deformation = tiny(3).sample()[0].deformation
    points = deformation.to_world(np.array([[60.0, 10, 90], [-100, 0, 160], [0, 120, 40]]))
    axes = [np.linspace(c - 1e-2, c + 1e-2, 2) for c in points[0]]
    grid = np.stack(deformation.grid(axes), -1)
    assert np.abs(grid[0, 0, 0] - deformation.to_atlas(points[:1] - 1e-2)).max() < 1e-3
    q = (points - deformation.offset_mm) / deformation.scale
    slope = np.eye(3) + deformation._displacement(q)[1]
    for axis in range(3):
        step = np.zeros(3)
        step[axis] = 1e-3 * deformation.scale[axis]
        measured = (deformation.to_atlas(points + step) - deformation.to_atlas(points - step)) / 2e-3
        assert np.abs(measured - slope[:, :, axis]).max() < 1e-4


def test_patients_differ_by_centimetres():
    names = list(atlas_landmarks())
    points = np.array(list(atlas_landmarks().values()))
    worlds = np.array([tiny(k).sample()[0].deformation.to_world(points) for k in range(1, 13)])
    centred = worlds - worlds[:, [names.index("L3_body")]]
    spread = np.sqrt((centred.std(axis=0) ** 2).sum(-1))
    for organ in ("liver_right_lobe", "left_kidney_lateral_cortex", "spleen_centre", "stomach_body"):
        assert 8 < spread[names.index(organ)] < 45, organ


@pytest.fixture(scope="module")
def abdomens(tmp_path_factory):
    """Four labelled abdominal cases as a user reads them: (case, image, label image, landmarks)."""
    folder = tmp_path_factory.mktemp("abdomens")
    cases = [tiny(index, coarsen=1.5) for index in range(1, 5)]
    write_dataset(folder, cases, num_workers=0)
    return [(case, *read_written(folder, case)) for case in cases]


def test_organ_landmarks_lie_in_their_organs_whatever_the_orientation(abdomens):
    for case, image, label, landmarks in abdomens:
        assert np.allclose(image.affine, label.affine, atol=1e-4) and image.shape == label.shape
        values = np.asarray(label.dataobj)
        assert set(np.unique(values)) == set(range(14)), "an abdominal scan shows all 13 organs"
        to_index = np.linalg.inv(label.affine)
        for name in set(ORGAN_LANDMARKS) & set(landmarks):
            voxel = np.round(to_index[:3, :3] @ np.array(landmarks[name]) + to_index[:3, 3]).astype(int)
            organ = ORGAN_LANDMARKS[name]
            around = tuple(slice(max(v - 1, 0), v + 2) for v in voxel)  # adrenal glands are as thin as these voxels
            found = values[tuple(voxel)] == organ
            assert found or ("adrenal" in name and organ in values[around]), (case.name, name)
        assert len(set(ORGAN_LANDMARKS) & set(landmarks)) >= 12
    codes = {"".join(nib.aff2axcodes(image.affine)) for _, image, *_ in abdomens}
    assert len(codes) > 2 and codes <= set(ORIENTATIONS)


def test_organs_have_the_hu_of_their_contrast_phase(abdomens):
    met = set()
    for case, image, label, _ in abdomens:
        patient = case.sample()[0]
        column = PHASES.index(patient.phase)
        met.add(column)
        hu, organs = np.asarray(image.dataobj), np.asarray(label.dataobj)
        for organ, ranges in LABEL_HU_RANGE.items():
            low, high = ranges[column]
            middle = float(np.median(hu[(organs == organ) & (hu > -1500)]))
            assert low <= middle <= high, (case.name, patient.phase, organ, round(middle), ranges[column])
        for tissue, ranges in TISSUE_HU.items():
            assert ranges[column][0] <= patient.hu[tissue] <= ranges[column][1]
    assert met == {0, 1, 2}, "the test should meet all phases"


def test_intensity_alone_does_not_tell_the_organs_apart(abdomens):
    _, image, label, _ = abdomens[1]
    hu, organs = np.asarray(image.dataobj), np.asarray(label.dataobj)
    for first, second in ((1, 3), (4, 12), (2, 13), (4, 7)):
        counts = [np.histogram(hu[organs == organ], 40, (-300, 500), density=True)[0] for organ in (first, second)]
        overlap = np.minimum(*counts).sum() * 20
        assert overlap > 0.2, (first, second, overlap)


@pytest.mark.parametrize("storage", ["int16", "int32", "float32", "scaled"])
def test_every_storage_and_orientation_keeps_values_and_places(storage, tmp_path):
    rng = np.random.default_rng(0)
    hu = np.clip(rng.normal(0, 500, (7, 5, 4)), -1024, 3071).round().astype(np.float32)
    hu[0, 0, 0] = -3024
    affine = np.array([[2.0, 0, 0, -31], [0, 3, 0, 17], [0, 0, 5, 200], [0, 0, 0, 1]])
    for orientation in ORIENTATIONS:
        path = tmp_path / f"{orientation}.nii.gz"
        path.write_bytes(nifti_bytes(hu, affine, orientation, storage))
        image = nib.load(path)
        assert nib.aff2axcodes(image.affine) == tuple(orientation)
        back = nib.as_closest_canonical(image)
        assert np.array_equal(back.get_fdata(), hu) and np.allclose(back.affine, affine)


def test_every_scan_has_forty_landmarks_and_none_outside(tmp_path):
    for range_name in SCAN_RANGES:
        case = tiny(4, range_name=range_name, coarsen=4.0)
        write_case(tmp_path / range_name, case)
        image, _, landmarks = read_written(tmp_path / range_name, case)
        assert len(landmarks) >= 40, (range_name, len(landmarks))
        index = (np.array(list(landmarks.values())) - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T
        assert (index > -0.01).all() and (index < np.array(image.shape) - 0.99).all()
    abdomen = read_written(tmp_path / "abdomen", tiny(4, coarsen=4.0))[2]
    whole = read_written(tmp_path / "chest_abdomen_pelvis", tiny(4, coarsen=4.0))[2]
    assert "carina" not in abdomen and "left_femoral_head" not in abdomen and "L2_body" in abdomen
    assert "carina" in whole and "left_femoral_head" in whole


def test_atlas_map_names_the_voxel_of_every_landmark(tmp_path):
    case = tiny(5, coarsen=3.0)
    atlas_mm, affine = atlas_coordinates(case)
    done = render(case)
    assert atlas_mm.shape == (3, *done.hu.shape) and np.allclose(affine, done.affine)
    truth = atlas_landmarks()
    size = np.linalg.norm(affine[:3, :3].diagonal())
    for name, point in done.landmarks_mm.items():
        voxel = np.round((point - affine[:3, 3]) / affine[:3, :3].diagonal()).astype(int)
        assert np.linalg.norm(atlas_mm[(slice(None), *voxel)] - truth[name]) < 1.5 * size, name
    write_case(tmp_path, case, save_atlas_map=True)
    saved = np.load(case_files(tmp_path, case, save_atlas_map=True)["atlas_map"])
    assert np.abs(saved["atlas_mm"].astype(np.float32) - atlas_mm).max() < 0.3


def test_finished_cases_are_kept_and_half_made_ones_made_again(tmp_path):
    case = tiny(6, coarsen=4.0)
    assert write_case(tmp_path, case) is True
    files = case_files(tmp_path, case)
    content, stamp = files["image"].read_bytes(), files["image"].stat().st_mtime_ns
    assert write_case(tmp_path, case) is False
    assert files["image"].stat().st_mtime_ns == stamp
    files["label"].unlink()
    assert write_case(tmp_path, case) is True
    assert files["image"].read_bytes() == content and files["label"].exists()
    assert not list(tmp_path.rglob("*.part"))


def test_command_line_writes_the_flare22_layout(tmp_path, monkeypatch):
    small = [dataclasses.replace(case, coarsen=5.0) for case in list_cases(1, 1, 3)]
    monkeypatch.setattr("scripts.make_phantom_dataset.list_cases", lambda *_: small)
    main(["--out_dir", str(tmp_path), "--num_unlabelled", "1", "--num_labelled", "1", "--num_workers", "0"])
    for path in (
        "FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz",
        "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz",
        "FLARE22Unlabeled/Case_00001_0000.nii.gz",
        "landmarks/FLARE22_Tr_0001.json",
        "landmarks/Case_00001.json",
        "phantom_run.json",
    ):
        assert (tmp_path / path).exists(), path
    with pytest.raises(ValueError, match="num_labelled"):
        main(["--out_dir", str(tmp_path), "--num_labelled", "-1"])


def test_more_cases_leave_the_first_ones_as_they_are():
    few, many = list_cases(2, 1, 7), list_cases(5, 3, 7)
    assert set(few) < set(many)
    assert len({case.name for case in many}) == 8


def test_contact_sheet_is_drawn_and_other_files_are_named(tmp_path):
    case = tiny(1, coarsen=5.0)
    write_case(tmp_path, case)
    sheet = tmp_path / "sheet.png"
    show_phantom.main(["--images", str(case_files(tmp_path, case)["image"]), "--output", str(sheet)])
    width, height = Image.open(sheet).size
    assert width > height > 50
    other = tmp_path / "scan.mha"
    other.write_text("ObjectType = Image")
    with pytest.raises(ValueError, match="scan.mha: not readable as NIfTI"):
        show_phantom.main(["--images", str(other), "--output", str(sheet)])
