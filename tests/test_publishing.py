"""Publishing on the hub and loading from it, without a network: the hub is a folder laid out like its cache."""

import json
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch

from datasets.ct.nifti import Volume
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.features import load_features
from engine.pretrain_flags import check_paths
from engine.publishing.publication import without_folders
from engine.segmentation.segmenter import open_segmenter
from engine.weights import save_weights, start_from
from models import load_pretrained
from models.backbones import BACKBONES
from models.hub import HubError, local_weights
from models.segmenters import SEGMENTERS
from models.weights_file import read_weights_file
from scripts import push_to_hub
from tests.test_engine_weights import build

CPU = torch.device("cpu")
PREPROCESSING = {
    "axcodes": "SPL", "spacing_mm": [4.0, 4.0, 4.0], "hu_min": -125.0, "hu_max": 225.0, "roi": [32, 32, 32],
}  # fmt: skip
COMMON = {
    "backbone": {"name": "unet", "feature_size": 8, "in_channels": 1}, "preprocessing": PREPROCESSING, "step": 7,
    "commit": "abc123", "versions": {"torch": "2.9"}, "flags": {"data_dir": "/secret/Smith John/FLARE22", "lr": 0.1},
}  # fmt: skip
COMMAND = {"command": "main_ddp.py --data_dir /secret/FLARE22 --output_dir=/secret/run", "started": "2026-01-01"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of pretraining in its run's folder."""
    folder = tmp_path_factory.mktemp("pretrained")
    method = build("dino")
    parts = {name: part.state_dict() for name, part in method.named_children()}
    torch.save(parts | COMMON | {"kind": "dino", "epoch": 1, "num_training_cases": 12}, folder / "checkpoint.pth")
    (folder / "run.json").write_text(json.dumps(COMMAND))
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """best.pth of a finetuning run that remembers a case."""
    path = tmp_path_factory.mktemp("finetuned") / "best.pth"
    torch.manual_seed(3)
    names = {"training_cases": ["Smith John"], "validation_cases": ["Doe Jane"]}
    memory = {"memory": {"cases": [{"name": "Smith John", "vectors": torch.zeros(3)}]}}
    classes = {"classes": {"values": [0, 4], "names": ["background", "liver"]}}
    about = {"kind": "segmentation", "best_dice": 0.91, "pretrained": {"path": "/secret/w.pth", "method": "alice"}}
    network = SEGMENTERS["unet"].build(1, 2, 8).to(memory_format=torch.channels_last_3d)  # as on GPUs
    weights = {"model": network.state_dict()}
    torch.save(COMMON | names | memory | classes | about | weights, path)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts files into a repository of the (offline) cache: `hub("me/name", file, ...)`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, *files, revision: str = "main") -> None:
        folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / (revision + "0" * (40 - len(revision)))
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(snapshot.name)
        for file in files:
            (snapshot / file.name).write_bytes(file.read_bytes())

    return put


def publish(weights, folder, *more: str) -> str:
    """The card of a folder that is written and not uploaded."""
    push_to_hub.main([f"--weights={weights}", f"--output_dir={folder}", *more])
    return (folder / "README.md").read_text()


# The folder


def test_folder_holds_weights_that_load_and_a_card_of_the_runs_facts(pretrained, tmp_path):
    card = publish(pretrained, tmp_path / "alice-ct", "--data=3000 CT of FLARE22", "--license=cc-by-4.0")
    assert sorted(path.name for path in (tmp_path / "alice-ct").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    for fact in (
        "license: cc-by-4.0", "- self-supervised", "- dino", "# alice-ct", "dino (teacher)", "unet, feature size 8",
        "3000 CT of FLARE22", "| Training cases | 12 |", "| Steps | 7 |", "4 x 4 x 4 mm", "-125 to 225 HU", "abc123",
        "torch 2.9", "2026-01-01", "main_ddp.py --data_dir FLARE22 --output_dir=run", '"lr": 0.1', "Research only",
        "Not for clinical use", "load_features(",
    ):  # fmt: skip
        assert fact in card, fact
    teacher = torch.load(pretrained, weights_only=True)["teacher"]
    extract = load_features(tmp_path / "alice-ct" / "model.safetensors", "cpu")
    assert extract.report.share == 1 and extract.preprocessing.as_dict() == PREPROCESSING
    for name, value in extract.backbone.network.state_dict().items():
        assert torch.equal(value, teacher[f"backbone.network.{name}"])
    config = json.loads((tmp_path / "alice-ct" / "config.json").read_text())
    assert config["method"] == "dino" and config["flags"] == {"data_dir": "FLARE22", "lr": 0.1}


def test_nothing_that_may_name_people_or_places_is_published(pretrained, finetuned, tmp_path):
    for weights in (pretrained, finetuned):
        publish(weights, tmp_path / weights.stem)
        for file in (tmp_path / weights.stem).iterdir():
            content = file.read_bytes()
            assert all(word not in content for word in (b"secret", b"Smith", b"Doe", b"vectors")), file
    given = ["/a b/c", "--x=d/e", "hf://me/name", 3, None]
    assert without_folders(given) == ["c", "--x=e", "hf://me/name", 3, None]


def test_published_segmenter_segments_as_before(finetuned, tmp_path):
    card = publish(finetuned, tmp_path / "organs")
    for fact in (
        "- 4: liver",
        "pipeline_tag: image-segmentation",
        "from weights by alice",
        "0.910",
        "scripts/predict.py",
    ):
        assert fact in card, fact
    hu = np.random.default_rng(0).integers(-200, 300, (32, 32, 40)).astype(np.int16)
    volume = Volume(hu, np.diag([4.0, 4.0, 4.0, 1.0]), "volume")
    before, after = (open_segmenter(path, CPU) for path in (finetuned, tmp_path / "organs" / "model.safetensors"))
    assert after.classes == before.classes and after.preprocessing == before.preprocessing
    np.testing.assert_array_equal(after.segment(volume, volume), before.segment(volume, volume))


def test_a_run_without_validation_has_no_dice_on_its_card(finetuned, tmp_path):
    torch.save(torch.load(finetuned, weights_only=True) | {"best_dice": -1.0}, tmp_path / "best.pth")
    assert "Dice of the held-out cases" in publish(finetuned, tmp_path / "validated")
    assert "Dice of the held-out cases" not in publish(tmp_path / "best.pth", tmp_path / "not_validated")


def test_half_precision_halves_the_file_and_still_segments(finetuned, tmp_path):
    publish(finetuned, tmp_path / "whole")
    publish(finetuned, tmp_path / "half", "--half")
    whole, half = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    before, after = (open_segmenter(path, CPU).network.state_dict() for path in (whole, half))
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        torch.testing.assert_close(after[name], value, rtol=2e-3, atol=1e-6)


def test_weights_must_say_what_they_are(pretrained, tmp_path):
    encoder = BACKBONES["unet"](8, (32, 32, 32), None, False).network.state_dict()
    torch.save(encoder, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="bare.pth: holds no 'backbone', 'preprocessing'; expected weights by"):
        publish(tmp_path / "bare.pth", tmp_path / "out")
    described = {name: COMMON[name] for name in ("backbone", "preprocessing")} | {"method": "alice"}
    save_weights(encoder, described, tmp_path / "mine.pth")
    assert "| Training cases | not recorded |" in publish(tmp_path / "mine.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="give --repo_id to upload, or --output_dir"):
        push_to_hub.main([f"--weights={pretrained}"])


# The upload


class Hub:
    """Remembers what was asked of it; `refuses` is an error that it raises instead."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.calls, self.refuses = [], refuses

    def create_repo(self, repo_id: str, **more) -> str:
        if self.refuses:
            raise self.refuses
        self.calls.append((repo_id, more))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path, allow_patterns: list[str]) -> None:
        names = {path.name for path in folder_path.iterdir()}
        self.calls.append((repo_id, names, set(allow_patterns), (folder_path / "README.md").read_text()))


def test_upload_makes_the_repository_and_sends_the_three_files(pretrained, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push_to_hub.main([f"--weights={pretrained}", "--repo_id=me/alice-ct", "--private"])
    made, (repo_id, names, sent, card) = hub.calls
    assert made == ("me/alice-ct", {"private": True, "exist_ok": True}) and repo_id == "me/alice-ct"
    assert names == sent == {"README.md", "config.json", "model.safetensors"}
    assert 'load_features("hf://me/alice-ct")' in card and "use it as hf://me/alice-ct" in capsys.readouterr().out
    publish(pretrained, tmp_path, "--repo_id=me/alice-ct", "--dry_run")
    assert len(hub.calls) == 2, "a dry run asks nothing of the hub"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(OSError("401 Unauthorized")))
    with pytest.raises(ValueError, match="--repo_id me/alice-ct: the hub refused .401 Unauthorized.*hf auth login"):
        push_to_hub.main([f"--weights={pretrained}", "--repo_id=me/alice-ct"])


# From the hub


def test_names_on_the_hub_stand_for_files_wherever_weights_are_read(pretrained, finetuned, hub, tmp_path):
    for weights, repo in ((pretrained, "me/alice-ct"), (finetuned, "me/organs")):
        publish(weights, tmp_path / weights.stem)
        hub(repo, tmp_path / weights.stem / "model.safetensors")
    assert load_features("hf://me/alice-ct", "cpu").report.share == 1
    assert load_pretrained(SEGMENTERS["unet"].build(1, 3, 8), "hf://me/alice-ct").share == 1
    assert start_from(build("simsiam"), "hf://me/alice-ct").counts(("encoder.",))[0] > 0
    assert open_segmenter("hf://me/organs", CPU).classes.names == ("background", "liver")
    with pytest.raises(CheckpointError, match="not a checkpoint of kind 'segmentation'"):
        load_checkpoint("hf://me/alice-ct", "segmentation")
    for name in ("list.json", "table.npy"):
        (tmp_path / name).write_text("")
    files = {"json_list": str(tmp_path / "list.json"), "table_file": str(tmp_path / "table.npy"), "probe_json_list": ""}
    folders = {"data_dir": str(tmp_path), "output_dir": str(tmp_path), "resume": "auto", "pairing": "sam"}
    check_paths(SimpleNamespace(**files, **folders, checkpoint_file="hf://me/alice-ct"))
    with pytest.raises(ValueError, match="--checkpoint_file /no/such.pth"):
        check_paths(SimpleNamespace(**files, **folders, checkpoint_file="/no/such.pth"))


def test_other_files_and_revisions_can_be_named(hub, tmp_path):
    encoder = BACKBONES["unet"](8, (32, 32, 32), None, False).network.state_dict()
    save_weights(encoder, {"method": "alice"}, tmp_path / "w.pth")
    hub("me/many", tmp_path / "w.pth", tmp_path / "w.pth.json", revision="v1")
    file = read_weights_file("hf://me/many@v1/w.pth")
    assert file.description == {"method": "alice"} and file.tensors.keys() == encoder.keys()
    hub("me/bare", tmp_path / "w.pth")
    assert read_weights_file("hf://me/bare/w.pth").description == {}
    assert local_weights("results/w.pth").parts == ("results", "w.pth")


@pytest.mark.parametrize(("name", "message"), [
    ("hf://me", "expected hf://owner/name"), ("hf://me/none", "model.safetensors cannot be had.*hf auth login"),
    ("hf://me/a b", "cannot be had"),
])  # fmt: skip
def test_names_that_lead_nowhere_are_explained(name, message, hub):
    with pytest.raises(HubError, match=f"{name}.*{message}"):
        local_weights(name)


@pytest.mark.parametrize(("backbone", "depth"), [("swin_unetr", 32), ("swin_unetr_v2", 1)])
def test_the_cards_lines_for_monai_load_the_weights(backbone, depth, tmp_path, monkeypatch):
    """They are run as they stand in the card."""
    network = BACKBONES[backbone](12, (depth, 32, 32), None, False, with_masks=False).network
    described = COMMON | {"method": "alice", "backbone": {"name": backbone, "feature_size": 12, "in_channels": 1}}
    described["preprocessing"] = PREPROCESSING | {"roi": [depth, 32, 32]}
    save_weights(network.state_dict(), described, tmp_path / "w.pth")
    lines = publish(tmp_path / "w.pth", tmp_path / "out").split("```python\n")[-1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(lines, found)
    for name, value in network.state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], value), name
