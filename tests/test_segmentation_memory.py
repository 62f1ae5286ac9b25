"""Segmenters that remember labelled cases: the prior's maths, what is stored, refusals, and the three commands."""

import dataclasses
import json
import shutil
import socket

import nibabel as nib
import numpy as np
import pytest
import torch

import scripts.evaluate_segmentation
import scripts.finetune_segmentation as command
from datasets.ct.nifti import Volume
from engine.checkpoint import LATEST, CheckpointError, load_checkpoint
from engine.segmentation.memory import (
    Memory,
    MemoryOptions,
    Recall,
    Sam,
    make_memory,
    open_recall,
    reference_of,
    remember,
)
from engine.segmentation.prior import SPREAD, Votes, class_shares, fuse, prior_of
from sam_embed.checkpoint import EmbedderInfo, load_embedder
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import count_votes
from sam_embed.matching.dense import make_nodes, thinned
from sam_embed.network import AnatomicalEmbedder
from scripts import predict
from tests.labelled_corpus import finetune_arguments, labelled_volume, make_labelled_corpus
from tests.launched import run_ranks
from tests.sam_fakes import (
    AFFINE,
    SHAPE,
    atlas_labels,
    compact_options,
    dice,
    patient_embedding,
    save_embedder,
    with_noise,
)
from tests.tiny_run import log_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NUM_CLASSES = 5
SAM_INFO = EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0), hu_min=-1000.0, hu_max=600.0, scale_to=4.0, offset=-2.0)


def patient(seed: int, name: str = "") -> Embedding:
    """A known embedding under a name, with the digest that its CT's voxels would have."""
    embedding = patient_embedding(seed)
    return dataclasses.replace(embedding, name=name or embedding.name, source=f"voxels:{seed}")


def labels_of(seed: int) -> Volume:
    return Volume(atlas_labels(seed), AFFINE, f"labels of patient{seed}")


def memory_of(*seeds: int, **changed) -> Memory:
    cases = [remember(patient(seed), labels_of(seed)) for seed in seeds]
    return dataclasses.replace(Memory(cases, {"path": "sam.pth", "fingerprint": "atlas"}, NUM_CLASSES), **changed)


def recall_of(*seeds: int, **changed) -> Recall:
    """Without a SAM: the scans of these tests are embedded."""
    return Recall(memory_of(*seeds, **changed), sam=None)


# The prior


def one_organ(reach: np.ndarray | None = None) -> Votes:
    """A block of class 2 in a grid of 4 mm, the votes of one case."""
    organ = np.zeros((8, 9, 10), np.float32)
    organ[2:5, 3:6, 4:8] = 0.5  # trust is no probability: one case alone is all there is
    counts = np.stack([0.5 - organ, organ])
    seen = np.ones(organ.shape, np.float32) if reach is None else reach
    return Votes(counts * (seen > 0), [0, 2], seen, np.diag([4.0, 4.0, 4.0, 1.0]))


def test_one_carried_case_is_a_certain_map_with_a_tenth_spread():
    odds = prior_of(one_organ(), 3, weight=3.0, blur_mm=0.0, num_cases=1).odds.float() / 3
    inside = one_organ().counts[1] > 0
    expected = (1 - SPREAD) * np.stack([~inside, np.zeros_like(inside), inside]) + SPREAD / 3
    np.testing.assert_allclose(odds.numpy(), expected, atol=1e-3)


def test_blur_is_a_gaussian_of_its_width_and_keeps_probabilities():
    shares = class_shares(one_organ(), 3, blur_mm=4.0)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
    line = np.zeros(41)
    line[20] = 1
    point = np.zeros((41, 41, 41), np.float32)
    point[20, 20, 20] = 1
    votes = Votes(np.stack([1 - point, point]), [0, 1], np.ones_like(point), np.diag([2.0, 2.0, 2.0, 1.0]))
    found = class_shares(votes, 2, blur_mm=4.0)[1][20, 20]
    gauss = np.exp(-0.5 * ((np.arange(41) - 20) / 2) ** 2)  # sigma is two voxels of 2 mm
    np.testing.assert_allclose(found / found.max(), np.where(gauss > 1e-3, gauss, found / found.max()), atol=0.01)


def test_places_that_no_case_shows_change_nothing():
    reach = np.ones((8, 9, 10), np.float32)
    reach[:, :, 6:] = 0  # cuts through the organ
    prior = prior_of(one_organ(reach), 3, weight=3.0, blur_mm=4.0, num_cases=1)
    added = torch.stack(list(prior.slices(reach.shape, prior.affine)), dim=1)
    assert (added[..., 6:] == 0).all() and (added[..., :6] != 0).any()
    assert prior.known_share == pytest.approx(0.6)
    plain = torch.softmax(torch.randn(3, *reach.shape, generator=torch.Generator().manual_seed(0)), dim=0)
    fused = torch.stack(list(fuse(iter(plain.unbind(1)), prior, reach.shape, prior.affine, False)), dim=1)
    torch.testing.assert_close(fused[..., 6:], plain[..., 6:])


def test_the_logarithm_is_weighted_and_added_to_the_networks():
    prior = prior_of(one_organ(), 3, weight=2.0, blur_mm=4.0, num_cases=1)
    plain = torch.softmax(torch.randn(3, 8, 9, 10, generator=torch.Generator().manual_seed(1)), dim=0)
    made = torch.stack(list(fuse(iter(plain.unbind(1)), prior, (8, 9, 10), prior.affine, True)), dim=2)
    expected = plain * (prior.odds.float() / 3) ** 2
    torch.testing.assert_close(made[0], expected / expected.sum(0), rtol=1e-3, atol=1e-5)
    assert torch.equal(made[1], plain)


def test_a_prior_on_wide_voxels_lies_right_on_narrow_ones():
    """Of an organ in voxels of 4 mm, seen on a grid of 2 mm over the same box."""
    prior = prior_of(one_organ(), 3, weight=1.0, blur_mm=0.0, num_cases=1)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -1.0
    added = torch.stack(list(prior.slices((16, 18, 20), affine)), dim=1)
    found = added.argmax(0).numpy() == 2
    expected = (one_organ().counts[1] > 0).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    for line in (np.s_[:, 9, 12], np.s_[7, :, 12], np.s_[7, 9, :]):  # linear interpolation rounds the corners
        assert np.array_equal(found[line], expected[line])


# What is remembered


def test_thinned_embeddings_have_the_nodes_of_whole_ones():
    whole = patient_embedding(3)
    for spacing_mm in (8.0, 16.0, 24.0):
        ours, theirs = make_nodes(thinned(whole, spacing_mm), spacing_mm), make_nodes(whole, spacing_mm)
        assert ours.shape == theirs.shape and np.array_equal(ours.body, theirs.body)
        np.testing.assert_allclose(ours.affine, theirs.affine)
        torch.testing.assert_close(ours.vectors, theirs.vectors)


def test_a_remembered_case_comes_back_from_a_checkpoint(tmp_path):
    memory = memory_of(1, weight=2.5, blur_mm=9.0)
    torch.save(memory.as_dict(), tmp_path / "memory.pth")
    back = Memory(**torch.load(tmp_path / "memory.pth", weights_only=True))
    found = reference_of(back.cases[0])
    assert np.array_equal(found.labels, atlas_labels(1)) and back.weight == 2.5 and back.names == ["patient1"]
    cosine = (found.embedding.fine.float() * patient_embedding(1).fine.float()).sum(0)[found.embedding.body]
    assert cosine.median() > 0.98 and found.embedding.source == "voxels:1"


def test_a_large_case_takes_less_than_a_megabyte(tmp_path):
    """A long trunk of 512 x 500 x 450 mm whose vectors have 128 channels of noise, as hard to code as can be."""
    generator = torch.Generator().manual_seed(0)
    shape = (64, 56, 62)
    fine, coarse = (
        torch.nn.functional.normalize(torch.randn(128, *size, generator=generator), dim=0).half()
        for size in (shape, (64, 14, 16))
    )
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    body = torch.ones(shape, dtype=torch.bool)
    scan = Embedding("large", fine, coarse, affine, affine @ np.diag([1.0, 4, 4, 1]), body=body, fingerprint="x")
    index = np.stack(np.meshgrid(*(np.arange(4 * side) for side in shape), indexing="ij"), axis=-1)
    label = (np.sin(index / [9, 7, 11]).prod(-1) > 0.6).astype(np.uint8) * 7
    case = remember(scan, Volume(label, np.diag([2.0, 2.0, 2.0, 1.0]), ""))
    torch.save(case, tmp_path / "case.pth")
    assert (tmp_path / "case.pth").stat().st_size < 1e6


def test_options_set_the_strength():
    sam = Sam.__new__(Sam)
    sam.path, sam.info = "sam.pth", dataclasses.replace(SAM_INFO, fingerprint="atlas")
    scans = [(patient(1), labels_of(1))]
    made = make_memory(scans, sam, NUM_CLASSES, MemoryOptions(memory=True))
    assert (made.weight, made.blur_mm, made.is_learnt) == (3.0, 6.0, False)
    made = make_memory(scans, sam, NUM_CLASSES, MemoryOptions(memory=True, memory_weight=0.0, memory_blur_mm=2.0))
    assert (made.weight, made.blur_mm, made.is_learnt) == (0.0, 2.0, False)
    assert "1 labelled case (patient1), weight 0, blur 2 mm" in made.describe()


# What it says of a new scan


def winners(prior) -> np.ndarray:
    return prior.odds.float().argmax(0).numpy()


def test_labels_arrive_at_another_patient_and_at_the_same_scan_under_another_name():
    recall = recall_of(2)
    carried = winners(recall.prior(patient(1), SHAPE, AFFINE))
    again = winners(recall.prior(dataclasses.replace(patient(2), name="other", source="voxels:other"), SHAPE, AFFINE))
    for value in (1, 4):
        assert dice(carried == value, atlas_labels(1) == value) > 0.8, value
        assert dice(again == value, atlas_labels(2) == value) > 0.9, value


def test_a_case_never_remembers_itself():
    recall = recall_of(1, 2)
    alone = recall_of(2).prior(patient(3), SHAPE, AFFINE)
    for scan in (patient(1), patient(1, "another name"), dataclasses.replace(patient(3), name="patient1")):
        assert recall.prior(scan, SHAPE, AFFINE).num_cases == 1
    assert recall.prior(patient(3), SHAPE, AFFINE).num_cases == 2 and alone.num_cases == 1
    assert recall_of(1).prior(patient(1, "another name"), SHAPE, AFFINE) is None


def test_a_scan_without_a_patient_is_left_to_the_network():
    empty = dataclasses.replace(patient(3), body=torch.zeros(SHAPE, dtype=torch.bool))
    assert recall_of(1).prior(empty, SHAPE, AFFINE) is None


def test_of_two_cases_the_better_match_counts_more():
    """The worse case is embedded with noise, and its labels are wrong, so that its votes can be told apart."""
    noisy = with_noise(patient_embedding(3), 0.4, seed=0)
    good, bad = (reference_of(remember(patient(2), labels_of(2))), reference_of(remember(noisy, labels_of(3))))
    bad = dataclasses.replace(bad, labels=np.where(bad.labels == 1, 4, bad.labels))
    truth = atlas_labels(1) == 1
    shares = {}
    for is_mutual in (False, True):
        counts, values, _ = count_votes(patient(1), [good, bad], SHAPE, AFFINE, is_mutual=is_mutual)
        votes = dict(zip(values.tolist(), counts))
        shares[is_mutual] = votes[1][truth].sum() / (votes[1][truth].sum() + votes[4][truth].sum())
    assert shares[True] > shares[False] + 0.05 and shares[True] > 0.6


# The commands


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_labelled_corpus(tmp_path_factory.mktemp("corpus"))


def save_sam(path, seed: int):
    torch.manual_seed(seed)
    network = AnatomicalEmbedder(**compact_options(width=4, embed_dim=8))
    save_embedder(path, network, SAM_INFO)
    return path


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A SAM that nobody trained: of the same scan it still finds every place again."""
    return save_sam(tmp_path_factory.mktemp("sam") / "sam.pth", 0)


@pytest.fixture(scope="module")
def finished(corpus, sam, tmp_path_factory):
    """An uninterrupted run with a memory of all three training cases."""
    output_dir = tmp_path_factory.mktemp("finished")
    command.main(finetune_arguments(corpus, output_dir, **with_memory(sam)))
    return output_dir


def with_memory(sam, **changed) -> dict:
    return {"memory": "true", "sam_checkpoint": sam, "memory_weight": 3, "memory_blur_mm": 4} | changed


def test_a_run_keeps_its_memory_and_reports_both_dice(finished, sam):
    memory = Memory(**load_checkpoint(finished / "best.pth", "segmentation")["memory"])
    assert memory.names == ["case0", "case1", "case2"] and memory.weight == 3 and memory.blur_mm == 4
    assert memory.sam == {"path": str(sam), "fingerprint": load_embedder(sam)[1].fingerprint}
    for line in log_of(finished, "validation"):
        assert 0 <= line["dice_without_memory"] <= 1 and line["dice"] != line["dice_without_memory"]
    summary = json.loads((finished / "evaluation" / "results.json").read_text())
    assert summary["dice_without_memory"]["num"] == 2 and "dice_without_memory" in summary["organs"]["liver"]
    assert "memory: 3 labelled cases (case0, case1, case2)" in summary["description"]["memory"]
    assert "Dice without memory (%)" in (finished / "evaluation" / "results.md").read_text()


def test_without_a_memory_the_network_and_its_dice_are_the_same(finished, corpus, tmp_path):
    command.main(finetune_arguments(corpus, tmp_path))
    ours, theirs = (load_checkpoint(folder / LATEST)["model"] for folder in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "memory" not in load_checkpoint(tmp_path / "best.pth")
    plain = [line["dice"] for line in log_of(tmp_path, "validation")]
    assert plain == [line["dice_without_memory"] for line in log_of(finished, "validation")]


def test_interrupted_and_resumed_equals_uninterrupted(finished, corpus, sam, tmp_path, monkeypatch):
    flags = with_memory(sam, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path, steps=3, **flags))
    monkeypatch.setattr(command, "make_memory", None)  # the checkpoint's is taken
    moved = shutil.copy(sam, tmp_path / "moved.pth")
    command.main(finetune_arguments(corpus, tmp_path, **(flags | {"sam_checkpoint": moved})))
    ours, theirs = (load_checkpoint(folder / LATEST) for folder in (tmp_path, finished))
    assert ours["memory"]["sam"] == theirs["memory"]["sam"] and ours["step"] == theirs["step"]
    for one, other in zip(ours["memory"]["cases"], theirs["memory"]["cases"], strict=True):
        assert all(torch.equal(one["parts"][name], other["parts"][name]) for name in other["parts"])
    last, expected = (log_of(folder, "validation")[-1] for folder in (tmp_path, finished))
    assert last["step"] == expected["step"] == 4


def test_a_resumed_run_must_keep_its_memory(finished, corpus, sam, tmp_path):
    shutil.copy(finished / LATEST, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="--memory True -> False"):
        command.main(finetune_arguments(corpus, tmp_path))
    with pytest.raises(CheckpointError, match="--memory_weight 3.0 -> 2.0"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam, memory_weight=2)))
    with pytest.raises(CheckpointError, match="--sam_checkpoint"):
        other = save_sam(tmp_path / "other.pth", 1)
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(other)))
    old = load_checkpoint(finished / LATEST)
    for name in ("memory", "memory_cases", "sam_checkpoint"):
        del old["flags"][name]
    torch.save(old, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="--memory False -> True"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam)))


def one_of_two_ranks(rank: int, port: int, argv: list[str]) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    command.main(argv)


def test_two_ranks_have_one_memory(finished, corpus, sam, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = with_memory(sam, num_val_cases=0, steps=1, val_freq=1)
    run_ranks(one_of_two_ranks, (port, finetune_arguments(corpus, tmp_path, **flags)))
    summary = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert summary["num_cases"] == summary["dice_without_memory"]["num"] == 2
    ours, theirs = (load_checkpoint(folder / LATEST)["memory"]["cases"] for folder in (tmp_path, finished))
    assert all(torch.equal(one["label"], other["label"]) for one, other in zip(ours, theirs, strict=True))


def test_memory_cases_limits_what_is_remembered(corpus, sam, tmp_path):
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert Memory(**load_checkpoint(tmp_path / "best.pth")["memory"]).names == ["case0"]


def test_flags_that_cannot_be_are_named(corpus, sam, tmp_path):
    with pytest.raises(ValueError, match="--memory True, --sam_checkpoint : expected the file of SAM's weights"):
        command.main(finetune_arguments(corpus, tmp_path, memory="true"))
    with pytest.raises(ValueError, match="--memory true: expected a 3-D network"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam, roi_z=1)))


def predicted(finished, corpus, folder, *words: str) -> np.ndarray:
    """The label map that predict.py writes for a held-out case."""
    out = folder / "out.nii.gz"
    image = corpus / "images" / "case4_0000.nii.gz"
    best = ["--checkpoint_file", str(finished / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(image), str(out), *best, *words])
    return np.asarray(nib.load(out).dataobj)


def test_prediction_uses_the_memory_and_says_so(finished, corpus, tmp_path, capsys):
    fused = predicted(finished, corpus, tmp_path)
    shown = capsys.readouterr().out
    assert "memory: 3 labelled cases" in shown and "carried the labels of 3 of them, to 100% of the scan" in shown
    plain = predicted(finished, corpus, tmp_path, "--memory", "false")
    assert "memory" not in capsys.readouterr().out
    assert (fused != plain).any()


def test_a_remembered_scan_under_another_name_is_left_to_the_network(finished, corpus, tmp_path, capsys, sam):
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path / "one", **flags))
    image = shutil.copy(corpus / "images" / "case0_0000.nii.gz", tmp_path / "renamed.nii.gz")
    words = ["--checkpoint_file", str(tmp_path / "one" / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(image), str(tmp_path / "out.nii.gz"), *words])
    assert "the memory is not used" in capsys.readouterr().out


def test_predictions_find_the_labels_of_a_similar_scan(corpus, sam, tmp_path):
    """A copy whose voxels differ a little: nearly all labels come back, though the network learnt nothing."""
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false", memory_weight=20, memory_blur_mm=1)
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    hu, label = labelled_volume(0)
    affine = nib.load(corpus / "images" / "case0_0000.nii.gz").affine
    hu = (hu + np.random.default_rng(0).integers(-3, 4, hu.shape)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "copy.nii.gz")
    words = ["--checkpoint_file", str(tmp_path / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(tmp_path / "copy.nii.gz"), str(tmp_path / "out.nii.gz"), *words])
    found = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj)
    for value in (1, 2):
        assert dice(found == value, label == value) > 0.8, value


def test_the_evaluation_command_gives_both_dice(finished, corpus, tmp_path):
    paths = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--device", "cpu"]
    flags = ["--checkpoint_file", str(finished / "best.pth"), "--output_dir", str(tmp_path), "--overlap", "0"]
    scripts.evaluate_segmentation.main([*paths, *flags])
    for name in ("cases.csv", "results.md"):
        ours, theirs = ((folder / name).read_text().splitlines()[:5] for folder in (tmp_path, finished / "evaluation"))
        assert ours == theirs, name


def test_another_or_a_missing_sam_is_refused(finished, corpus, sam, tmp_path):
    other = save_sam(tmp_path / "other.pth", 1)
    marks = [load_embedder(path)[1].fingerprint for path in (other, sam)]
    with pytest.raises(ValueError, match=f"other.pth is SAM {marks[0]}, and .*best.pth .* SAM {marks[1]}"):
        predicted(finished, corpus, tmp_path, "--sam_checkpoint", str(other))
    with pytest.raises(ValueError, match="gone.pth: no such file.*--sam_checkpoint.*--memory false"):
        predicted(finished, corpus, tmp_path, "--sam_checkpoint", str(tmp_path / "gone.pth"))
    stored = load_checkpoint(finished / "best.pth")["memory"]
    stored = stored | {"sam": stored["sam"] | {"path": str(tmp_path / "moved.pth")}}
    with pytest.raises(ValueError, match="moved.pth: no such file. best.pth remembers"):
        open_recall(stored, "best.pth", "", CPU)
    assert open_recall(stored, "best.pth", str(sam), CPU).memory.names == ["case0", "case1", "case2"]


def test_a_sam_for_a_network_without_memory_is_refused(finished, corpus, sam, tmp_path):
    state = load_checkpoint(finished / "best.pth")
    del state["memory"]
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(ValueError, match="--sam_checkpoint .*remembers no cases"):
        predicted(tmp_path, corpus, tmp_path, "--sam_checkpoint", str(sam))
