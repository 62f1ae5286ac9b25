"""The published variant as a whole, from its config to weights in a segmentation network."""

import pytest
import torch

import extract_backbone_weights
import main_ddp
from engine.checkpoint import LATEST
from engine.flags import REPOSITORY
from models.backbones import segmentation_network
from models.weights_file import read_weights_file
from tests.tiny_run import add_store_and_table, arguments, log_of, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.mark.parametrize("name", ["alice_published", "alice_nnformer"])
def test_config_trains_and_its_weights_fill_a_segmentation_network(corpus, tmp_path, capsys, name):
    small = {"roi_z": 32, "roi_y": 32, "roi_x": 16, "feature_size": 6, "epochs": 1, "steps_per_epoch": 2}
    config = REPOSITORY / "configs" / f"{name}.yaml"
    main_ddp.main(["--config", str(config), *arguments(corpus, tmp_path / "run", **small)])
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]
    state = torch.load(tmp_path / "run" / LATEST, weights_only=True)
    assert state["backbone"] == {"name": "nnformer", "feature_size": 6, "in_channels": 1}
    is_published = name == "alice_published"
    assert (state["flags"]["casa_variant"] == "published") is is_published
    assert ("casa.Cross_Att.MH_attn.w_qs.weight" in state["teacher"]) is is_published
    for key in ("student", "teacher"):
        output = tmp_path / f"{key}.pth"
        extract_backbone_weights.main([str(tmp_path / "run" / LATEST), str(output), "--checkpoint_key", key])
        network = segmentation_network("nnformer", in_channels=1, out_channels=3, feature_size=6)
        missing, unexpected = network.load_state_dict(read_weights_file(output).tensors, strict=False)
        expected = ("out.",) if key == "student" else ("out.", "decoder.")
        assert unexpected == [] and missing and all(name.startswith(expected) for name in missing)
    assert "encoder" in capsys.readouterr().out
