"""Finding CT in other formats than NIfTI, naming the cases, and counting what was not taken."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.lists.data_list import DataListError, load_sections
from datasets.lists.search import BESIDE_IMAGE, EMPTY_FOLDERS, LONE_LABELS, NO_SUFFIX, ORGAN_MASKS, find_cases, search
from scripts import create_json
from tests.itk_writer import write_itk, write_series

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def touch(folder: Path, *names: str) -> Path:
    """Empty files; those that end with .dcm, or lie in a folder called slices, have DICOM's marker."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(128) + b"DICM" if path.suffix == ".dcm" or path.parent.name == "slices" else b"")
    return folder


def found(data_dir: Path) -> dict[str, tuple[str, str | None]]:
    return {
        case.name: (
            case.image.relative_to(data_dir).as_posix(),
            case.label and case.label.relative_to(data_dir).as_posix(),
        )
        for case in find_cases(data_dir)
    }


def test_volume_files_of_every_format_and_their_labels(tmp_path):
    touch(tmp_path, "subset0/1.3.6.1.mhd", "subset0/1.3.6.1.raw", "seg-lungs-LUNA16/1.3.6.1.mhd")
    touch(tmp_path, "seg-lungs-LUNA16/1.3.6.1.zraw", "a.nrrd", "a_seg.nrrd", "b.mha", "b-label.nii.gz", "b.raw")
    touch(tmp_path, "s1/ct.nrrd", "s1/label.mha", "s1/dose.nrrd")
    assert found(tmp_path) == {
        "1.3.6.1": ("subset0/1.3.6.1.mhd", "seg-lungs-LUNA16/1.3.6.1.mhd"),
        "a": ("a.nrrd", "a_seg.nrrd"),
        "b": ("b.mha", "b-label.nii.gz"),
        "s1": ("s1/ct.nrrd", "s1/label.mha"),
    }
    assert search(tmp_path).not_taken == {".raw": 1, BESIDE_IMAGE: 1}


def test_a_folder_of_dicom_slices_is_one_case(tmp_path):
    touch(tmp_path, "p1/slices/IM0001", "p1/slices/IM0002", "p2/dicom/1.dcm", "p2/dicom/2.dcm", "p2/label.nii.gz")
    touch(tmp_path, "p3/1.2.840.dcm", "p3/label.nii.gz", "labels/p4.nii.gz", "images/p4/1.dcm", "p5/DICOMDIR")
    touch(tmp_path, "p5/study/series/1.dcm", "p5/study/scout/1.dcm")
    assert found(tmp_path) == {
        "slices": ("p1/slices", None),
        "p2": ("p2/dicom", "p2/label.nii.gz"),
        "p3": ("p3", "p3/label.nii.gz"),
        "p4": ("images/p4", "labels/p4.nii.gz"),
        "series": ("p5/study/series", None),
        "scout": ("p5/study/scout", None),
    }
    assert search(tmp_path).not_taken == {NO_SUFFIX: 1}


def test_slices_beside_their_conversion_are_not_taken(tmp_path):
    touch(tmp_path, "p1/1.dcm", "p1/2.dcm", "p1/chest.nii.gz", "p2/ct.nii.gz", "p2/dicom/1.dcm", "p2/dicom/2.dcm")
    assert found(tmp_path) == {"chest": ("p1/chest.nii.gz", None), "p2": ("p2/ct.nii.gz", None)}
    assert search(tmp_path).not_taken == {".dcm": 2, BESIDE_IMAGE: 1}


def test_the_searched_folder_may_be_a_series_itself(tmp_path):
    folder = write_series(tmp_path / "patient", np.arange(210, dtype=np.int16).reshape(5, 6, 7) * 4, AFFINE)
    assert [(case.name, case.image) for case in find_cases(folder)] == [("patient", folder)]
    create_json.main(["--data_dir", str(folder), "--output", str(tmp_path / "list.json")])
    assert json.loads((tmp_path / "list.json").read_text())["training"] == [{"image": ".", "name": "patient"}]
    assert [case.image for case in load_sections(tmp_path / "list.json", folder, ["training"])] == [folder]


def test_equal_names_get_their_folders_or_are_refused(tmp_path):
    touch(tmp_path, "a/dicom/1.dcm", "b/x/dicom/1.dcm", "c/x.mha")
    assert found(tmp_path) == {
        "a": ("a/dicom", None),
        "b__x__dicom": ("b/x/dicom", None),
        "c__x": ("c/x.mha", None),
    }
    for twin in ("c/x.nrrd", "c/x/dicom/1.dcm"):
        other = touch(tmp_path / twin.replace("/", "_"), "c/x.mha", twin)
        if twin.endswith("nrrd"):
            with pytest.raises(DataListError, match="several images are called c__x; rename one"):
                find_cases(other)
        else:
            assert len(find_cases(other)) == 2


def test_what_is_not_taken_is_counted_by_kind(tmp_path):
    touch(tmp_path, "a.nii.gz", "preview.png", "other.png", "README", "notes.TXT", "dose.1234", ".hidden.txt")
    touch(tmp_path, "labels/z.nii.gz", "s1/ct.nii.gz")
    touch(tmp_path, "s1/segmentations/liver.nii.gz", "s1/segmentations/spleen.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".cache").mkdir()
    searched = search(tmp_path)
    assert searched.not_taken == {
        ".png": 2, NO_SUFFIX: 2, ".txt": 1, LONE_LABELS: 1, ORGAN_MASKS: 2, EMPTY_FOLDERS: 1,
    }  # fmt: skip
    assert searched.describe_not_taken().startswith(f"2 .png, 2 {NO_SUFFIX}, 2 {ORGAN_MASKS}, 1 .txt, ")
    assert search(touch(tmp_path / "clean", "a.nii.gz")).describe_not_taken() == ""
    many = search(touch(tmp_path / "many", "a.nii.gz", *(f"x.s{number}" for number in range(12))))
    assert many.describe_not_taken().endswith("1 .s5, 4 others")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    touch(tmp_path, "labels/a.nii.gz", "x.zip", "y.zip")
    with pytest.raises(DataListError, match=r"no images found.*Seen: 2 .zip, 1 labels without an image. Is --data_dir"):
        find_cases(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataListError, match="Seen: 1 empty folders"):
        find_cases(tmp_path / "nothing")


def test_create_json_lists_them_all_and_names_what_is_broken(tmp_path, capsys):
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    write_itk(tmp_path / "a.mha", hu, AFFINE)
    write_itk(tmp_path / "a_label.nrrd", (hu > 500).astype(np.uint8), AFFINE)
    write_series(tmp_path / "p1" / "dicom", hu, AFFINE)
    write_series(tmp_path / "p2" / "dicom", hu, AFFINE, skip=(4,))
    write_series(tmp_path / "p3" / "dicom", hu, AFFINE, {"0008|0060": "PT"})
    touch(tmp_path, "notes.txt")
    create_json.main(["--data_dir", str(tmp_path), "--output", str(tmp_path / "list.json")])
    listed = json.loads((tmp_path / "list.json").read_text())
    assert listed["training"] == [
        {"image": "a.mha", "label": "a_label.nrrd", "name": "a"},
        {"image": "p1/dicom", "name": "p1"},
    ]
    reasons = {Path(file).parent.name: reason for file, reason in listed["unreadable"].items()}
    assert reasons.keys() == {"p2", "p3"}
    assert "Is a slice missing?" in reasons["p2"] and "modality PT, expected CT" in reasons["p3"]
    told = capsys.readouterr()
    assert "not taken: 1 .txt" in told.out and "p2/dicom: gaps between slices" in told.err
