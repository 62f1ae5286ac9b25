"""ResEnc: nnU-Net's sizes, and the walk from pretraining by any method to labels. What it shares: staged backbones."""

import math
import re

import nibabel as nib
import pytest
import torch

import extract_backbone_weights
import main_ddp
from engine.checkpoint import LATEST
from models.backbones.resenc import ResEncBackbone, nnunet_network
from models.methods import METHODS
from models.segmenters import SEGMENTERS, kind_of
from scripts import finetune_segmentation, predict
from tests.labelled_corpus import finetune_arguments, make_labelled_corpus
from tests.test_methods import small
from tests.tiny_run import add_store_and_table, log_of, make_corpus

ROI = {"roi_z": 64, "roi_y": 32, "roi_x": 32}
TINY = {"backbone": "resenc", "feature_size": 2} | ROI


def test_feature_size_32_is_nnunets_preset_resencl() -> None:
    """Its channels, its 264 parameters, 224 of which are the encoder's, and its 102 million numbers."""
    with torch.device("meta"):
        library, ours = nnunet_network(1, 2, 32), ResEncBackbone(32, (64, 64, 64), with_masks=False)
    assert ours.channels == {1: 32, 2: 64, 4: 128, 8: 256, 16: 320, 32: 320}
    assert len(list(library.parameters())) == 264 and len(list(library.encoder.parameters())) == 224
    assert len(list(ours.encoder_twin().parameters())) == 224
    assert 102e6 < sum(p.numel() for p in ours.parameters()) < 103e6


def test_every_layer_has_one_name() -> None:
    """The library registers each twice; checkpoints would hold everything twice."""
    network = SEGMENTERS["resenc"].build(1, 3, 4)
    assert kind_of(network).name == "resenc"
    assert len(network.state_dict()) == len(list(network.parameters()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus"), 3, 0))


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    """Pretrains by a method in one step; returns the checkpoint."""
    root = tmp_path_factory.mktemp("pretrained")

    def run(method: str):
        main_ddp.main(small(method, corpus, root / method, epochs=1, steps_per_epoch=1, **TINY))
        return root / method / LATEST

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_pretrains_it(pretrained, tmp_path, method: str) -> None:
    checkpoint = pretrained(method)
    assert math.isfinite(log_of(checkpoint.parent)[-1]["loss"])
    extract_backbone_weights.main([str(checkpoint), str(tmp_path / "weights.pth")])
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    missing, unexpected = SEGMENTERS["resenc"].build(1, 3, 2).load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("decoder.", "out.")) for name in missing)


def test_weights_of_masked_image_modelling_finetune_and_predict(pretrained, tmp_path, capsys) -> None:
    extract_backbone_weights.main(
        [str(pretrained("alice")), str(tmp_path / "alice.pth"), "--checkpoint_key", "student"]
    )
    folder = make_labelled_corpus(tmp_path / "labelled", 1, 1)
    flags = {"weights": tmp_path / "alice.pth", "steps": 1, "evaluate": "false", "spacing_mm": 4, **TINY}
    finetune_segmentation.main(finetune_arguments(folder, tmp_path / "run", **flags))
    assert re.search(r"(2\d\d) of \1 keys", capsys.readouterr().out)
    image = folder / "images" / "case1_0000.nii.gz"
    predict.main([str(image), str(tmp_path / "labels.nii.gz"), "--checkpoint_file", str(tmp_path / "run" / LATEST)])
    assert nib.load(tmp_path / "labels.nii.gz").shape == nib.load(image).shape
