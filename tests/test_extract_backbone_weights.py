"""Extraction: one layout for student and teacher, fit for MONAI's SwinUNETR, in both formats; clear refusals."""

import json
import re

import pytest
import torch
from monai.networks.nets import SwinUNETR
from safetensors import safe_open

import extract_backbone_weights
import main_ddp
from engine.checkpoint import CheckpointError
from engine.device import make_scaler
from engine.flags import REPOSITORY
from engine.optim import make_optimizer
from engine.run import RunState
from engine.weights import halved, start_from
from models.backbones import segmentation_network
from models.methods import Method
from models.pretrained import load_pretrained
from models.weights_file import read_weights_file
from tests.tiny_run import TINY

CPU = torch.device("cpu")


def build(**changed) -> Method:
    flags = main_ddp.make_flags().parse_args([f"--{name}={value}" for name, value in (TINY | changed).items()])
    torch.manual_seed(3)
    return main_ddp.build_method(flags)


PREPROCESSING = {"axcodes": "SPL", "spacing_mm": [2, 1.5, 1.5], "roi": [64, 32, 32]}


def write_checkpoint(path, **changed):
    method = build(**changed)
    description = {
        "kind": "alice", "flags": {}, "commit": "abc", "versions": {},
        "preprocessing": PREPROCESSING,
        "backbone": {"name": "swin_unetr", "feature_size": 12, "in_channels": 1},
    }  # fmt: skip
    run = RunState(method, make_optimizer(method.student, 0.1, 0, CPU), make_scaler("fp32", CPU), description, 7)
    torch.save(run.as_checkpoint(5), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pth")


def monai_network() -> SwinUNETR:
    return SwinUNETR(in_channels=1, out_channels=14, feature_size=12)


def extract(checkpoint, output, *more) -> None:
    extract_backbone_weights.main([str(checkpoint), str(output), *more])


@pytest.mark.parametrize("key", ["student", "teacher"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_fill_monais_network(checkpoint, tmp_path, capsys, key, suffix):
    output = tmp_path / f"alice{suffix}"
    extract(checkpoint, output, "--checkpoint_key", key)
    told = capsys.readouterr().out
    assert re.search(r"encoder (\d+)/\1, ", told)
    assert re.search(r"decoder (\d+)/\1 keys" if key == "student" else r"decoder 0/[1-9]", told)
    weights = torch.load(output, weights_only=True) if suffix == ".pth" else read_weights_file(output).tensors
    network = monai_network()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == []
    own_layers = {"out.conv.conv.weight", "out.conv.conv.bias"}
    if key == "student":
        assert set(missing) == own_layers
    else:
        assert {name.split(".")[0] for name in missing} == {f"decoder{i}" for i in range(1, 6)} | {"out"}
    source = torch.load(checkpoint, weights_only=True)[key]
    for name in weights:
        assert torch.equal(network.state_dict()[name], source[f"backbone.network.{name}"]), name


@pytest.mark.parametrize(("key", "name"), [("teacher", "backbone.network.encoder1.layer.conv1.conv.weight"),
                                           ("student", "head.mlp.0.bias")])  # fmt: skip
def test_weights_that_are_not_finite_are_no_result(checkpoint, tmp_path, key, name):
    state = torch.load(checkpoint, weights_only=True)
    state[key][name][0] = float("inf")
    torch.save(state, tmp_path / "broken.pth")
    told = f"broken.pth: 1 of .* not finite, first {name.removeprefix('backbone.network.')}"
    with pytest.raises(CheckpointError, match=told):
        extract(tmp_path / "broken.pth", tmp_path / "out.pth", "--checkpoint_key", key, "--with_head")
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(CheckpointError, match=r"--checkpoint_file .*broken.pth: .*not finite"):
        if key == "teacher":  # --checkpoint_file takes the student
            state["student"][name][0] = float("inf")
            torch.save(state, tmp_path / "broken.pth")
        start_from(build(), tmp_path / "broken.pth")


def test_an_encoder_with_a_hole_is_refused(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    del state["teacher"]["backbone.network.swinViT.patch_embed.proj.weight"]
    torch.save(state, tmp_path / "hole.pth")
    with pytest.raises(CheckpointError, match=r"hole.pth: damaged: .* 1 are missing, first swinViT.patch_embed.proj"):
        extract(tmp_path / "hole.pth", tmp_path / "out.pth", "--checkpoint_key", "teacher")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", ["epoch", "backbone"])
def test_a_checkpoint_that_lacks_an_entry_names_it(checkpoint, tmp_path, name):
    state = torch.load(checkpoint, weights_only=True)
    del state[name]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=f"cut.pth: holds no '{name}'; expected a checkpoint of main_ddp.py"):
        extract(tmp_path / "cut.pth", tmp_path / "out.pth")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"teacher": None}, "its teacher is None, expected dict"),
        ({"backbone": "unet"}, "its backbone is 'unet', expected dict"),
        ({"backbone": {"name": "unet"}}, "holds no 'feature_size', 'in_channels'"),
        ({"preprocessing": [1]}, r"its preprocessing is \[1\], expected dict"),
        ({"teacher": {"backbone.network.a": "text"}}, "'backbone.network.a' of its teacher is no tensor"),
    ],
)
def test_a_checkpoint_whose_entries_are_of_a_wrong_type_is_refused(checkpoint, tmp_path, changed, message):
    torch.save(torch.load(checkpoint, weights_only=True) | changed, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"odd.pth: {message}"):
        extract(tmp_path / "odd.pth", tmp_path / "out.pth")


def test_description_travels_with_the_weights(checkpoint, tmp_path):
    extract(checkpoint, tmp_path / "alice.pth")
    extract(checkpoint, tmp_path / "alice.safetensors")
    beside = json.loads((tmp_path / "alice.pth.json").read_text())
    with safe_open(tmp_path / "alice.safetensors", framework="pt") as file:
        inside = file.metadata()
    assert beside["method"] == inside["method"] == "alice"
    assert beside["module"] == "teacher" and beside["step"] == 7 and beside["commit"] == "abc"
    assert beside["preprocessing"] == json.loads(inside["preprocessing"]) == PREPROCESSING
    assert beside["backbone"]["feature_size"] == 12


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_loads_into_a_float32_network(checkpoint, tmp_path, suffix):
    extract(checkpoint, tmp_path / f"whole{suffix}")
    extract(checkpoint, tmp_path / f"half{suffix}", "--half")
    whole, half = (read_weights_file(tmp_path / f"{name}{suffix}") for name in ("whole", "half"))
    assert half.tensors.keys() == whole.tensors.keys() and half.description == whole.description
    assert (tmp_path / f"half{suffix}").stat().st_size < 0.7 * (tmp_path / f"whole{suffix}").stat().st_size
    network = monai_network()
    load_pretrained(network, half)
    loaded = network.state_dict()
    for name, value in whole.tensors.items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=2e-3, atol=1e-6)
    with pytest.raises(CheckpointError, match="x holds numbers above 65504, too large for --half"):
        halved({"x": torch.tensor([1e6])}, "checkpoint.pth")


def test_head_comes_along_only_when_asked(checkpoint, tmp_path):
    for more, expected in (((), False), (("--with_head",), True)):
        extract(checkpoint, tmp_path / "alice.pth", *more)
        names = torch.load(tmp_path / "alice.pth", weights_only=True)
        assert any(name.startswith("head.last_layer") for name in names) is expected
        assert not any(name.startswith(("backbone.", "casa.", "out.")) or "mask_token" in name for name in names)


def test_snippet_of_the_docstring_runs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extract(checkpoint, "alice.pth")
    snippet = snippet_of(extract_backbone_weights.__doc__).replace("feature_size=48", "feature_size=12")
    assert "load_state_dict" in snippet
    exec(snippet, {})


def test_snippet_of_the_readme_runs(checkpoint, tmp_path, monkeypatch):
    readme = (REPOSITORY / "README.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_state_dict" in block]
    assert blocks, "the README shows no loading snippet"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for block in blocks:
        for output in re.findall(r"torch\.load\(\"([^\"]+)\"", block):
            (tmp_path / output).parent.mkdir(parents=True, exist_ok=True)
            extract(checkpoint, output)
        exec(re.sub(r"feature_size=\d+", "feature_size=12", block), {})


def snippet_of(docstring: str) -> str:
    lines = docstring.split("load like this:")[1].split("A .pth holds")[0].splitlines()
    return "\n".join(line.strip() for line in lines)


def test_run_without_reconstruction_exports_its_encoder(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "cls_only.pth", lambda2=0, lambda3=0)
    extract(path, tmp_path / "alice.pth", "--checkpoint_key", "student")
    told = capsys.readouterr().out
    assert "decoder 0/" in told and "not trained" in told
    monai_network().load_state_dict(torch.load(tmp_path / "alice.pth", weights_only=True), strict=False)


def test_wrong_files_are_refused_by_name(checkpoint, tmp_path):
    torch.save({"kind": "sam_embed", "state_dict": {}}, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match="sam.pth: not a checkpoint of kind 'alice'.*sam_embed"):
        extract(tmp_path / "sam.pth", tmp_path / "out.pth")
    extract(checkpoint, tmp_path / "alice.pth")
    with pytest.raises(CheckpointError, match="alice.pth: not a checkpoint of kind 'alice'.*swinViT"):
        extract(tmp_path / "alice.pth", tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match="absent.pth"):
        extract(tmp_path / "absent.pth", tmp_path / "out.pth")
    with pytest.raises(ValueError, match="out.onnx: expected a name that ends in .pth or .safetensors"):
        extract(checkpoint, tmp_path / "out.onnx")
    assert not (tmp_path / "out.pth").exists()


def test_nothing_to_extract_is_an_error_not_an_empty_file(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    bare = {name.removeprefix("backbone."): value for name, value in state["teacher"].items()}
    torch.save(state | {"teacher": bare}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract(tmp_path / "bare.pth", tmp_path / "out.pth", "--checkpoint_key", "teacher")
    renamed = {name.replace("swinViT", "vit"): value for name, value in state["teacher"].items()}
    torch.save(state | {"teacher": renamed}, tmp_path / "renamed.pth")
    with pytest.raises(CheckpointError, match="does not fit swin_unetr"):
        extract(tmp_path / "renamed.pth", tmp_path / "out.pth")
    torch.save(state | {"backbone": {**state["backbone"], "feature_size": 24}}, tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match="feature size 24: .*misshapen"):
        extract(tmp_path / "wider.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def constant_method(**changed) -> Method:
    """A method whose student and teacher hold 0.5 everywhere, so that loaded numbers show."""
    method = build(**changed)
    for parameter in method.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    return method


def assert_teacher_is_a_copy(method: Method) -> None:
    ours = method.student.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in method.teacher.state_dict().items())


@pytest.mark.parametrize("name", ["alice.pth", "alice.safetensors"])
def test_extracted_weights_can_start_another_run(checkpoint, tmp_path, name):
    extract(checkpoint, tmp_path / name, "--checkpoint_key", "student", "--with_head")
    method = constant_method()
    student = method.student
    report = start_from(method, tmp_path / name)
    assert_teacher_is_a_copy(method)
    assert len(report.loaded) == 157 and not report.missing and not report.misshapen and not report.unexpected
    source = torch.load(checkpoint, weights_only=True)["student"]
    for key, value in student.state_dict().items():
        if key.startswith(("backbone.network.swinViT", "backbone.network.decoder", "head.")):
            assert torch.equal(value, source[key]), key


def test_bare_encoder_of_monais_own_pretraining_can_start_a_run(tmp_path):
    source = monai_network().swinViT.state_dict()
    torch.save({"state_dict": {"module." + key: value for key, value in source.items()}}, tmp_path / "swinvit.pt")
    method = constant_method()
    student = method.student
    assert len(start_from(method, tmp_path / "swinvit.pt").loaded) == len(source) == 126
    for key, value in student.backbone.network.swinViT.state_dict().items():
        assert torch.equal(value, source[key]), key
    assert_teacher_is_a_copy(method)


@pytest.mark.parametrize(("name", "own", "given"), [("swin_unetr", 12, 24), ("nnformer", 6, 12)])
def test_weights_of_another_size_are_refused_and_change_nothing(tmp_path, name, own, given):
    """Tables of relative positions have the same shape at every size, so that some keys always fit."""
    torch.save(segmentation_network(name, 1, 14, given).state_dict(), tmp_path / "other_size.pth")
    method = constant_method(backbone=name, feature_size=own)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(CheckpointError, match="--checkpoint_file .*other_size.pth: [1-9].*--feature_size"):
        start_from(method, tmp_path / "other_size.pth")
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_damaged_or_code_bearing_starting_weights_are_refused(checkpoint, tmp_path):
    method = build()
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="--checkpoint_file .*half.safetensors: not readable"):
        start_from(method, tmp_path / "half.safetensors")
    torch.save({"kind": "sam_embed", "state_dict": {"w": torch.zeros(1)}}, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match="sam.pth: 0 of 137 keys"):
        start_from(method, tmp_path / "sam.pth")
    torch.save({"state_dict": method.student.state_dict(), "code": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="code.pth: holds pickled Python objects"):
        start_from(method, tmp_path / "code.pth")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="flipped.pth: .*the checksum"):
        start_from(method, tmp_path / "flipped.pth")


def test_format_decides_where_the_name_does_not_and_must_not_contradict_it(checkpoint, tmp_path, capsys):
    for wanted, suffix in (("monai", ".pth"), ("safetensors", ".safetensors")):
        extract(checkpoint, tmp_path / "alice.v1", "--format", wanted)
        assert f"alice.v1{suffix}" in capsys.readouterr().out
        extract(checkpoint, tmp_path / f"same{suffix}", "--format", wanted)
    one, other = (read_weights_file(tmp_path / f"alice.v1{suffix}").tensors for suffix in (".pth", ".safetensors"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    extract(checkpoint, tmp_path / "both.safetensors", "--format", "monai")
    assert read_weights_file(tmp_path / "both.safetensors").tensors.keys() == one.keys()
    with pytest.raises(ValueError, match="--format safetensors writes .safetensors"):
        extract(checkpoint, tmp_path / "x.pth", "--format", "safetensors")
    with pytest.raises(ValueError, match="ends in .pth or .safetensors .or --format monai or safetensors or torchv"):
        extract(checkpoint, tmp_path / "x.bin")
    assert not list(tmp_path.glob("x*"))
