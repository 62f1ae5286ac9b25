"""MR from the store to a label map: pretraining, features, finetuning, evaluation and prediction, all with one map."""

import json

import nibabel as nib
import numpy as np
import pytest

import extract_backbone_weights
import main_ddp
import scripts.evaluate_segmentation
from datasets.ct.intensity import MR_RANGE
from datasets.lists.data_list import load_data_list
from datasets.store.volumes import StoreError, build_store
from engine.checkpoint import LATEST, CheckpointError, load_checkpoint
from engine.segmentation.setup import Preprocessing
from engine.segmentation.sliding_window import WindowOptions
from models.weights_file import read_weights_file
from scripts import extract_features, finetune_segmentation, predict
from tests.labelled_corpus import finetune_arguments
from tests.small_mr import AFFINE, make_mr_corpus

PERCENTILES = (1.0, 99.0)
PRETRAINING = (
    "--method simsiam --pairing random --backbone unet --feature_size 8 --roi_x 32 --roi_y 32 --roi_z 32 "
    "--batch_size 2 --epochs 1 --steps_per_epoch 1 --num_workers 0 --device cpu --precision fp32 --log_freq 1 "
    "--val_freq 0 --picture_freq 1 --warmup_epochs 0"
)
CPU = ("--device=cpu", "--overlap=0")


def stored(folder, num_channels: int = 1):
    make_mr_corpus(folder, num_channels=num_channels)
    cases = [case for name in ("training", "validation") for case in load_data_list(folder / "list.json", folder, name)]
    build_store(cases, folder / "store", (4.0, 4.0, 4.0), progress=False, mr_percentiles=PERCENTILES)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("mr"))


@pytest.fixture(scope="module")
def weights(corpus):
    """Of one step of SimSiam."""
    data = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--store_dir", str(corpus / "store")]
    main_ddp.main([*PRETRAINING.split(), *data, "--output_dir", str(corpus / "run")])
    extract_backbone_weights.main([str(corpus / "run" / LATEST), str(corpus / "mr.safetensors")])
    return corpus / "mr.safetensors"


@pytest.fixture(scope="module")
def finished(corpus, weights):
    finetune_segmentation.main(finetune_arguments(corpus, corpus / "finetuned", weights=weights, **LEAVE_TO_WEIGHTS))
    return corpus / "finetuned"


LEAVE_TO_WEIGHTS = dict.fromkeys(("backbone", "feature_size", "roi_x", "roi_y", "roi_z", "spacing_mm"))


def test_weights_say_that_they_are_of_mr(weights):
    described = read_weights_file(weights).description["preprocessing"]
    assert described["images"] == "mr" and described["mr_percentiles"] == list(PERCENTILES)
    assert (described["hu_min"], described["hu_max"]) == MR_RANGE
    known = Preprocessing.from_dict(described)
    assert known.as_dict() == described and known.mr_percentiles == PERCENTILES


def test_what_lies_outside_of_mr_is_its_lowest_value(corpus):
    known = Preprocessing(None, *map(float, MR_RANGE), (8, 8, 8), "mr", PERCENTILES)
    volume = known.read(corpus / "images" / "mr0.nii.gz")
    assert known.windows_for(volume, WindowOptions((8, 8, 8))).outside == MR_RANGE[0] == volume.array.min()


def test_a_finetuned_network_carries_the_map(finished):
    best = load_checkpoint(finished / "best.pth", "segmentation")
    assert best["preprocessing"]["images"] == "mr" and best["preprocessing"]["mr_percentiles"] == list(PERCENTILES)
    assert (finished / "evaluation" / "worst_and_best.png").stat().st_size > 5_000
    assert json.loads((finished / "evaluation" / "results.json").read_text())["num_cases"] == 1


def test_files_store_and_prediction_agree_at_any_scale(finished, corpus, tmp_path):
    checkpoint = f"--checkpoint_file={finished / 'best.pth'}"
    lists = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--window_batch=1"]
    scripts.evaluate_segmentation.main(
        [*lists, checkpoint, *CPU, "--output_dir", str(tmp_path / "e"), "--save_predictions"]
    )  # without the store: the files are mapped anew
    assert (tmp_path / "e/cases.csv").read_text() == (finished / "evaluation/cases.csv").read_text()
    image = nib.load(corpus / "images" / "mr2.nii.gz")
    nib.save(nib.Nifti1Image((image.get_fdata() * 37 + 500).astype(np.float32), AFFINE), tmp_path / "scaled.nii.gz")
    predict.main([str(tmp_path / "scaled.nii.gz"), str(tmp_path / "out.nii.gz"), checkpoint, *CPU])
    found = nib.load(tmp_path / "out.nii.gz").get_fdata()
    assert (found == nib.load(tmp_path / "e" / "predictions" / "mr2.nii.gz").get_fdata()).mean() > 0.999
    assert found.shape == image.shape


def test_features_of_files_and_store_agree(corpus, weights, tmp_path):
    words = [f"--weights={weights}", *CPU, f"--json_list={corpus / 'list.json'}"]
    extract_features.main([*words, f"--store_dir={corpus / 'store'}", f"--output_dir={tmp_path / 'a'}", "--form=npy"])
    extract_features.main([*words, f"--data_dir={corpus}", f"--output_dir={tmp_path / 'b'}", "--form=npy"])
    one, other = (np.load(tmp_path / side / "mr0.npy") for side in "ab")
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_store_of_another_kind_or_map_is_refused(finished, corpus, tmp_path):
    cases = load_data_list(corpus / "list.json", corpus, "validation")
    build_store(cases, tmp_path / "store", (4.0, 4.0, 4.0), progress=False, mr_percentiles=(0.5, 99.5))
    words = [f"--checkpoint_file={finished / 'best.pth'}", f"--data_dir={corpus}", *CPU]
    words += [f"--json_list={corpus / 'list.json'}", f"--output_dir={tmp_path / 'e'}", "--window_batch=1"]
    with pytest.raises(StoreError, match="mapped by the percentiles 0.5 99.5, but 1 99 were asked for"):
        scripts.evaluate_segmentation.main([*words, f"--store_dir={tmp_path / 'store'}"])
    changed = finetune_arguments(corpus, finished, store_dir=tmp_path / "store")
    with pytest.raises(CheckpointError, match="--mr_percentiles of the store 1 99 -> 0.5 99.5"):
        finetune_segmentation.main(changed)


def test_what_needs_ct_says_so(corpus, tmp_path):
    data = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--store_dir", str(corpus / "store")]
    with pytest.raises(ValueError, match="--probe_freq 1: frozen probes read CT, not MR"):
        main_ddp.main([*PRETRAINING.split(), *data, "--output_dir", str(tmp_path / "run"), "--probe_freq", "1"])
    with pytest.raises(ValueError, match="--memory true: SAM matches CT, and these cases are MR"):
        finetune_segmentation.main(finetune_arguments(corpus, tmp_path / "tuned", memory="true"))
