"""The command that draws a sheet of paired crops and counts pairs."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

import main_ddp
from datasets.lists.data_list import Case
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import centre_mm
from datasets.store.volumes import VolumeStore, build_store
from engine.distributed import World
from engine.pretrain_data import open_data
from models.methods import Alice
from scripts.show_pairs import main, make_flags, open_pairs
from tests.fakes import spl_affine, world_volume

SMALL = ["--roi_x", "32", "--roi_y", "16", "--roi_z", "16", "--mask_block", "8", "--num_pairs", "2"]
SMALL += ["--num_counted", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of two cases and a table of ten matches."""
    folder = tmp_path_factory.mktemp("show_pairs")
    affine = spl_affine((2.0, 2.0, 2.0), (50.0, 40.0, -50.0))
    cases = []
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(world_volume(affine=affine), affine), folder / f"{name}.nii.gz")
        cases.append(Case(name, folder / f"{name}.nii.gz", None))
    build_store(cases, folder / "store", None, progress=False)
    store = VolumeStore(folder / "store")
    rows = np.zeros(10, ROW_DTYPE)
    rows["key_case"], rows["score"] = 1, np.linspace(0.55, 1.0, 10)
    rows["query_mm"] = rows["key_mm"] = centre_mm(store.record("a"), np.array([12, 12, 8]), (16, 16, 32))
    CorrespondenceTable.write(folder / "embed", store.names, rows, {})
    return folder


def test_sam_sheet_and_statistics(folder, capsys):
    output = folder / "pictures" / "pairs.png"
    main(
        [
            "--store_dir",
            f"{folder}/store",
            "--embed_dir",
            f"{folder}/embed",
            "--output",
            str(output),
            *SMALL,
            "--min_score",
            "0.7",
        ]
    )
    facts = json.loads(capsys.readouterr().out)
    assert output.stat().st_size > 10_000
    assert facts["num_rows"] == 10 and facts["num_usable_rows"] == 7 and facts["num_cases_without_rows"] == 1
    assert facts["num_pairs"] == 20 and facts["num_fallback"] == 10  # no row begins at b
    assert 0.7 <= facts["mean_score"] <= 1.0
    assert json.loads((output.parent / "pairs.run.json").read_text())["flags"]["roi_x"] == 32


def test_pairs_are_those_of_the_lists_training_cases(folder, capsys):
    """As main_ddp.py draws them: held-out cases of the store take no part."""
    entries = [{"image": f"{name}.nii.gz", "name": name} for name in ("b", "a")]
    (folder / "list.json").write_text(json.dumps({"training": entries[:1], "validation": entries[1:]}))
    words = ["--store_dir", f"{folder}/store", "--pairing", "iou", "--output", f"{folder}/listed.png", *SMALL]
    words += ["--json_list", f"{folder}/list.json", "--data_dir", str(folder)]
    main(words)
    assert json.loads(capsys.readouterr().out)["num_cases"] == 1
    shown = open_pairs(make_flags().parse_args(words))
    flags = main_ddp.make_flags().parse_args([*words[:4], *SMALL[:8], *words[-4:], "--output_dir", f"{folder}/run"])
    trained = open_data(flags, Alice, World()).training
    for index in range(5):
        one, other = shown[index], trained[index]
        assert trained.names == shown.names == ["b"]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_matched_pairs_of_a_store_with_native_spacing_are_noted(folder, caplog):
    (folder / "both.json").write_text(json.dumps({"training": [f"{name}.nii.gz" for name in ("a", "b")]}))
    words = ["--store_dir", f"{folder}/store", "--embed_dir", f"{folder}/embed", "--data_dir", str(folder)]
    words += ["--json_list", f"{folder}/both.json", "--output_dir", f"{folder}/run", *SMALL[:8]]
    for pairing, is_noted in (("iou", False), ("sam", True)):
        open_data(main_ddp.make_flags().parse_args([*words, "--pairing", pairing]), Alice, World())
        assert ("keeps each volume's own spacing: the two crops of a --pairing sam" in caplog.text) == is_noted


def test_iou_sheet_of_student_views(folder, capsys):
    output = folder / "iou.png"
    main(["--store_dir", f"{folder}/store", "--pairing", "iou", "--view", "student", "--output", str(output), *SMALL])
    assert json.loads(capsys.readouterr().out)["num_pairs"] == 20 and output.exists()


def test_target_is_another_word_for_crop(folder):
    pictures = []
    for view in ("crop", "target"):
        words = ["--store_dir", f"{folder}/store", "--pairing", "iou", "--view", view, *SMALL]
        main([*words, "--output", f"{folder}/{view}.png"])
        pictures.append(imread(folder / f"{view}.png"))
    assert np.array_equal(*pictures)


def test_sam_without_a_table_names_the_flags(folder):
    with pytest.raises(ValueError, match="--embed_dir or --table_file"):
        main(["--store_dir", f"{folder}/store", "--output", f"{folder}/none.png", *SMALL])
