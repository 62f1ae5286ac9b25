"""A `resenc` as nnU-Net's own checkpoint: its fields, and its names in the library's network."""

import json
import pydoc
from pathlib import Path

import pytest
import torch
from torch import nn

import extract_backbone_weights
from engine.checkpoint import CheckpointError
from models.backbones import BACKBONES
from models.nnunet_checkpoint import nnunet_name

ROI = (64, 32, 32)
PREPROCESSING = {"axcodes": "SPL", "spacing_mm": [4.0, 3.0, 3.0], "hu_min": -125.0, "hu_max": 225.0, "roi": list(ROI)}
BACKBONE = {"name": "resenc", "feature_size": 4, "in_channels": 1}


def backbone(seed: int, decoder_stride: int | None = 1) -> nn.Module:
    """With norms that are not the library's first ones, so that every tensor counts."""
    torch.manual_seed(seed)
    built = BACKBONES["resenc"](BACKBONE["feature_size"], ROI, decoder_stride, False)
    for name, parameter in built.network.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("1.weight")), std=0.1)
    return built


def write_checkpoint(path: Path, **changed) -> Path:
    """A pretraining checkpoint of the student with a decoder and the teacher without, as far as extraction reads it."""
    parts = {"student": backbone(0), "teacher": backbone(1, None)}
    states = {part: {f"backbone.{key}": v for key, v in one.state_dict().items()} for part, one in parts.items()}
    described = {"step": 7, "epoch": 1, "commit": "abc", "versions": {"torch": "2"}, "flags": {}}
    state = {"kind": "alice", **states, "backbone": BACKBONE, "preprocessing": PREPROCESSING, **described} | changed
    torch.save(state, path)
    return path


def extract(checkpoint: Path, output: Path, *more: str) -> dict:
    extract_backbone_weights.main([str(checkpoint), str(output), "--format=nnunet", *more])
    return torch.load(output.with_suffix(".pth"), weights_only=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pth")


def network_of(plan: dict, num_classes: int) -> nn.Module:
    """The network as nnU-Net builds it from a plan."""
    kwargs = dict(plan["arch_kwargs"])
    for name in plan["arch_kwargs_requiring_import"]:
        kwargs[name] = kwargs[name] and pydoc.locate(kwargs[name])
    return pydoc.locate(plan["arch_class_name"])(input_channels=1, num_classes=num_classes, **kwargs)


def stripped(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix + "."): value for name, value in weights.items() if name.startswith(prefix)}


def not_plain(value: object) -> list[object]:
    """Values other than CPU tensors and Python's own plain ones; nnU-Net's reader refuses some of them."""
    if isinstance(value, dict):
        return [wrong for one in (*value, *value.values()) for wrong in not_plain(one)]
    if isinstance(value, list):
        return [wrong for one in value for wrong in not_plain(one)]
    is_plain = type(value) in (str, int, float, bool, type(None)) or (type(value) is torch.Tensor and value.is_cpu)
    return [] if is_plain else [value]


def test_the_file_has_the_fields_that_nnunet_reads(checkpoint, tmp_path) -> None:
    content = extract(checkpoint, tmp_path / "nnunet.pth")
    plan = content["nnssl_adaptation_plan"]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration == {"spacing": [4.0, 3.0, 3.0], "patch_size": [64, 32, 32]}
    assert plan["recommended_downstream_patchsize"] == [64, 32, 32] and plan["pretrain_num_input_channels"] == 1
    assert (plan["key_to_encoder"], plan["key_to_stem"], plan["key_to_lpe"]) == ("encoder.stages", "encoder.stem", None)
    assert all(f"{key}.weight" in content["network_weights"] for key in plan["keys_to_in_proj"])
    assert plan["architecture_plans"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32, 64, 128]
    assert [cited["name"] for cited in content["citations"]] == ["ResEnc U-Net", "alice"]
    assert all(cited["apa_citations"] and cited["type"] for cited in content["citations"])
    assert content["pretraining"]["module"] == "student"
    assert json.loads((tmp_path / "nnunet.pth.json").read_text()) == content["pretraining"]
    assert not_plain(content) == []


def test_encoder_and_stem_load_strictly_and_compute_the_same(checkpoint, tmp_path) -> None:
    content, ours = extract(checkpoint, tmp_path / "nnunet"), backbone(0)
    weights = content["network_weights"]
    network = network_of(content["nnssl_adaptation_plan"]["architecture_plans"], 3)
    for name in ("encoder.stages", "encoder.stem"):
        network.get_submodule(name).load_state_dict(stripped(weights, name))
    x = torch.rand(1, 1, *ROI)
    with torch.no_grad():
        for theirs, expected in zip(network.encoder(x), ours.encode(x).values(), strict=True):
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


def test_all_but_the_heads_is_there_and_computes_the_same(checkpoint, tmp_path) -> None:
    """As the release's -pretrained_weights wants it: every name of the network, and equal tensors for equal layers."""
    content, ours = extract(checkpoint, tmp_path / "nnunet.pth"), backbone(0)
    weights = content["network_weights"]
    network = network_of(content["nnssl_adaptation_plan"]["architecture_plans"], 1)
    wanted = {name: value.shape for name, value in network.state_dict().items() if ".seg_layers." not in name}
    assert {name: value.shape for name, value in weights.items()} == wanted
    copies = {name for name in weights if name.startswith("decoder.encoder.")}
    assert copies and all(torch.equal(weights[name], weights[name.removeprefix("decoder.")]) for name in copies)
    network.load_state_dict(network.state_dict() | weights)
    network.decoder.seg_layers[-1].load_state_dict(ours.network.out.state_dict())
    x = torch.rand(1, 1, *ROI)
    with torch.no_grad():
        torch.testing.assert_close(network(x), ours.decode(ours.encode(x))[0], rtol=1e-4, atol=1e-4)


def test_a_part_without_a_decoder_leaves_nnunets_random_one(checkpoint, tmp_path, capsys) -> None:
    contents = [extract(checkpoint, tmp_path / f"{n}.pth", "--checkpoint_key=teacher") for n in range(2)]
    assert "the teacher has no decoder" in capsys.readouterr().out
    first, second = (content["network_weights"] for content in contents)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    stem = backbone(1).network.state_dict()["embed.convs.0.all_modules.0.weight"]
    assert torch.equal(first["encoder.stem.convs.0.conv.weight"], stem)
    assert first["decoder.stages.0.convs.0.conv.weight"].std() > 0


def test_native_spacing_is_left_to_nnunet(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth", preprocessing=PREPROCESSING | {"spacing_mm": "native"})
    plan = extract(path, tmp_path / "nnunet.pth")["nnssl_adaptation_plan"]
    assert plan["pretrain_plan"]["configurations"]["pretraining"]["spacing"] is None


def test_what_does_not_fit_is_refused_by_name(checkpoint, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="is for the backbone resenc, .* is unet: .*--backbone resenc"):
        extract(write_checkpoint(tmp_path / "unet.pth", backbone=BACKBONE | {"name": "unet"}), tmp_path / "out.pth")
    plain = {key: value for key, value in PREPROCESSING.items() if key != "spacing_mm"}
    with pytest.raises(CheckpointError, match="holds no 'spacing_mm'"):
        extract(write_checkpoint(tmp_path / "no_spacing.pth", preprocessing=plain), tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match="--with_head"):
        extract(checkpoint, tmp_path / "out.pth", "--with_head")
    with pytest.raises(ValueError, match="--format nnunet writes .pth"):
        extract(checkpoint, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="head.weight: expected the name of a weight of resenc"):
        nnunet_name("head.weight")
    assert not list(tmp_path.glob("out*"))
