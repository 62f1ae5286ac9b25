"""CAiD on radiographs, by main_ddp.py and its recipe: it trains, resumes and describes what it used."""

from pathlib import Path

import numpy as np
import pytest
import torch

import main_ddp
from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case, write_data_list
from datasets.lists.search import find_cases
from datasets.store.volumes import StoreError, VolumeStore, fill_store
from engine.checkpoint import LATEST
from tests.fakes import spl_affine
from tests.small_radiographs import small_phantoms

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "caid_xray.yaml"
SMALL = (
    "--roi_x 64 --roi_y 64 --spacing_mm native --batch_size 2 --queue_size 8 --epochs 2 --steps_per_epoch 1 "
    "--num_workers 0 --device cpu --precision fp32 --log_freq 1 --val_freq 2 --num_val_pairs 2 --picture_freq 2"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xray")
    small_phantoms(folder)
    return folder


def run(pictures, output_dir, *words: str, json_list: str = "xray.json") -> dict:
    data = ["--data_dir", str(pictures), "--json_list", str(pictures / json_list)]
    store = ["--store_dir", str(pictures / "store"), "--output_dir", str(output_dir)]
    main_ddp.main(["--config", str(CONFIG), *data, *store, *SMALL.split(), *words])
    return torch.load(output_dir / LATEST, weights_only=True)


def test_two_steps_equal_a_stop_between_them(pictures, tmp_path, one_thread):
    whole = run(pictures, tmp_path / "whole", "--keep_freq", "1")
    assert whole["step"] == 2 and whole["num_training_cases"] == 3
    known = whole["preprocessing"]
    assert (known["hu_min"], known["hu_max"], known["roi"]) == (None, None, [1, 64, 64])  # each picture's own range
    assert whole["backbone"]["name"] == "resnet50_unet"
    assert (tmp_path / "whole" / "reconstruction.png").exists()
    store = VolumeStore(pictures / "store")
    assert store.kind == "radiograph" and len(store) == 4
    parts = run(pictures, tmp_path / "parts", "--resume", str(tmp_path / "whole" / "checkpoint0001.pth"))
    for part in ("student", "teacher", "queue"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part


def test_flags_say_the_window(pictures, tmp_path):
    window = ["--a_min", "-32768", "--a_max", "-28673"]
    state = run(pictures, tmp_path / "run", *window, "--epochs", "1", "--val_freq", "0", "--picture_freq", "0")
    assert (state["preprocessing"]["hu_min"], state["preprocessing"]["hu_max"]) == (-32768.0, -28673.0)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--roi_z", "32", "--backbone", "unet", "--roi_x", "32", "--roi_y", "32"], "--roi_z 32: .*set --roi_z 1"),
        (["--probe_freq", "1"], "--probe_freq 1: frozen probes read CT"),
    ],
)
def test_what_radiographs_cannot_do_is_said(pictures, tmp_path, words, reason):
    with pytest.raises(ValueError, match=reason):
        run(pictures, tmp_path / "run", *words)


def test_ct_is_not_put_into_a_store_of_radiographs(pictures, tmp_path):
    fill_store(find_cases(pictures), pictures / "store")
    write_nifti(tmp_path / "ct.nii.gz", np.arange(-600, 600, dtype=np.int16).reshape(10, 10, 12), spl_affine())
    write_data_list(pictures / "ct.json", pictures, [Case("ct", tmp_path / "ct.nii.gz")])
    with pytest.raises(StoreError, match="holds radiographs, expected CT"):
        run(pictures, tmp_path / "run", json_list="ct.json")
