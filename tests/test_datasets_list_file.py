"""List files of radiographs and `create_json.py` on them: nothing listed disappears without a word."""

import json
import shutil

import numpy as np
import pytest

from datasets.lists.data_list import DataListError, load_data_list
from datasets.lists.list_file import read_list_file
from scripts import create_json
from tests.small_radiographs import picture, save


@pytest.fixture
def pictures(tmp_path):
    for number, name in enumerate(("a.png", "b.png", "left lung 7.png", "sub/c.png")):
        save(tmp_path / name, picture(seed=number))
    return tmp_path


def listed(folder, text: str, name: str = "list.txt"):
    (folder / name).write_text(text)
    return folder / name


def test_names_labels_blanks_and_missing_files(pictures):
    text = "a.png 0 1 0\n\nleft lung 7.png 1 0 0\nsub/c.png,0,1\n  \nnobody.png\t1\nb.png\n"
    found = read_list_file(listed(pictures, text), pictures)
    assert [case.name for case in found.cases] == ["a", "left lung 7", "c", "b"]
    assert [case.image for case in found.cases][1:3] == [pictures / "left lung 7.png", pictures / "sub/c.png"]
    assert found.num_blank == 2
    ((file, reason),) = found.missing.items()
    assert file == str(pictures / "nobody.png") and reason.startswith("no such file (line 6 of ")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a.png 0\nb.png 1\na.png 1\n", "a.png stands in line 1 and again in line 3"),
        ("a.png 0\nb 1\n", "line 2: names no .png file: 'b 1'"),
        ("x.png\ny.png\n", "none of its 2 pictures is in .*--data_dir"),
        ("\n", "none of its 0 pictures"),
    ],
)
def test_lists_that_cannot_be_meant(pictures, text, reason):
    with pytest.raises(DataListError, match=reason):
        read_list_file(listed(pictures, text), pictures)


def test_an_unreadable_list_is_named(pictures):
    with pytest.raises(DataListError, match="nobody.txt: cannot be read"):
        read_list_file(pictures / "nobody.txt", pictures)


def run(pictures, *words) -> dict:
    output = pictures / "list.json"
    create_json.main(["--data_dir", str(pictures), "--output", str(output), "--num_workers", "1", *words])
    return json.loads(output.read_text())


def test_create_json_of_two_lists(pictures, capsys):
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    training = listed(pictures, "a.png 0\n\nnobody.png 1\nbroken.png 1\nleft lung 7.png 1\n")
    validation = listed(pictures, "b.png 0\n", "val.txt")
    content = run(pictures, "--list_file", str(training), "--validation_list_file", str(validation))
    assert content["modality"] == {"0": "X-ray"}
    assert [entry["image"] for entry in content["training"]] == ["a.png", "left lung 7.png"]
    assert [entry["image"] for entry in content["validation"]] == ["b.png"]
    assert sorted(file.rsplit("/")[-1] for file in content["unreadable"]) == ["broken.png", "nobody.png"]
    told = capsys.readouterr()
    assert "list.txt: 3 pictures, 1 missing, 1 blank lines" in told.out and "2 cases left out" in told.out
    assert "nobody.png: no such file (line 3" in told.err and "broken.png: truncated or damaged PNG" in told.err
    assert [case.name for case in load_data_list(pictures / "list.json", pictures, "training")] == ["a", "left lung 7"]


def test_a_picture_to_train_with_is_not_held_out(pictures):
    first, second = listed(pictures, "a.png\nb.png\n"), listed(pictures, "b.png\n", "val.txt")
    with pytest.raises(DataListError, match="list.txt and .*val.txt both name b"):
        run(pictures, "--list_file", str(first), "--validation_list_file", str(second))


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--validation_list_file", "val.txt"], "--validation_list_file needs --list_file"),
        (["--list_file", "a", "--validation_list_file", "b", "--num_validation", "1"], "leave --num_validation"),
    ],
)
def test_flags_that_contradict_each_other(pictures, words, reason):
    with pytest.raises(DataListError, match=reason):
        run(pictures, *words)


def test_create_json_of_a_folder_with_masks(pictures, capsys):
    shutil.rmtree(pictures / "sub")
    mask = (picture(seed=8) > 99).astype(np.uint8)
    save(pictures / "masks" / "a.png", mask)
    save(pictures / "masks" / "b.png", mask[:, 1:])
    save(pictures / "looks_like_labels.png", mask.astype(np.uint16) * 65535)
    (pictures / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "lungs"}}))
    content = run(pictures)
    entries = {entry["name"]: entry.get("label") for entry in content["training"]}
    assert entries == {"a": "masks/a.png", "b": None, "left lung 7": None}
    assert content["labels"] == {"0": "background", "1": "lungs"}
    told = capsys.readouterr().err
    assert "b is listed without its label" in told and "label has shape (1, 40, 47)" in told
    assert "looks_like_labels.png: only 2 whole values, it looks like a label map" in told
    assert "MR, or scanner values" not in told
