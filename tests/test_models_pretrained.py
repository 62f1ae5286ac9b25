"""Weights into networks: our loader on every spelling, and the loading snippets of other projects on our files."""

import json

import pytest
import torch
from monai.networks.nets import SwinUNETR
from safetensors.torch import load_file
from torch import nn

from engine.weights import save_weights
from models import load_pretrained
from models.backbones import BACKBONES
from models.pretrained import fit_input_channels
from models.segmenters import SEGMENTERS, freeze, kind_of, layer_groups
from models.weights_file import WeightsError, WeightsFile, read_weights_file

FEATURES = 12
DESCRIPTION = {
    "method": "alice",
    "backbone": {"name": "swin_unetr", "feature_size": FEATURES, "in_channels": 1},
    "preprocessing": {"axcodes": "SPL", "spacing_mm": [2.0, 1.5, 1.5], "hu_min": -125.0, "hu_max": 225.0},
    "step": 7,
}


def swin(out_channels: int = 4, in_channels: int = 1, seed: int = 0) -> SwinUNETR:
    torch.manual_seed(seed)
    return SwinUNETR(in_channels=in_channels, out_channels=out_channels, feature_size=FEATURES)


@pytest.fixture(scope="module")
def source():
    """The weights of a pretrained network, as extraction gives them: no output layer."""
    return {name: value for name, value in swin(1, seed=1).state_dict().items() if not name.startswith("out.")}


@pytest.fixture(scope="module")
def encoder(source):
    prefixes = BACKBONES["swin_unetr"].encoder_key_prefixes
    return {name: value for name, value in source.items() if name.startswith(prefixes)}


@pytest.fixture(scope="module")
def files(source, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / name for name in ("whole.pth", "whole.safetensors", "encoder.pth")}
    for name, path in paths.items():
        save_weights(encoder if name == "encoder.pth" else source, DESCRIPTION, path)
    return paths


# Our loader


@pytest.mark.parametrize("name", ["whole.pth", "whole.safetensors", "encoder.pth"])
def test_encoder_loads_from_our_files(name, files, encoder):
    model = swin()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_pretrained(model, files[name])
    assert len(report.loaded) == len(encoder) == 137 and report.share == 1
    assert not report.missing and not report.misshapen and not report.adapted
    for key, value in model.state_dict().items():
        assert torch.equal(value, encoder[key] if key in encoder else before[key]), key
    assert len(report.unexpected) == (0 if name == "encoder.pth" else 20), "the decoder is left alone"
    assert report.description == DESCRIPTION
    assert "137 of 137 keys of the encoder loaded" in report.describe()


def test_whole_network_loads_and_an_encoder_alone_is_refused_for_it(files, source):
    model = swin()
    report = load_pretrained(model, files["whole.safetensors"], part="whole")
    assert len(report.loaded) == len(source) == 157 and "out.conv.conv.weight" not in report.loaded
    assert torch.equal(
        model.state_dict()["decoder1.conv_block.conv1.conv.weight"], source["decoder1.conv_block.conv1.conv.weight"]
    )
    untouched = swin(seed=5)
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    with pytest.raises(WeightsError, match="137 of 157 keys.*87%.*an encoder only: .*--weights_part encoder"):
        load_pretrained(untouched, files["encoder.pth"], part="whole")
    without_some = {key: value for key, value in source.items() if not key.startswith("swinViT")}
    with pytest.raises(WeightsError, match="--feature_size"):
        load_pretrained(untouched, WeightsFile("decoder.pth", without_some), part="whole")
    assert all(torch.equal(value, before[key]) for key, value in untouched.state_dict().items())


SPELLINGS = {
    "as it is": lambda state: state,
    "DDP": lambda state: {"module." + k: v for k, v in state.items()},
    "compiled under DDP": lambda state: {"module._orig_mod." + k: v for k, v in state.items()},
    "in state_dict": lambda state: {"state_dict": {"module." + k: v for k, v in state.items()}, "epoch": 3},
    "our student": lambda state: {"student": {"backbone.network." + k: v for k, v in state.items()}},
    "older names": lambda state: {
        k.replace("swinViT", "swin_vit").replace("linear", "fc"): v for k, v in state.items()
    },
    "nnU-Net container": lambda state: {"network_weights": state},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_found_out(spelling, encoder, tmp_path):
    torch.save(SPELLINGS[spelling](encoder), tmp_path / "weights.pt")
    report = load_pretrained(swin(), tmp_path / "weights.pt")
    assert len(report.loaded) == 137, report.describe()


def test_bare_swin_transformer_of_monais_own_pretraining(encoder, tmp_path):
    bare = {"module." + key.removeprefix("swinViT."): v for key, v in encoder.items() if key.startswith("swinViT.")}
    torch.save({"state_dict": bare}, tmp_path / "model_swinvit.pt")
    report = load_pretrained(swin(), tmp_path / "model_swinvit.pt")
    assert len(report.loaded) == 126 and report.share == pytest.approx(126 / 137)


def test_one_channel_spreads_over_three(files):
    one, three = swin(), swin(in_channels=3)
    load_pretrained(one, files["encoder.pth"])
    report = load_pretrained(three, files["encoder.pth"])
    assert sorted(report.adapted) == sorted(
        ["swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight"]
    )
    x = torch.rand(1, 1, 32, 32, 32)
    embedded = [net.swinViT.patch_embed(x.expand(-1, n, -1, -1, -1)) for net, n in ((one, 1), (three, 3))]
    torch.testing.assert_close(*embedded)
    assert fit_input_channels(torch.zeros(4, 2, 3, 3, 3), torch.zeros(4, 3, 3, 3, 3)) is None, "2 channels fit no 3"


def test_wrong_size_foreign_and_broken_files_fail(files, tmp_path):
    torch.manual_seed(0)
    big = SwinUNETR(in_channels=1, out_channels=4, feature_size=24)
    with pytest.raises(WeightsError, match=r"misshapen \(swinViT.*\(12, 1, 2, 2, 2\) for \(24, 1, 2, 2, 2\)"):
        load_pretrained(big, files["encoder.pth"])
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(WeightsError, match="foreign.pth: 0 of 137 keys"):
        load_pretrained(swin(), tmp_path / "foreign.pth", min_share=0.0)
    (tmp_path / "torn.safetensors").write_bytes(files["whole.safetensors"].read_bytes()[:1000])
    with pytest.raises(WeightsError, match="torn.safetensors: not readable as safetensors"):
        read_weights_file(tmp_path / "torn.safetensors")
    torch.save(nn.Linear(2, 2), tmp_path / "object.pth")
    with pytest.raises(WeightsError, match="object.pth: holds pickled Python objects"):
        read_weights_file(tmp_path / "object.pth")
    with pytest.raises(WeightsError, match="no such weights file"):
        read_weights_file(tmp_path / "none.pth")


def test_values_that_are_not_finite_are_refused_and_named(encoder, tmp_path):
    name = "swinViT.layers2.0.blocks.1.attn.qkv.bias"
    broken = encoder[name].clone()
    broken[1] = float("nan")
    torch.save(encoder | {name: broken}, tmp_path / "w.pth")
    model = swin()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=f"w.pth: 1 of 137 tensors hold values that are not finite, first {name}"):
        load_pretrained(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["student first", "teacher first"])
def test_a_file_of_two_networks_is_refused_unless_one_is_chosen(encoder, order, tmp_path):
    """Neither is taken by chance of the order."""
    student = {f"student.backbone.{key}": value for key, value in encoder.items()}
    teacher = {f"teacher.{key}": value * 0 for key, value in encoder.items()}
    both = student | teacher if order == "student first" else teacher | student
    torch.save({"state_dict": both}, tmp_path / "both.pth")
    with pytest.raises(WeightsError, match=r"(student|teacher)\.\S+ and (student|teacher)\..*--checkpoint_key student"):
        load_pretrained(swin(), tmp_path / "both.pth")
    for network, factor in (("student", 1), ("teacher", 0)):
        model = swin()
        load_pretrained(model, read_weights_file(tmp_path / "both.pth", network))
        assert all(torch.equal(model.state_dict()[key], value * factor) for key, value in encoder.items())


def test_the_same_tensors_under_two_prefixes_are_one_network(encoder, tmp_path):
    torch.save(encoder | {f"module.{key}": value for key, value in encoder.items()}, tmp_path / "twice.pth")
    assert load_pretrained(swin(), tmp_path / "twice.pth").share == 1


def test_the_teacher_of_our_checkpoints_can_be_chosen(encoder, tmp_path):
    inner = {f"backbone.network.{key}": value for key, value in encoder.items()}
    torch.save({"student": inner, "teacher": {key: value + 1 for key, value in inner.items()}}, tmp_path / "run.pth")
    for network, more in (("auto", 0), ("student", 0), ("teacher", 1)):
        model = swin()
        load_pretrained(model, read_weights_file(tmp_path / "run.pth", network))
        name = "encoder1.layer.conv1.conv.weight"
        assert torch.equal(model.state_dict()[name], encoder[name] + more)


def test_a_changed_bit_is_found(tmp_path):
    """torch.load takes it as it is."""
    torch.save({"encoder": torch.full((100,), 2.0)}, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(b"\x00\x00\x00\x40") + 3] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert torch.load(tmp_path / "w.pth", weights_only=True)["encoder"][0] != 2
    with pytest.raises(WeightsError, match="w.pth: not a complete PyTorch file .the checksum of its part"):
        read_weights_file(tmp_path / "w.pth")


def test_a_network_of_ones_own_loads_whole_only(tmp_path):
    own = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    torch.save(own.state_dict(), tmp_path / "own.pth")
    assert (
        load_pretrained(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), tmp_path / "own.pth", part="whole").share == 1
    )
    with pytest.raises(ValueError, match="Sequential.*pass part='whole'"):
        load_pretrained(own, tmp_path / "own.pth")


def test_description_comes_with_both_formats(files):
    for name in ("whole.pth", "whole.safetensors"):
        assert read_weights_file(files[name]).description == DESCRIPTION
    assert json.loads((files["whole.pth"].parent / "whole.pth.json").read_text()) == DESCRIPTION


# What users of other projects paste. Each returns how many of the model's keys the file filled.


def load_not_strict(model: nn.Module, content: dict) -> int:
    """Names repaired as in SwinUNETR's and VoCo's finetuning, then strict=False."""
    state = content.get("state_dict", content)
    if any(name.startswith("module.") for name in state):
        state = {name.replace("module.", ""): value for name, value in state.items()}
    if any("swin_vit" in name for name in state):
        state = {name.replace("swin_vit", "swinViT"): value for name, value in state.items()}
    told = model.load_state_dict(state, strict=False)
    return len(model.state_dict()) - len(told.missing_keys)


def load_by_size(model: nn.Module, content: dict) -> int:
    """Every key whose name and size agree is taken, the others keep the model's values; then strict=True."""
    own = model.state_dict()
    fitting = {name: value for name, value in content.items() if name in own and value.size() == own[name].size()}
    model.load_state_dict({name: fitting.get(name, value) for name, value in own.items()}, strict=True)
    return len(fitting)


def load_swin_vit_alone(model: nn.Module, content: dict) -> int:
    """Only the transformer, by its prefix, strictly."""
    bare = {name.removeprefix("swinViT."): value for name, value in content.items() if name.startswith("swinViT.")}
    model.swinViT.load_state_dict(bare, strict=True)
    return len(bare)


@pytest.mark.parametrize(
    ("snippet", "name", "num_matched"),
    [
        (load_not_strict, "whole.pth", 157),
        (load_not_strict, "encoder.pth", 137),
        (load_by_size, "whole.pth", 157),
        (load_by_size, "encoder.pth", 137),
        (load_swin_vit_alone, "whole.pth", 126),
        (load_swin_vit_alone, "encoder.pth", 126),
        (load_not_strict, "whole.safetensors", 157),
        (load_by_size, "whole.safetensors", 157),
    ],
)
def test_snippets_of_other_projects_load_our_files(snippet, name, num_matched, files, source):
    model = swin(14)
    is_safe = name.endswith(".safetensors")
    content = load_file(files[name]) if is_safe else torch.load(files[name], weights_only=True)
    assert snippet(model, content) == num_matched
    key = "swinViT.layers3.0.blocks.1.attn.qkv.weight"
    assert torch.equal(model.state_dict()[key], source[key])


# Segmenters


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_backbone_has_a_segmenter_whose_encoder_is_known(name):
    kind = SEGMENTERS[name]
    network = kind.build(1, 5, 12, spatial_dims=max(BACKBONES[name].spatial_dims))
    assert kind_of(network) is kind
    keys = list(network.state_dict())
    decoder = BACKBONES[name].decoder_key_prefixes
    for key in keys:
        families = [key.startswith(p) for p in (kind.encoder_key_prefixes, decoder, kind.output_key_prefixes)]
        assert sum(families) == 1, key
        assert (kind.depth_of(key) == kind.num_depths - 1) == (not families[0]), key
    with pytest.raises(ValueError, match="--roi_x"):
        kind.check_sizes(12, (20, 32, 32))


def test_layer_decay_and_freezing():
    kind = SEGMENTERS["unet"]
    network = kind.build(1, 3, 8)
    groups = layer_groups(network, kind, 0.5, lambda name, p: p.ndim > 1)
    assert {group["lr_scale"] for group in groups} == {0.5**n for n in range(kind.num_depths)}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    last = next(group for group in groups if any(p is network.out.conv.conv.weight for p in group["params"]))
    assert last["lr_scale"] == 1 and last["is_decayed"]
    encoder = {name: p for name, p in network.named_parameters() if name.startswith("encoder.")}
    freeze(network, encoder)
    assert not any(p.requires_grad for p in encoder.values()) and network.out.conv.conv.weight.requires_grad
    freeze(network, encoder, is_frozen=False)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="--layer_decay"):
        layer_groups(network, kind, 0.0, lambda name, p: True)
    with pytest.raises(ValueError, match="nothing to freeze"):
        freeze(network, [])
