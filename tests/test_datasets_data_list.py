"""Finding cases in the layouts people have, writing and loading data lists, and the command that does both."""

import itertools
import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from datasets.ct.nifti import read_ct
from datasets.lists.data_list import (
    Case,
    DataListError,
    load_data_list,
    load_sections,
    unique_names,
    write_data_list,
)
from datasets.lists.search import find_cases
from datasets.lists.splits import split_cases
from datasets.store.volumes import build_store
from scripts import create_json


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def put_ct(path: Path, shape=(6, 7, 8), seed=0, label=False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 14, size=shape) if label else rng.integers(-1000, 1000, size=shape)
    nib.save(nib.Nifti1Image(array.astype(np.uint8 if label else np.int16), np.diag([1, 1, 2, 1.0])), path)


def found(data_dir: Path) -> dict[str, tuple[str, str | None]]:
    return {
        case.name: (
            case.image.relative_to(data_dir).as_posix(),
            case.label and case.label.relative_to(data_dir).as_posix(),
        )
        for case in find_cases(data_dir)
    }


def test_flare22_layout(tmp_path):
    touch(
        tmp_path,
        "FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz",
        "FLARE22Train/images/FLARE22_Tr_0002_0000.nii.gz",
        "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz",
        "FLARE22Unlabeled/Case_00001_0000.nii.gz",
        "landmarks/Case_00001.json",
        "FLARE22Unlabeled/._Case_00001_0000.nii.gz",
        "FLARE22Unlabeled/.cache/Case_00009_0000.nii.gz",
    )
    assert found(tmp_path) == {
        "Case_00001": ("FLARE22Unlabeled/Case_00001_0000.nii.gz", None),
        "FLARE22_Tr_0001": (
            "FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz",
            "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz",
        ),
        "FLARE22_Tr_0002": ("FLARE22Train/images/FLARE22_Tr_0002_0000.nii.gz", None),
    }


def test_folder_per_case_takes_the_ct_and_its_label_only(tmp_path):
    touch(tmp_path, "s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz", "s0002/ct.nii.gz", "s0002/label.nii.gz")
    touch(tmp_path, "s0003/imaging.nii", "s0003/segmentation.nii", "s0003/dose.nii.gz")
    assert found(tmp_path) == {
        "s0001": ("s0001/ct.nii.gz", None),
        "s0002": ("s0002/ct.nii.gz", "s0002/label.nii.gz"),
        "s0003": ("s0003/imaging.nii", "s0003/segmentation.nii"),
    }


def test_decathlon_and_nested_label_folders(tmp_path):
    touch(tmp_path, "imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz", "imagesTs/liver_2.nii.gz")
    touch(tmp_path, "b/images/train/x.nii.gz", "b/labels/train/x.nii.gz")
    assert found(tmp_path) == {
        "liver_1": ("imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz"),
        "liver_2": ("imagesTs/liver_2.nii.gz", None),
        "x": ("b/images/train/x.nii.gz", "b/labels/train/x.nii.gz"),
    }


def test_labels_beside_images_and_folders_that_only_sound_like_labels(tmp_path):
    touch(tmp_path, "a.nii.gz", "a_label.nii.gz", "deep/er/b.nii", "deep/er/b-seg.nii", "lone_mask.nii.gz")
    touch(tmp_path, "labelled_cases/c.nii.gz", "SegTHOR/d.nii.gz")
    assert found(tmp_path) == {
        "a": ("a.nii.gz", "a_label.nii.gz"),
        "b": ("deep/er/b.nii", "deep/er/b-seg.nii"),
        "c": ("labelled_cases/c.nii.gz", None),
        "d": ("SegTHOR/d.nii.gz", None),
        "lone_mask": ("lone_mask.nii.gz", None),
    }


def test_lits_ct_org_and_btcv_number_images_and_labels_alike(tmp_path):
    touch(tmp_path, "LiTS/volume-0.nii", "LiTS/segmentation-0.nii", "LiTS/volume-10.nii", "LiTS/segmentation-10.nii")
    touch(tmp_path, "CT-ORG/volume-1.nii.gz", "CT-ORG/labels-1.nii.gz", "CT-ORG/volume-2.nii.gz")
    touch(tmp_path, "BTCV/Training/img/img0001.nii.gz", "BTCV/Training/label/label0001.nii.gz")
    touch(tmp_path, "BTCV/Testing/img/img0061.nii.gz", "own/p7.nii.gz", "own/seg_p7.nii.gz")
    assert found(tmp_path) == {
        "volume-0": ("LiTS/volume-0.nii", "LiTS/segmentation-0.nii"),
        "volume-10": ("LiTS/volume-10.nii", "LiTS/segmentation-10.nii"),
        "volume-1": ("CT-ORG/volume-1.nii.gz", "CT-ORG/labels-1.nii.gz"),
        "volume-2": ("CT-ORG/volume-2.nii.gz", None),
        "img0001": ("BTCV/Training/img/img0001.nii.gz", "BTCV/Training/label/label0001.nii.gz"),
        "img0061": ("BTCV/Testing/img/img0061.nii.gz", None),
        "p7": ("own/p7.nii.gz", "own/seg_p7.nii.gz"),
    }


def test_folders_with_a_label_word_in_their_name(tmp_path):
    touch(tmp_path, "Pancreas-CT/PANCREAS_0001.nii.gz", "TCIA_pancreas_labels-02-05-2017/PANCREAS_0001.nii.gz")
    touch(tmp_path, "TCIA_pancreas_labels-02-05-2017/0002.nii.gz", "TCIA_pancreas_labels-02-05-2017/img_3_seg.nii.gz")
    # Data sets that only speak of labels in their names keep their images.
    touch(tmp_path, "liver_segmentation/imagesTr/liver_1.nii.gz", "liver_segmentation/labelsTr/liver_1.nii.gz")
    touch(tmp_path, "ct_with_labels/volume-5.nii", "lung-seg-2020/p1_0000.nii.gz", "unlabeled_cases/u.nii")
    assert found(tmp_path) == {
        "PANCREAS_0001": (
            "Pancreas-CT/PANCREAS_0001.nii.gz",
            "TCIA_pancreas_labels-02-05-2017/PANCREAS_0001.nii.gz",
        ),
        "liver_1": ("liver_segmentation/imagesTr/liver_1.nii.gz", "liver_segmentation/labelsTr/liver_1.nii.gz"),
        "volume-5": ("ct_with_labels/volume-5.nii", None),
        "p1": ("lung-seg-2020/p1_0000.nii.gz", None),
        "u": ("unlabeled_cases/u.nii", None),
    }


def test_equal_names_get_their_folders_and_their_own_labels(tmp_path):
    touch(tmp_path, "siteA/images/1_0000.nii.gz", "siteA/labels/1.nii.gz", "siteB/images/1_0000.nii.gz")
    touch(tmp_path, "siteB/x/ct.nii.gz", "siteA/x/ct.nii.gz")
    assert found(tmp_path) == {
        "siteA__images__1_0000": ("siteA/images/1_0000.nii.gz", "siteA/labels/1.nii.gz"),
        "siteB__images__1_0000": ("siteB/images/1_0000.nii.gz", None),
        "siteA__x__ct": ("siteA/x/ct.nii.gz", None),
        "siteB__x__ct": ("siteB/x/ct.nii.gz", None),
    }


def test_names_that_cannot_be_told_apart(tmp_path):
    assert unique_names(["a.nii.gz", "B.nii.gz"]) == ["a", "B"]
    with pytest.raises(DataListError, match="x"):
        find_cases(touch(tmp_path, "x.nii", "x.nii.gz"))


def test_two_labels_for_one_case(tmp_path):
    touch(tmp_path, "images/1.nii.gz", "labels/1.nii.gz", "labels_v2/1.nii.gz")
    with pytest.raises(DataListError, match="several labels.*labels_v2"):
        find_cases(tmp_path)


def test_nothing_found(tmp_path):
    with pytest.raises(DataListError, match="no such folder"):
        find_cases(tmp_path / "none")
    with pytest.raises(DataListError, match="no images"):
        find_cases(touch(tmp_path, "readme.txt", "labels/1.nii.gz"))


def test_split_depends_on_the_seed_only():
    cases = [Case(f"c{number:02d}", Path(f"{number}.nii")) for number in range(20)]
    training, validation = split_cases(cases, None, 0.2, seed=3)
    assert len(validation) == 4 and sorted([*training, *validation], key=lambda c: c.name) == cases
    assert split_cases(cases[::-1], None, 0.2, seed=3) == (training, validation)
    assert split_cases(cases, None, 0.2, seed=4)[1] != validation
    assert split_cases(cases, 7, 0.2, seed=3)[1].__len__() == 7
    assert split_cases(cases, None, 0, seed=3) == (cases, [])
    assert len(split_cases(cases, None, 0.01, seed=3)[1]) == 1
    for num_validation, fraction in ((20, 0), (-1, 0), (None, 1.0), (None, -0.1)):
        with pytest.raises(DataListError, match="--"):
            split_cases(cases, num_validation, fraction, seed=0)


def test_scans_of_one_patient_stay_on_one_side():
    numbers = itertools.product(range(10), range(3))
    cases = [Case(f"p{patient}_{scan}", Path("x.nii"), None, f"p{patient}") for patient, scan in numbers]
    cases += [Case(f"alone{number}", Path("x.nii")) for number in range(10)]
    for seed in range(5):
        training, validation = split_cases(cases, 8, 0, seed)
        assert not {case.patient for case in training} & {case.patient for case in validation}
        assert len(validation) in (7, 8) and len(training) + len(validation) == 40
    assert split_cases(cases[:30], 3, 0, 1)[1] != split_cases(cases[:30], 3, 0, 2)[1]
    with pytest.raises(DataListError, match="no patient has as few as 2 scans"):
        split_cases(cases[:30], 2, 0, 0)


def test_lists_round_trip_and_monai_reads_them(tmp_path):
    data_dir = touch(tmp_path / "data", "images/a.nii.gz", "labels/a.nii.gz", "b.nii.gz")
    touch(tmp_path, "elsewhere.nii.gz")
    training = [Case("a", data_dir / "images/a.nii.gz", data_dir / "labels/a.nii.gz")]
    validation = [Case("b", data_dir / "b.nii.gz"), Case("far", tmp_path / "elsewhere.nii.gz")]
    path = tmp_path / "lists" / "list.json"
    write_data_list(path, data_dir, training, validation, {"0": "background", "1": "liver"}, {"x.nii": "truncated"})
    assert load_data_list(path, data_dir) == training
    assert load_data_list(path, data_dir, "validation") == validation
    content = json.loads(path.read_text())
    assert content["training"][0] == {"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "name": "a"}
    assert content["unreadable"] == {"x.nii": "truncated"} and content["labels"]["1"] == "liver"
    monai = load_decathlon_datalist(str(path), base_dir=str(data_dir), data_list_key="training")
    assert monai[0]["image"] == str(training[0].image) and monai[0]["label"] == str(training[0].label)


def test_foreign_lists_with_plain_strings(tmp_path):
    touch(tmp_path, "u/Case_1_0000.nii.gz", "u/Case_2_0000.nii.gz", "p1/ct.nii.gz")
    path = tmp_path / "list.json"
    content = {"training": ["u/Case_1_0000.nii.gz", {"image": "p1/ct.nii.gz"}], "test": ["u/Case_2_0000.nii.gz"]}
    path.write_text(json.dumps(content))
    assert [case.name for case in load_data_list(path, tmp_path)] == ["Case_1", "p1"]
    assert [case.name for case in load_data_list(path, tmp_path, "test")] == ["Case_2"]
    assert load_data_list(path, tmp_path, "validation") == []


@pytest.mark.parametrize(
    "content, reason",
    [
        ("not json", "not a JSON"),
        ("[1]", "expected an object"),
        ('{"validation": []}', "no section 'training'; it has validation"),
        ('{"training": [{"label": "a.nii"}]}', "no 'image'"),
        ('{"training": [3]}', "no 'image'"),
        ('{"training": ["a.nii", "a.nii"]}', "same name"),
        ('{"training": ["a.nii", {"image": "a.nii", "name": "again"}]}', "same name or image"),
        ('{"training": [{"image": "a.nii", "label": 5}]}', "the label of a is 5, expected a path"),
        ('{"training": [{"image": "a.nii", "name": []}]}', "which cannot be the name"),
        (f'{{"training": [{{"image": "a.nii", "name": "{"a" * 300}"}}]}}', "which cannot be the name .* at most 180"),
        ('{"training": ' + "[" * 200_000, "not a JSON"),
        (
            '{"training": [{"image": "a.nii", "name": "x"}], "test": [{"image": "b.nii", "name": "x"}]}',
            "b.nii and a.nii are both called 'x'",
        ),
        ('{"training": ["a.nii", "b.nii"]}', "1 of 2 files are missing, first .*b.nii.*--data_dir"),
    ],
)
def test_bad_lists_are_named(tmp_path, content, reason):
    touch(tmp_path, "a.nii")
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DataListError, match=reason) as caught:
        load_data_list(path, tmp_path)
    assert str(path) in str(caught.value)


def test_a_patient_on_both_sides_of_a_list_is_named(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz")

    def listed(held_out: str) -> list[Case]:
        entries = [{"image": f"{name}.nii.gz", "group": group} for name, group in (("a", "one"), ("b", held_out))]
        path = tmp_path / f"{held_out}.json"
        path.write_text(json.dumps({"training": entries[:1], "validation": entries[1:]}))
        return load_data_list(path, tmp_path, "validation")

    with pytest.warns(UserWarning, match="one.json.*1 patients.*: one. What"):
        listed("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [case.group for case in listed("two")] == ["two"]


def test_a_path_with_a_zero_byte_is_none(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a\0b.nii.gz"}]}))
    with pytest.raises(DataListError, match="list.json: an entry of 'training' has no 'image' path"):
        load_data_list(tmp_path / "list.json", tmp_path, must_exist=False)


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_sections_are_lists(tmp_path, broken):
    touch(tmp_path, "a.nii")
    content = {"training": [{"image": "a.nii"}], "validation": []} | {broken: {"image": "a.nii"}}
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(DataListError, match=f"list.json: '{broken}' is a dict, expected a list of cases"):
        load_data_list(tmp_path / "list.json", tmp_path)


@pytest.mark.parametrize("name", ["", None])
def test_an_empty_name_is_none(tmp_path, name):
    touch(tmp_path, "a.nii")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii", "name": name}]}))
    assert [case.name for case in load_data_list(tmp_path / "list.json", tmp_path)] == ["a"]


def test_groups_round_trip_and_must_be_text(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    cases = [Case("a", tmp_path / "a.nii", None, "one"), Case("b", tmp_path / "b.nii")]
    write_data_list(tmp_path / "list.json", tmp_path, cases)
    assert load_data_list(tmp_path / "list.json", tmp_path) == cases
    assert [case.patient for case in cases] == ["one", "b"]
    content = json.loads((tmp_path / "list.json").read_text())
    assert content["training"][0]["group"] == "one" and "group" not in content["training"][1]
    content["training"][0]["group"] = 7
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(DataListError, match="the group of a is 7, expected text"):
        load_data_list(tmp_path / "list.json", tmp_path)


def test_links_to_folders_above_end(tmp_path):
    touch(tmp_path, "sub/a.nii.gz", "z.nii.gz")
    for name in ("one", "two"):
        (tmp_path / "sub" / name).symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path / "sub", target_is_directory=True)
    assert [case.name for case in find_cases(tmp_path)] == ["a", "z"]


@pytest.mark.parametrize("name", ["../..", "a/b", "..", ".hidden", "/etc/passwd", 5, ["x"]])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    """Names become file names: of embeddings, mined rows, SAM's grid."""
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "name": name}]}))
    with pytest.raises(DataListError, match="list.json: the entry of a.nii.gz is called .*, which cannot be the name"):
        load_data_list(tmp_path / "list.json", tmp_path, must_exist=False)


def test_missing_list(tmp_path):
    with pytest.raises(DataListError, match="create_json"):
        load_data_list(tmp_path / "none.json", tmp_path)


@pytest.fixture
def flare(tmp_path) -> Path:
    """Four labelled and three unlabelled volumes, three files of which cannot be used."""
    for number in range(1, 5):
        put_ct(tmp_path / f"FLARE22Train/images/FLARE22_Tr_000{number}_0000.nii.gz", seed=number)
        put_ct(tmp_path / f"FLARE22Train/labels/FLARE22_Tr_000{number}.nii.gz", seed=number, label=True)
    put_ct(tmp_path / "FLARE22Train/labels/FLARE22_Tr_0004.nii.gz", shape=(5, 5, 5), label=True)
    for number in range(1, 4):
        put_ct(tmp_path / f"FLARE22Unlabeled/Case_0000{number}_0000.nii.gz", shape=(40, 40, 40), seed=number)
    broken = tmp_path / "FLARE22Unlabeled/Case_00003_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:5000])
    put_ct(tmp_path / "FLARE22Unlabeled/Case_00002_0000.nii.gz", shape=(4, 4, 4, 2))
    return tmp_path


def test_create_json_leaves_unreadable_files_out_loudly(flare, capsys):
    create_json.main(["--data_dir", str(flare), "--output", str(flare / "all.json"), "--num_validation", "1"])
    told = capsys.readouterr()
    content = json.loads((flare / "all.json").read_text())
    names = [entry["name"] for entry in content["training"] + content["validation"]]
    assert sorted(names) == ["Case_00001", *(f"FLARE22_Tr_000{number}" for number in (1, 2, 3, 4))]
    assert len(content["validation"]) == 1 and content["labels"]["13"] == "left kidney"
    reasons = {Path(file).name: reason for file, reason in content["unreadable"].items()}
    assert "truncated" in reasons.pop("Case_00003_0000.nii.gz")
    assert "4-D" in reasons.pop("Case_00002_0000.nii.gz")
    label_reason = reasons.pop("FLARE22_Tr_0004.nii.gz")
    assert "(5, 5, 5)" in label_reason and "FLARE22_Tr_0004 is listed without its label" in label_reason and not reasons
    assert told.err.count("left out") == 3 and label_reason in told.err
    assert "4 training and 1 validation cases (3 with labels), 2 cases left out, 1 listed without" in told.out


def test_create_json_refuses_labels_that_the_store_would_refuse(tmp_path, capsys):
    for name in ("a", "b"):
        put_ct(tmp_path / f"images/{name}.nii.gz")
        put_ct(tmp_path / f"labels/{name}.nii.gz", label=True)
    label = nib.load(tmp_path / "labels/b.nii.gz")
    shifted = label.affine + np.array([[0, 0, 0, 30.0]] + [[0] * 4] * 3)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), shifted), tmp_path / "labels/b.nii.gz")
    command = ["--data_dir", str(tmp_path), "--output", str(tmp_path / "l.json")]
    create_json.main(command)
    assert [case.label is not None for case in load_data_list(tmp_path / "l.json", tmp_path)] == [True, False]
    assert "labels/b.nii.gz: label lies 30.0 mm beside its image" in capsys.readouterr().err
    create_json.main([*command, "--cases", "labelled"])
    assert [case.name for case in load_data_list(tmp_path / "l.json", tmp_path)] == ["a"]
    assert "without" not in capsys.readouterr().err
    assert build_store(find_cases(tmp_path), tmp_path / "store", progress=False).failed.keys() == {"b"}


def test_create_json_notes_volumes_without_air(tmp_path, capsys):
    """Scanner values that lack their offset: every one of them fits, and every window would show one grey."""
    put_ct(tmp_path / "a.nii.gz")
    words = ["--data_dir", str(tmp_path), "--output", str(tmp_path / "l.json")]
    create_json.main(words)
    assert "note:" not in capsys.readouterr().err
    raw = np.random.default_rng(0).integers(0, 2000, size=(6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(raw, np.eye(4)), tmp_path / "raw.nii.gz")
    create_json.main(words)
    told = capsys.readouterr().err
    assert "note: 1 of 2 volumes hold nothing below -200 HU" in told and "raw.nii.gz" in told and "--a_min" in told


def test_create_json_leaves_label_maps_out(tmp_path):
    put_ct(tmp_path / "a.nii.gz")
    put_ct(tmp_path / "a_organs.nii.gz", label=True)
    mri = np.random.default_rng(0).integers(0, 1000, size=(6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(mri, np.eye(4)), tmp_path / "mri.nii.gz")
    create_json.main(["--data_dir", str(tmp_path), "--output", str(tmp_path / "l.json")])
    content = json.loads((tmp_path / "l.json").read_text())
    assert [entry["name"] for entry in content["training"]] == ["a", "mri"]
    assert [Path(file).name for file in content["unreadable"]] == ["a_organs.nii.gz"]
    assert "14 whole values" in str(content["unreadable"]) and "looks like a label map" in str(content["unreadable"])


def test_create_json_goes_on_after_what_nobody_foresaw(flare, monkeypatch):
    def read(path, mr_percentiles):
        if "Tr_0002" in Path(path).name:
            raise OverflowError("too large")
        return read_ct(path)

    monkeypatch.setattr(create_json, "read_image", read)
    create_json.main(["--data_dir", str(flare), "--output", str(flare / "all.json")])
    content = json.loads((flare / "all.json").read_text())
    reasons = {Path(file).name: reason for file, reason in content["unreadable"].items()}
    assert reasons["FLARE22_Tr_0002_0000.nii.gz"] == "unexpected OverflowError (too large)"
    assert "FLARE22_Tr_0003" in [entry["name"] for entry in content["training"]]


@pytest.mark.parametrize("which, num_cases", [("labelled", 3), ("unlabelled", 1)])
def test_create_json_chooses_cases(flare, which, num_cases):
    create_json.main(["--data_dir", str(flare), "--output", str(flare / "some.json"), "--cases", which])
    cases = load_data_list(flare / "some.json", flare)
    assert len(cases) == num_cases and all((case.label is not None) == (which == "labelled") for case in cases)


def test_create_json_finds_patients_in_names(tmp_path, capsys):
    volume = np.random.default_rng(0).integers(-1000, 1500, (20, 20, 20)).astype(np.int16)
    for name in ("train_1_a_1", "train_1_a_2", "train_2_a_1", "other"):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    command = ["--data_dir", str(tmp_path), "--output", str(tmp_path / "list.json"), "--num_validation", "2"]
    create_json.main([*command, "--group_regex", r"(train_\d+)_", "--seed", "3"])
    listed = load_sections(tmp_path / "list.json", tmp_path, ("training", "validation"))
    assert {case.name: case.group for case in listed} == {
        "train_1_a_1": "train_1", "train_1_a_2": "train_1", "train_2_a_1": "train_2", "other": "",
    }  # fmt: skip
    assert "3 patients; 1 names show none" in capsys.readouterr().out
    for wrong, reason in (
        ("(", "no regular expression"),
        ("train", "one pair of parentheses"),
        ("(xyz)", "fits no name"),
    ):
        with pytest.raises(DataListError, match=f"--group_regex.*{reason}"):
            create_json.main([*command, "--group_regex", wrong])


def test_create_json_fails_clearly(tmp_path):
    command = ["--data_dir", str(tmp_path), "--output", str(tmp_path / "l.json")]
    with pytest.raises(DataListError, match="no images"):
        create_json.main(command)
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(DataListError, match="none of 1 cases can be read"):
        create_json.main(command)
    with pytest.raises(DataListError, match="none of 1 cases is labelled"):
        create_json.main([*command, "--cases", "labelled"])
    with pytest.raises(DataListError, match="--num_validation 5"):
        create_json.main([*command, "--num_validation", "5"])
    assert not (tmp_path / "l.json").exists()


def test_weights_round_trip_and_must_be_more_than_0(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    cases = [Case("a", tmp_path / "a.nii", weight=0.25), Case("b", tmp_path / "b.nii")]
    write_data_list(tmp_path / "list.json", tmp_path, cases)
    assert load_data_list(tmp_path / "list.json", tmp_path) == cases
    content = json.loads((tmp_path / "list.json").read_text())
    assert content["training"][0]["weight"] == 0.25 and "weight" not in content["training"][1]
    for wrong in (0, -1, True, "1", float("nan"), float("inf"), None):
        content["training"][0]["weight"] = wrong
        (tmp_path / "list.json").write_text(json.dumps(content))
        with pytest.raises(DataListError, match="the weight of a is .*, expected a number more than 0"):
            load_data_list(tmp_path / "list.json", tmp_path)
