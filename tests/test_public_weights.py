"""Published weights load by their own names: what is taken, what is left, and what is refused. Layouts, not values."""

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from engine.features import load_features
from engine.flags import REPOSITORY
from engine.weights import start_from
from models import load_pretrained
from models.backbones import BACKBONES, segmentation_network
from models.methods import METHODS
from models.pretrained import LoadReport
from models.segmenters import SEGMENTERS
from models.weights_file import WeightsError

FEATURES = 12
# Encoder and whole network (without the output layer) of either version, in entries of their state dicts.
ENTRIES = {"swin_unetr": (137, 157), "swin_unetr_v2": (145, 165)}
SWIN_VIT = {"swin_unetr": 126, "swin_unetr_v2": 134}


def source(backbone: str) -> dict[str, Tensor]:
    """A network's weights under MONAI's names, none of which is what a new network starts with."""
    torch.manual_seed(1)
    network = SwinUNETR(in_channels=1, out_channels=5, feature_size=FEATURES, use_v2=backbone == "swin_unetr_v2")
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in
            network.state_dict().items()}  # fmt: skip


def older(name: str) -> str:
    """MONAI's older names of the layers in an MLP."""
    return name.replace("mlp.linear", "mlp.fc")


def zeros(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


def swin_vit_of_monai() -> dict:
    """model_swinvit.pt: the bare transformer under DDP's prefix, the heads of three tasks; a score as numpy has it."""
    weights = source("swin_unetr")
    bare = {
        f"module.{older(name.removeprefix('swinViT.'))}": value
        for name, value in weights.items()
        if name.startswith("swinViT.")
    }
    heads = ("norm", "rotation_head", "contrastive_head", "convTrans3d")
    return {
        "best_acc": np.float64(0.5),
        "state_dict": bare | zeros(*(f"module.{n}.{k}" for n in heads for k in ("weight", "bias"))),
    }


def masked_modelling_of_monai() -> dict:
    """ssl_pretrained_weights.pth: SwinUNETR after masked image modelling, stages nested once more, one output."""
    named = {}
    for name, value in source("swin_unetr").items():
        own = name.replace("swinViT.patch_embed.", "encoder.patch_embed.")
        for stage in range(1, 5):
            own = own.replace(f"swinViT.layers{stage}.0.", f"encoder.layers{stage}.0.0.")
        named[own] = value
    return {"model": named | zeros("encoder.mask_token", "encoder.norm.weight", "encoder.norm.bias")}


def suprem() -> dict:
    """supervised_suprem_swinunetr_2100.pth: SwinUNETR inside a model with a head for each organ, and its optimiser."""
    weights = {f"module.backbone.{name}": value for name, value in source("swin_unetr").items()}
    beside = ("precls_conv.0.weight", "precls_conv.2.bias", "GAP.3.weight", "controller.weight")
    weights |= zeros("module.organ_embedding", "module.text_to_vision.weight", *(f"module.{name}" for name in beside))
    return {"net": weights, "optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 3}, "epoch": 3}


def voco_ssl() -> dict:
    """VoCo_B_SSL_head.pt: encoder and skip blocks of version 2, and the heads of student and teacher."""
    encoder = {
        f"backbone.{name}": value
        for name, value in source("swin_unetr_v2").items()
        if name.startswith(BACKBONES["swin_unetr_v2"].encoder_key_prefixes)
    }
    return encoder | zeros("student.layer1.0.weight") | {"teacher.layer1.0.weight": torch.ones(2, 2)}


def voco_omni() -> dict:
    """VoComni_B.pt: a segmentation network of version 2."""
    return {"state_dict": source("swin_unetr_v2")}


FILES = {
    "model_swinvit.pt": (swin_vit_of_monai, "swin_unetr", 126, 126),
    "ssl_pretrained_weights.pth": (masked_modelling_of_monai, "swin_unetr", 137, 157),
    "supervised_suprem_swinunetr_2100.pth": (suprem, "swin_unetr", 137, 157),
    "VoCo_B_SSL_head.pt": (voco_ssl, "swin_unetr_v2", 145, 145),
    "VoComni_B.pt": (voco_omni, "swin_unetr_v2", 145, 165),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    for name, (layout, *_) in FILES.items():
        torch.save(layout(), folder / name)
    return folder


def segmenter(backbone: str) -> nn.Module:
    torch.manual_seed(0)
    return SEGMENTERS[backbone].build(1, 14, FEATURES)


def check_loaded(network: nn.Module, report: LoadReport, backbone: str) -> None:
    """What the report calls loaded has the file's values, and nothing else."""
    expected, own = source(backbone), network.state_dict()
    assert report.loaded
    for name, value in own.items():
        is_same = value.shape == expected[name].shape and torch.equal(value, expected[name])
        assert is_same or name not in report.loaded, name
        assert not is_same or name in report.loaded or not value.is_floating_point(), name


@pytest.mark.parametrize("name", FILES)
def test_encoders_of_published_files_load(name, folder):
    _, backbone, num_encoder, _ = FILES[name]
    network = segmenter(backbone)
    report = load_pretrained(network, folder / name)
    check_loaded(network, report, backbone)
    assert len(report.loaded) == num_encoder and not report.misshapen
    assert report.counts() == (num_encoder, ENTRIES[backbone][0])
    assert f"{num_encoder} of {ENTRIES[backbone][0]} keys of the encoder loaded" in report.describe()
    assert all(not key.startswith("swinViT.") for key in report.missing)


@pytest.mark.parametrize("name", [name for name, (*_, whole) in FILES.items() if whole in (157, 165)])
def test_decoders_of_published_segmenters_load_too(name, folder):
    _, backbone, _, num_whole = FILES[name]
    network = segmenter(backbone)
    report = load_pretrained(network, folder / name, part="whole")
    check_loaded(network, report, backbone)
    assert len(report.loaded) == num_whole == ENTRIES[backbone][1]
    assert "out.conv.conv.weight" not in report.loaded


@pytest.mark.parametrize("name", FILES)
def test_what_is_left_is_reported(name, folder):
    report = load_pretrained(segmenter(FILES[name][1]), folder / name)
    text = report.describe()
    if name == "model_swinvit.pt":
        assert len(report.missing) == 11 and len(report.unexpected) == 8 and "11 missing (encoder1." in text
    elif "suprem" in name:
        assert {"controller.weight", "organ_embedding", "out.conv.conv.weight"} <= set(report.unexpected)
    assert ("unexpected" in text) == bool(report.unexpected)


@pytest.mark.parametrize(("name", "other"), [("VoComni_B.pt", "swin_unetr"), ("model_swinvit.pt", "swin_unetr_v2"),
                                             ("supervised_suprem_swinunetr_2100.pth", "swin_unetr_v2")])  # fmt: skip
def test_the_other_version_of_swin_unetr_is_refused(name, other, folder):
    """Nine tenths of their names agree."""
    network = segmenter(other)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=f"{name}.*of SwinUNETR.*--backbone {FILES[name][1]}.*network is .*{other}"):
        load_pretrained(network, folder / name, min_share=0.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_networks_that_we_lack_are_refused(tmp_path):
    """SuPreM's U-Net and nnU-Net's encoder are other networks than `unet`."""
    layouts = {
        "supervised_suprem_unet_2100.pth": {"net": zeros("module.backbone.down_tr64.ops.0.conv1.weight")},
        "nnssl.pth": {"network_weights": zeros("encoder.stages.0.0.conv1.conv.weight", "encoder.stem.convs.0.weight")},
    }
    for name, content in layouts.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name}: 0 of .* keys.*--backbone"):
            load_pretrained(SEGMENTERS["unet"].build(1, 3, 8), tmp_path / name, min_share=0.0)


@pytest.mark.parametrize("name", ["model_swinvit.pt", "supervised_suprem_swinunetr_2100.pth"])
def test_pretraining_goes_on_from_published_weights(name, folder):
    """--checkpoint_file: student and teacher start from them."""
    torch.manual_seed(0)
    method = METHODS["dino"](
        METHODS["dino"].Options(out_dim=16, head_hidden_dim=16, head_bottleneck_dim=8),
        lambda decoder_stride, with_masks: BACKBONES["swin_unetr"](
            FEATURES, (64, 32, 32), decoder_stride, False, with_masks
        ),
    )
    report = start_from(method, folder / name)
    key = "swinViT.layers3.0.blocks.1.mlp.linear1.weight"
    assert key in report.loaded and not report.missing
    for part in (method.student, method.teacher):
        assert torch.equal(part.backbone.network.state_dict()[key], source("swin_unetr")[key])


def test_features_come_from_published_weights(folder):
    extract = load_features(
        folder / "VoCo_B_SSL_head.pt",
        "cpu",
        backbone="swin_unetr_v2",
        feature_size=FEATURES,
        roi_z=32,
        roi_y=32,
        roi_x=32,
    )
    assert extract.report.share == 1 and len(extract.report.loaded) == SWIN_VIT["swin_unetr_v2"]
    with pytest.raises(WeightsError, match="--backbone swin_unetr_v2"):
        load_features(folder / "VoCo_B_SSL_head.pt", "cpu", feature_size=FEATURES)


# Ours


def test_the_unet_that_comes_along_fills_its_network_and_names_no_folder():
    path = REPOSITORY / "weights" / "alice_unet_phantom.safetensors"
    assert path.stat().st_size < 4e6 and b"/home/" not in path.read_bytes() and b"/tmp/" not in path.read_bytes()
    network = segmentation_network("unet", 1, 14, 16)
    report = load_pretrained(network, path, min_share=1.0, part="whole")
    assert not report.misshapen and not report.unexpected and len(report.loaded) == 73
    assert report.description["preprocessing"]["spacing_mm"] == [6.0, 6.0, 6.0]
    assert all(value.isfinite().all() for value in network.state_dict().values())
