"""resnet50_unet's weights in torchvision and segmentation_models_pytorch, and their files and CAiD's in ours."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

import extract_backbone_weights
from engine.checkpoint import CheckpointError
from engine.device import make_scaler
from engine.optim import make_optimizer
from engine.run import RunState
from engine.weights import start_from
from models import load_pretrained
from models.backbones import BACKBONES
from models.methods.caid import CAiD, CaidOptions
from models.methods.method import Method
from models.segmenters import SEGMENTERS
from tests.test_engine_weights import write_checkpoint as write_unet_checkpoint

smp = pytest.importorskip("segmentation_models_pytorch")
CPU = torch.device("cpu")
GREY = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
CONV1 = "backbone.network.encoder.conv1.weight"


def make_caid(seed: int = 0) -> CAiD:
    torch.manual_seed(seed)
    kind = BACKBONES["resnet50_unet"]
    return CAiD(
        CaidOptions(queue_size=4),
        lambda decoder_stride, with_masks: kind(48, (1, 64, 64), decoder_stride, False, with_masks),
    )


def write_checkpoint(path, method: Method):
    description = {
        "kind": "caid", "flags": {}, "commit": "abc", "versions": {},
        "preprocessing": {"axcodes": "SPL", "roi": [1, 64, 64]},
        "backbone": {"name": "resnet50_unet", "feature_size": 48, "in_channels": 1},
    }  # fmt: skip
    run = RunState(method, make_optimizer(method.student, 0.1, 0, CPU), make_scaler("fp32", CPU), description, 7)
    torch.save(run.as_checkpoint(5), path)
    return path


@pytest.fixture(scope="module")
def method() -> CAiD:
    """With statistics of the batch norms that differ from a new network's, and from the teacher's."""
    method = make_caid()
    for networks in (method.student, method.teacher):
        for name, buffer in networks.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.05)
    return method.eval()


@pytest.fixture(scope="module")
def checkpoint(method, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("caid") / "checkpoint.pth", method)


def extract(checkpoint, output, *more) -> dict[str, Tensor]:
    extract_backbone_weights.main([str(checkpoint), str(output), *more])
    return torch.load(output, weights_only=True)


def torchvision_features(network: nn.Module, pictures: Tensor) -> Tensor:
    network.fc = nn.Identity()
    with torch.no_grad():
        return network.eval()(pictures.expand(-1, 3, -1, -1))


def our_features(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.encode(GREY[:, :, None])[32].mean(dim=(2, 3, 4))


# Out


def test_snippets_of_the_docstring_run(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    extract(checkpoint, "caid.pth", "--format", "torchvision")
    extract(checkpoint, "caid_smp.pth", "--format", "smp")
    assert "wrote 318 tensors of the teacher" in (told := capsys.readouterr().out)
    assert "wrote 380 tensors of the student" in told
    text = extract_backbone_weights.__doc__.split("three equal input channels:")[1]
    snippet = "\n".join(line.strip() for line in text.splitlines())
    assert snippet.count("load_state_dict") == 2
    exec(snippet, {})


def test_torchvisions_network_computes_the_same_features(checkpoint, method, tmp_path) -> None:
    weights = extract(checkpoint, tmp_path / "caid.pth", "--format", "torchvision", "--checkpoint_key", "student")
    network = torchvision.models.resnet50()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert len(weights) == 318 and set(missing) == {"fc.weight", "fc.bias"} and unexpected == []
    torch.testing.assert_close(torchvision_features(network, GREY), our_features(method.student.backbone.network))


def test_smps_network_takes_the_student_strictly_and_computes_the_same(checkpoint, method, tmp_path) -> None:
    extract_backbone_weights.main([str(checkpoint), str(tmp_path / "caid.v1"), "--format", "smp"])
    weights = torch.load(tmp_path / "caid.v1.pth", weights_only=True)
    network = smp.Unet("resnet50", encoder_weights=None)
    network.load_state_dict(weights, strict=True)
    with torch.no_grad():
        theirs = network.eval()(GREY.expand(-1, 3, -1, -1))
        ours = method.student.backbone.network(GREY[:, :, None])
    torch.testing.assert_close(theirs, ours[:, :, 0])


def test_smps_network_takes_the_teachers_encoder(checkpoint, method, tmp_path) -> None:
    weights = extract(checkpoint, tmp_path / "caid.pth", "--format", "smp", "--checkpoint_key", "teacher")
    network = smp.Unet("resnet50", encoder_weights=None)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert len(weights) == 318 and unexpected == []
    assert {name.split(".")[0] for name in missing} == {"decoder", "segmentation_head"}
    of_teacher = method.teacher.backbone.network.encoder.bn1.running_mean
    assert torch.equal(weights["encoder.bn1.running_mean"], of_teacher)


def test_suffix_decides_the_container(checkpoint, tmp_path) -> None:
    extract_backbone_weights.main([str(checkpoint), str(tmp_path / "caid.safetensors"), "--format", "torchvision"])
    network = torchvision.models.resnet50()
    assert len(load_pretrained(network, tmp_path / "caid.safetensors", part="whole").loaded) == 318


def test_one_input_channel_is_spread_over_three(checkpoint, method, tmp_path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["student"][CONV1] = state["student"][CONV1].sum(1, keepdim=True)
    torch.save(state, tmp_path / "grey.pth")
    key = ["--checkpoint_key", "student"]
    weights = extract(tmp_path / "grey.pth", tmp_path / "caid.pth", "--format", "torchvision", *key)
    network = torchvision.models.resnet50()
    network.load_state_dict(weights, strict=False)
    ours = our_features(method.student.backbone.network)
    torch.testing.assert_close(torchvision_features(network, GREY), ours, rtol=1e-4, atol=1e-4)


def test_other_backbones_and_heads_are_refused(checkpoint, tmp_path) -> None:
    other = write_unet_checkpoint(tmp_path / "checkpoint.pth", "simsiam")
    for layout in ("torchvision", "smp"):
        with pytest.raises(CheckpointError, match=f"--format {layout} is for .*resnet50_unet, but this run's is unet"):
            extract(other, tmp_path / "out.pth", "--format", layout)
    with pytest.raises(CheckpointError, match="--with_head: --format smp"):
        extract(checkpoint, tmp_path / "out.pth", "--format", "smp", "--with_head")
    assert not (tmp_path / "out.pth").exists()


# In


def published_files(method: Method) -> dict[str, dict]:
    """CAiD's files and those of the two libraries, with this method's numbers."""
    student = {name.removeprefix("backbone.network."): value for name, value in method.student.state_dict().items()}
    encoder = {name.removeprefix("encoder."): v for name, v in student.items() if name.startswith("encoder.")}
    best = {name.replace("out.", "segmentation_head.", 1): v for name, v in student.items() if "head." not in name}
    mlp = {name.replace("head.", "fc.", 1): value for name, value in student.items() if name.startswith("head.")}
    networks = {"backbone." + name: value for name, value in best.items()} | mlp
    keys = {"module.encoder_k." + name: torch.zeros_like(value) for name, value in networks.items()}
    queries = {"module.encoder_q." + name: value for name, value in networks.items()}
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {
        "torchvision": encoder | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)},
        "best": best,
        "best of mode id": encoder | mlp,
        "current": {"epoch": 3, "arch": "resnet50", "state_dict": queries | keys | queue, "best_loss": torch.ones(())},
    }


# (keys of encoder and decoder, others that a CAiD run takes, keys of the file that find no place in it)
TAKEN = {"torchvision": (318, 0, 2), "best": (378, 2, 0), "best of mode id": (318, 4, 0), "current": (378, 6, 386)}


@pytest.fixture(scope="module")
def others() -> tuple[CAiD, nn.Module]:
    return make_caid(seed=1), SEGMENTERS["resnet50_unet"].build(1, 3, 48, spatial_dims=2)


@pytest.mark.parametrize("name", TAKEN)
def test_published_files_load_and_say_what_they_gave(method, others, tmp_path, name) -> None:
    content, (num_loaded, num_beside, num_unexpected) = published_files(method)[name], TAKEN[name]
    torch.save(content, tmp_path / "published.pth")
    other, segmenter = others
    for parameter in (*other.parameters(), *segmenter.parameters()):
        nn.init.zeros_(parameter)
    report = start_from(other, tmp_path / "published.pth")
    assert (len(report.loaded), len(report.beside), len(report.unexpected)) == (num_loaded, num_beside, num_unexpected)
    assert f"{num_loaded} of 378 keys" in (told := report.describe())
    assert (f"{num_unexpected} unexpected (" in told) == (num_unexpected > 0)
    ours, source = other.student.state_dict(), method.student.state_dict()
    for key in ("backbone.network." + key for key in report.loaded):
        assert torch.equal(ours[key], source[key]), key
    assert all(torch.equal(ours[key], source[key]) for key in report.beside)
    assert torch.equal(other.teacher.state_dict()[CONV1], source[CONV1])
    assert len(load_pretrained(segmenter, tmp_path / "published.pth").loaded) == 318
    assert torch.equal(segmenter.encoder.conv1.weight, source[CONV1])


def test_one_and_three_input_channels_fit_each_other(others, tmp_path) -> None:
    torch.manual_seed(0)
    three, one = (smp.Unet("resnet50", encoder_weights=None, in_channels=num).eval() for num in (3, 1))
    torch.save(three.state_dict(), tmp_path / "three.pth")
    report = load_pretrained(one, tmp_path / "three.pth", part="whole")
    assert report.adapted == ["encoder.conv1.weight"] and report.share == 1
    with torch.no_grad():
        torch.testing.assert_close(one(GREY), three(GREY.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    ours = others[1].eval()
    assert load_pretrained(ours, tmp_path / "one.pth").adapted == ["encoder.conv1.weight"]
    with torch.no_grad():
        theirs = three.encoder(GREY.expand(-1, 3, -1, -1))[-1].mean(dim=(2, 3))
    torch.testing.assert_close(our_features(ours), theirs, rtol=1e-4, atol=1e-4)
