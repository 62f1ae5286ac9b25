"""The frozen MLP: features lie at their voxels, it finds what features separate, and the command reports its Dice."""

import json

import numpy as np
import pytest
import torch

from datasets.lists.label_classes import LabelClasses
from datasets.samples.probe_voxels import choose_probe_voxels, split_probe_cases
from datasets.store.volumes import VolumeStore
from engine.watch import frozen_mlp
from engine.watch.frozen_mlp import (
    JoinedMaps,
    TaughtVoxels,
    draw_taught,
    fit_mlp,
    maps_reader,
    probe_mlp,
    segment_by_mlp,
)
from engine.watch.probe import ProbeOptions, fit_logistic
from scripts import probe_features
from tests.labelled_corpus import make_stored_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CLASSES = LabelClasses((0, 1, 2, 5), ("background", "liver", "spleen", "aorta"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_stored_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(frozen_mlp, "STEPS", 120)


class Pooling:
    """An encoder that means the voxels of each cell."""

    channels = {1: 1, 2: 1, 4: 1}

    def encode(self, windows: torch.Tensor) -> dict[int, torch.Tensor]:
        return {stride: torch.nn.functional.avg_pool3d(windows, stride) for stride in self.channels}


def taught(features: torch.Tensor, classes: torch.Tensor) -> TaughtVoxels:
    return TaughtVoxels(features, classes, torch.ones(len(classes)))


def test_features_of_a_ramp_are_its_own_values():
    """A ramp that is seen through windows is read back at every voxel away from the faces, at each stride."""
    shape = (20, 24, 33)
    ramp = sum(rate * axis for rate, axis in zip((3, 5, 7), np.indices(shape))).astype(np.int16)
    options = ProbeOptions((8, 16, 16), hu_min=0, hu_max=1000, window_batch=3)
    voxels = torch.stack([torch.randint(6, size - 6, (40,)) for size in shape], dim=1)
    maps = maps_reader(Pooling(), options, CPU)(ramp)
    found = maps.at(voxels)
    true = torch.from_numpy(ramp[tuple(voxels.T.numpy())]).float() / 1000
    assert found.shape == (40, 2), "strides 2 and 4, not the voxels themselves"
    assert (found - true[:, None]).abs().max() < 1e-5
    whole = torch.stack(list(maps.slices(shape)), dim=1)  # [C, D, H, W]
    every = torch.from_numpy(np.argwhere(np.ones(shape)))
    assert (whole.flatten(1).T - maps.at(every)).abs().max() < 1e-5, "borders included"


def test_an_mlp_separates_what_no_plane_does_and_nothing_where_there_is_nothing():
    generator = torch.Generator().manual_seed(0)
    features = 50 + 20 * torch.randn(1200, 2, generator=generator)
    classes = ((features[:, 0] > 50) ^ (features[:, 1] > 50)).long()
    before = torch.get_rng_state()
    mlp = fit_mlp(taught(features[:900], classes[:900]), 2)
    assert torch.equal(before, torch.get_rng_state())
    assert (mlp(features[900:]).argmax(1) == classes[900:]).float().mean() > 0.9
    weight, bias = fit_logistic(features[:900] / 20, classes[:900], 2, 0.0)
    assert ((features[900:] / 20 @ weight.T + bias).argmax(1) == classes[900:]).float().mean() < 0.7
    blind = fit_mlp(taught(torch.zeros(900, 2), classes[:900]), 2)
    assert blind(torch.zeros(300, 2)).argmax(1).unique().numel() == 1


def test_classes_teach_by_the_root_of_their_size(monkeypatch):
    monkeypatch.setattr(frozen_mlp, "TAUGHT_VOXELS", 1000)
    channels = np.zeros((10, 100, 100), dtype=np.uint8)
    channels[0, :10, :10], channels[1, 0, :9] = 1, 3  # 100 and 9 of 100,000 voxels; class 2 has none
    maps = JoinedMaps({1: (torch.from_numpy(channels)[None].float(), np.eye(4))})
    drawn = draw_taught(maps, channels, np.random.default_rng(0))
    roots = np.sqrt([channels.size - 109, 100, 0, 9])
    weights = [drawn.weights[drawn.classes == channel].sum().item() for channel in range(4)]
    assert weights == pytest.approx((roots / roots.sum()).tolist())
    assert (drawn.features[:, 0].round() == drawn.classes).all() and len(drawn.classes) < 1100
    allowed = np.zeros(channels.shape, dtype=bool)
    allowed[1] = True
    assert drawn_classes(draw_taught(maps, channels, np.random.default_rng(0), allowed)) == {0, 3}


def drawn_classes(drawn: TaughtVoxels) -> set[int]:
    return set(drawn.classes.tolist())


def test_every_voxel_gets_its_own_class(monkeypatch):
    monkeypatch.setattr(frozen_mlp, "CHUNK", 50)
    truth = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    maps = JoinedMaps(
        {1: (torch.nn.functional.one_hot(torch.from_numpy(truth).long()).movedim(3, 0).float(), np.eye(4))}
    )
    drawn = draw_taught(maps, truth, np.random.default_rng(0))
    np.testing.assert_array_equal(segment_by_mlp(fit_mlp(drawn, 3), maps, truth.shape), truth)


def test_features_that_know_more_have_more_dice(corpus):
    listed, classes = split_probe_cases(corpus / "list.json", corpus), CLASSES
    voxels = choose_probe_voxels(VolumeStore(corpus / "store"), classes, *listed, num_voxels=5)

    def exact(hu: np.ndarray) -> JoinedMaps:
        return JoinedMaps({1: (torch.from_numpy(hu.clip(0, 250))[None].float(), np.eye(4))})

    def blind(hu: np.ndarray) -> JoinedMaps:
        return JoinedMaps({1: (torch.zeros(1, *hu.shape), np.eye(4))})

    knowing, nothing = probe_mlp(exact, voxels), probe_mlp(blind, voxels)
    assert knowing["dice"] > 0.4 and nothing["dice"] < 0.1
    assert list(knowing["organs"]) == list(CLASSES.names[1:]) and list(knowing["cases"]) == ["case3", "case4"]
    assert knowing["dice"] == pytest.approx(np.mean(list(knowing["cases"].values())))


def test_command_reports_the_mlp_of_random_networks(corpus, tmp_path, capsys):
    flags = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store", "device": "cpu"}
    flags |= {"backbone": "unet", "feature_size": 8, "roi_x": 32, "roi_y": 32, "roi_z": 32, "num_labelled": 1}
    argv = [f"--{name}={value}" for name, value in flags.items()] + ["--num_voxels=10", "--mlp=true"]
    probe_features.main([*argv, f"--output={tmp_path}/p.json"])
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["preprocessing"]["roi"] == [32, 32, 32]
    found = [report["results"][f"random weights {index}"]["mlp"]["dice"] for index in (0, 1)]
    joined = report["results"]["random"]["mlp"]
    assert joined["dice"] == pytest.approx(np.mean(found)) and joined["std"]["dice"] > 0
    assert all(0 <= dice <= 1 for dice in [*joined["organs"].values(), *joined["cases"].values()])
    text = capsys.readouterr().out
    assert "MLP, Dice (%)" in text and f"{100 * joined['dice']:.1f} ±" in text
