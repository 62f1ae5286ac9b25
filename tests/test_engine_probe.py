"""Frozen probes: features are read where the voxels lie, both readers do what they say, and the command's report."""

import json

import numpy as np
import pytest
import torch

from datasets.lists.data_list import DataListError
from datasets.lists.label_classes import LabelClasses
from datasets.samples.probe_voxels import choose_probe_voxels, draw_voxels, split_probe_cases
from datasets.store.volumes import VolumeStore
from engine.watch.probe import (
    ProbeOptions,
    central_corners,
    fit_logistic,
    knn_predict,
    linear_predict,
    probe_encoder,
    score,
    standardise,
    voxel_features,
)
from engine.weights import save_weights
from models.backbones import BACKBONES
from scripts import probe_features
from tests.labelled_corpus import make_stored_corpus

CPU = torch.device("cpu")
CLASSES = LabelClasses((0, 1, 2, 5), ("background", "liver", "spleen", "aorta"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_stored_corpus(tmp_path_factory.mktemp("corpus"))


# Features


def pooled(volumes: torch.Tensor) -> dict[int, torch.Tensor]:
    """Maps whose cells are the means of their voxels: linear in place where the volume is."""
    return {1: volumes} | {s: torch.nn.functional.avg_pool3d(volumes, s) for s in (4, 2)}


def test_features_of_a_ramp_are_its_own_values():
    """A volume that rises along its axes, seen through any window, is read back at every voxel away from the faces."""
    shape = (20, 24, 33)
    ramp = sum(rate * np.arange(size).reshape(view) for rate, size, view in zip(
        (3, 5, 7), shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1))))  # fmt: skip
    rng = np.random.default_rng(0)
    voxels = np.stack([rng.integers(4, size - 4, 40) for size in shape], axis=1)
    options = ProbeOptions((8, 16, 16), hu_min=0, hu_max=1000, window_batch=3)
    found = voxel_features(pooled, ramp.astype(np.int16), voxels, options, CPU)
    assert list(found) == [2, 4], "rising strides, without the voxels themselves"
    true = torch.from_numpy(ramp[tuple(voxels.T)]).float() / 1000
    for stride in (2, 4):
        assert (found[stride][:, 0] - true).abs().max() < 1e-5, stride
    only = voxel_features(pooled, ramp.astype(np.int16), voxels, ProbeOptions((8, 16, 16), strides=(4,)), CPU)
    assert list(only) == [4]
    with pytest.raises(ValueError, match=r"--strides 16: the encoder has maps at \[2, 4\]"):
        voxel_features(pooled, ramp.astype(np.int16), voxels, ProbeOptions((8, 16, 16), strides=(16,)), CPU)


def test_a_voxel_of_a_2d_network_is_read_from_its_own_slice():
    """Slices of one HU each, and a ramp within them."""
    hu = (100 * np.arange(12)[:, None, None] + np.arange(24)[:, None] + 0 * np.arange(33)).astype(np.int16)
    voxels = np.stack([np.random.default_rng(0).integers(2, size - 2, 30) for size in hu.shape], axis=1)
    options = ProbeOptions((1, 16, 16), hu_min=0, hu_max=1200, window_batch=5)
    found = voxel_features(
        lambda slices: {2: torch.nn.functional.avg_pool3d(slices, (1, 2, 2))}, hu, voxels, options, CPU
    )
    assert (found[2][:, 0] - torch.from_numpy(hu[tuple(voxels.T)]).float() / 1200).abs().max() < 1e-5


def test_every_voxel_lies_in_the_middle_half_of_its_window_unless_at_the_border():
    places = torch.cartesian_prod(*(torch.arange(0, size, 3) for size in (40, 24, 50)))
    options = ProbeOptions((16, 24, 16))
    corners = central_corners(places, (40, 24, 50), options)
    inside = places - corners
    assert (inside >= 0).all() and (inside < torch.tensor(options.roi)).all()
    assert (corners + torch.tensor(options.roi) <= torch.tensor((40, 24, 50))).all()
    for axis, size in ((0, 40), (2, 50)):
        is_far = (places[:, axis] >= 8) & (places[:, axis] < size - 8)
        assert ((inside[is_far, axis] >= 3) & (inside[is_far, axis] <= 12)).all()


def test_a_volume_smaller_than_a_window_is_read_at_the_same_voxels():
    rng = np.random.default_rng(1)
    hu = rng.integers(0, 1000, (6, 9, 11)).astype(np.int16)
    voxels = np.argwhere(np.ones(hu.shape))
    nothing = ProbeOptions((16, 16, 16), hu_min=0, hu_max=1000, strides=(2,))
    found = voxel_features(lambda x: {2: x}, hu, voxels, nothing, CPU)  # a map as fine as the voxels, so no blur
    np.testing.assert_allclose(found[2][:, 0].numpy() * 1000, hu.ravel(), atol=0.01)


# Readers


def blobs(seed: int, num: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(3).repeat_interleave(num)
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]])
    return centres[classes] + torch.randn(3 * num, 4, generator=generator), classes


def test_knn_equals_the_plain_vote():
    taught, classes = blobs(0)
    judged, truth = blobs(1)
    predicted = knn_predict(taught, classes, judged, 3, num_neighbours=7, temperature=0.1)
    for one, found in zip(judged, predicted):
        cosine = torch.stack([torch.cosine_similarity(one, other, dim=0) for other in taught])
        votes = torch.zeros(3)
        for index in cosine.argsort(descending=True)[:7]:
            votes[classes[index]] += torch.exp(cosine[index] / 0.1)
        assert votes.argmax() == found
    assert (predicted == truth).float().mean() > 0.85


def test_logistic_regression_reaches_its_optimum_without_random_numbers():
    taught, classes = blobs(0)
    classes, taught = classes[:130], taught[:130]  # the last class is rare
    before = torch.get_rng_state()
    weight, bias = fit_logistic(taught, classes, 4, weight_decay=0.01)
    assert torch.equal(before, torch.get_rng_state())
    weight.requires_grad_(), bias.requires_grad_()
    entropy = torch.nn.functional.cross_entropy(taught @ weight.T + bias, classes, reduction="none")
    loss = torch.stack([entropy[classes == c].mean() for c in range(3)]).mean() + 0.005 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and loss < 0.5
    judged, truth = blobs(1)
    assert (linear_predict(taught, classes, judged, 4, 0.01) == truth).float().mean() > 0.9


def test_scores_by_hand_and_strides_weigh_alike():
    found = score(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1]), ("a", "b", "never"))
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["recall"] == {"a": 0.5, "b": 1.0} and found["balanced_accuracy"] == pytest.approx(0.75)
    sides = [{2: 5 + 100 * torch.randn(500, 3), 4: torch.randn(500, 12)} for _ in range(2)]
    taught, _ = standardise(*sides)
    energy = taught.square().mean(0)
    assert energy[:3].sum() == pytest.approx(1, rel=1e-4) and energy[3:].sum() == pytest.approx(1, rel=1e-4)


# Voxels and the whole


def test_voxels_are_balanced_and_lie_in_their_class(corpus):
    store = VolumeStore(corpus / "store")
    drawn = draw_voxels(store, "case0", CLASSES, num_voxels=20, seed=0)
    assert np.bincount(drawn.channels).tolist()[:3] == [20, 20, 20]
    label = CLASSES.to_classes(store.read_label("case0").array)
    hu = store.read("case0").array
    assert (label[tuple(drawn.voxels.T)] == drawn.channels).all()
    assert (hu[tuple(drawn.voxels[drawn.channels == 0].T)] > -500).all()
    assert len(np.unique(drawn.voxels, axis=0)) == len(drawn.voxels)
    assert (draw_voxels(store, "case0", CLASSES, 20, 0).voxels == drawn.voxels).all()
    assert not np.array_equal(draw_voxels(store, "case0", CLASSES, 20, 1).voxels, drawn.voxels)


def test_cases_that_judge_never_teach(corpus, tmp_path):
    taught, judged = split_probe_cases(corpus / "list.json", corpus)
    assert [len(taught), len(judged)] == [3, 2]
    content = json.loads((corpus / "list.json").read_text())
    joined = {**content, "training": content["training"] + content["validation"], "validation": []}
    (tmp_path / "one.json").write_text(json.dumps(joined))
    taught, judged = split_probe_cases(tmp_path / "one.json", corpus, num_labelled=1, held_out_share=0.4)
    assert [len(taught), len(judged)] == [1, 2] and not {c.name for c in taught} & {c.name for c in judged}
    (tmp_path / "few.json").write_text(json.dumps({"training": content["training"][:1], "validation": []}))
    with pytest.raises(DataListError, match="few.json: 1 of its cases have labels"):
        split_probe_cases(tmp_path / "few.json", corpus)


def test_features_that_know_more_score_more(corpus):
    taught, judged = split_probe_cases(corpus / "list.json", corpus)
    voxels = choose_probe_voxels(VolumeStore(corpus / "store"), CLASSES, taught, judged, num_voxels=20)
    options = ProbeOptions((32, 32, 32), num_neighbours=5)
    knowing = probe_encoder(lambda x: {2: torch.cat([x, x**2, x**3], 1)}, voxels, options, CPU)
    blind = probe_encoder(lambda x: {2: torch.zeros_like(x)}, voxels, options, CPU)
    assert knowing["knn"]["balanced_accuracy"] > 0.6 and knowing["linear"]["balanced_accuracy"] > 0.6
    assert blind["linear"]["balanced_accuracy"] == pytest.approx(0.25)


def test_command_probes_weights_beside_random_networks(corpus, tmp_path, capsys):
    torch.manual_seed(0)
    network = BACKBONES["unet"](8, (32, 32, 32), None, False).network
    described = {
        "backbone": {"name": "unet", "feature_size": 8, "in_channels": 1},
        "preprocessing": {
            "axcodes": "SPL", "spacing_mm": [4.0, 4.0, 4.0], "hu_min": -125.0, "hu_max": 225.0, "roi": [32, 32, 32]
        },
    }  # fmt: skip
    save_weights(network.state_dict(), described, tmp_path / "mine.pth")
    flags = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store", "device": "cpu"}
    argv = [f"--{name}={value}" for name, value in flags.items()] + ["--num_voxels=10", f"--output={tmp_path}/p.json"]
    probe_features.main([*argv, "--weights", str(tmp_path / "mine.pth")])
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["cases"] == {"taught": ["case0", "case1", "case2"], "judged": ["case3", "case4"]}
    mine, random = report["results"][str(tmp_path / "mine.pth")], report["results"]["random weights 0"]
    # The weights are those that seed 0 makes: loaded, they must give what the first random network gives.
    assert mine["knn"] == random["knn"] and mine["linear"] == random["linear"]
    assert random["knn"] != report["results"]["random weights 1"]["knn"]
    assert set(mine["knn"]["recall"]) == set(CLASSES.names)
    joined = report["results"]["random"]
    both = [report["results"][f"random weights {index}"]["knn"]["accuracy"] for index in (0, 1)]
    assert joined["knn"]["accuracy"] == pytest.approx(np.mean(both))
    text = (tmp_path / "p.txt").read_text()
    assert "mine" in text and "aorta" in text and "balanced accuracy" in text and text in capsys.readouterr().out
    assert (tmp_path / "p_run.json").exists()
    with pytest.raises(ValueError, match="nothing to probe"):
        probe_features.main([*argv, "--num_random=0"])
