"""Segmenters that remember labelled cases: the prior's maths, what is stored, and what is learnt."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from datasets.ct.nifti import Volume
from datasets.lists.label_classes import LabelClasses
from engine.segmentation.memory import (
    Memory,
    MemoryOptions,
    Recall,
    Sam,
    Scan,
    make_memory,
)
from engine.segmentation.prior import SPREAD, Votes, class_shares, fuse, prior_of
from engine.segmentation.remembering import BLURS_MM, WEIGHTS, learn_strength, left_out_dice
from engine.segmentation.segmenter import Segmenter
from engine.segmentation.setup import Preprocessing
from engine.segmentation.sliding_window import WindowOptions
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import count_votes, is_outside
from sam_embed.matching.kept import kept, load_references, reference_of, save_references
from sam_embed.matching.nodes import make_nodes, thinned
from tests.sam_fakes import (
    AFFINE,
    SHAPE,
    atlas_labels,
    dice,
    patient_embedding,
    patient_volume,
    with_noise,
)

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
    cases = [kept(patient(seed), labels_of(seed)) for seed in seeds]
    return dataclasses.replace(Memory(cases, {"path": "sam.pth", "fingerprint": "atlas"}, NUM_CLASSES), **changed)


def recall_of(*seeds: int, **changed) -> Recall:
    """Without a SAM: the scans of these tests are embedded."""
    return Recall(memory_of(*seeds, **changed), sam=None)


def seen(embedding: Embedding, seed: int) -> Scan:
    """What a memory looks at: the CT of that patient, with a known embedding."""
    return Scan.of(patient_volume(seed), embedding)


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


def test_what_cannot_lie_beyond_a_cases_end_is_excluded_there():
    reach = np.ones((8, 9, 10), np.float32)
    reach[:, :, 6:] = 0
    votes = dataclasses.replace(one_organ(reach), absent={2: np.arange(10) >= np.full((8, 9, 1), 8)})
    prior = prior_of(votes, 3, weight=3.0, blur_mm=0.0, num_cases=1)
    added = torch.stack(list(prior.slices(reach.shape, prior.affine)), dim=1)
    assert (added[..., 6:8] == 0).all()
    beyond = added[..., 8:]
    torch.testing.assert_close(beyond[0], beyond[1])
    expected = torch.full_like(beyond[0], 3 * np.log(0.1 / 1.45))
    torch.testing.assert_close(beyond[2] - beyond[0], expected, rtol=1e-3, atol=0)
    before = prior_of(one_organ(reach), 3, weight=3.0, blur_mm=0.0, num_cases=1)
    assert torch.equal(prior.odds[..., :8], before.odds[..., :8]) and prior.known_share == before.known_share


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
    case = kept(scan, Volume(label, np.diag([2.0, 2.0, 2.0, 1.0]), ""))
    torch.save(case, tmp_path / "case.pth")
    assert (tmp_path / "case.pth").stat().st_size < 1e6


def test_options_set_the_strength():
    sam = Sam.__new__(Sam)
    sam.path, sam.info = "sam.pth", dataclasses.replace(SAM_INFO, fingerprint="atlas")
    scans = [(patient(1), labels_of(1))]
    made = make_memory(scans, sam, NUM_CLASSES, MemoryOptions(memory=True))
    assert (made.weight, made.blur_mm, made.is_learnt) == (4.0, 0.0, False)
    made = make_memory(scans, sam, NUM_CLASSES, MemoryOptions(memory=True, memory_weight=0.0, memory_blur_mm=2.0))
    assert (made.weight, made.blur_mm, made.is_learnt) == (0.0, 2.0, False)
    assert "1 labelled case (patient1), weight 0, blur 2 mm" in made.describe()


# What it says of a new scan


def winners(prior) -> np.ndarray:
    return prior.odds.float().argmax(0).numpy()


def test_labels_arrive_at_another_patient_and_at_the_same_scan_under_another_name():
    recall = recall_of(2)
    carried = winners(recall.prior(seen(patient(1), 1)))
    again = winners(recall.prior(seen(dataclasses.replace(patient(2), name="other", source="voxels:other"), 2)))
    for value in (1, 4):
        assert dice(carried == value, atlas_labels(1) == value) > 0.8, value
        assert dice(again == value, atlas_labels(2) == value) > 0.9, value


def test_the_scans_intensities_sharpen_what_is_carried():
    """The organ is brighter than the tissue around it."""
    truth, recall, ct = atlas_labels(1) == 1, recall_of(3), patient_volume(1)
    bright = dataclasses.replace(ct, array=np.where(truth, 160, ct.array).astype(np.int16))
    plain, sharper = (winners(recall.prior(Scan.of(volume, patient(1)))) == 1 for volume in (ct, bright))
    assert dice(sharper, truth) > dice(plain, truth) + 0.02


@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
def test_outside_is_what_the_body_does_not_hold_on_any_grid(flips):
    rng, scan = np.random.default_rng(0), patient(1)
    body = np.zeros(scan.body.shape, bool)
    body[2:-2, 3:, 2:-3] = True
    scan = dataclasses.replace(scan, body=torch.from_numpy(body))
    shape = (21, 23, 25)
    affine = np.asarray(AFFINE, dtype=np.float64) @ np.diag([0.9, 0.8, 0.7, 1])
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
        affine[:3, axis] *= -1
    found = is_outside(scan, shape, affine)
    for voxel in rng.integers(0, shape, (300, 3)):
        at = np.linalg.inv(scan.fine_affine) @ affine @ np.append(voxel, 1)
        near = np.rint(at[:3]).astype(int)
        held = all(0 <= n < size for n, size in zip(near, body.shape))
        around = body[tuple(slice(max(n - 1, 0), n + 2) for n in near)] if held else np.zeros(0)
        if held and around.all():
            assert not found[tuple(voxel)]
        if not around.any() and not all(-1 <= a <= size for a, size in zip(at, body.shape)):
            assert found[tuple(voxel)]
    assert 0.1 < found.mean() < 0.9


def test_outside_of_the_body_the_memory_speaks_for_background():
    """A network that has seen little air finds organs there."""
    recall, scan = recall_of(2), patient(1)
    body = scan.body.clone()
    body[:, : body.shape[1] // 2] = False
    odds = recall.prior(seen(dataclasses.replace(scan, body=body), 1)).odds.float()
    outside = torch.from_numpy(is_outside(dataclasses.replace(scan, body=body), odds.shape[1:], AFFINE))
    assert outside.any() and not outside.all()
    deep = torch.from_numpy(binary_erosion(outside.numpy(), iterations=3))
    assert deep.any() and (odds[:, deep].argmax(0) == 0).all() and (odds[0, deep] > 10 * odds[1:, deep].amax(0)).all()


def test_a_case_never_remembers_itself():
    recall = recall_of(1, 2)
    alone = recall_of(2).prior(seen(patient(3), 3))
    for scan in (patient(1), patient(1, "another name"), dataclasses.replace(patient(3), name="patient1")):
        assert recall.prior(seen(scan, 3)).num_cases == 1
    assert recall.prior(seen(patient(3), 3)).num_cases == 2 and alone.num_cases == 1
    assert recall_of(1).prior(seen(patient(1, "another name"), 1)) is None


def test_an_organ_is_not_found_beyond_an_end_that_it_does_not_come_near():
    """The remembered case shows organ 1 whole and organ 3 cut; a network alone might find both above its end."""
    recall, scan = recall_of(2), patient(1)
    reference = recall.references[0]
    cut = reference.embedding.body.clone()
    rows = np.flatnonzero((reference.labels == 1).any(axis=(1, 2)))
    assert rows[-1] + 2 < cut.shape[0] - 4
    cut[rows[-1] + 2 :] = False
    labels = reference.labels.copy()
    labels[rows[-1] + 1][reference.embedding.body[rows[-1] + 1].numpy()] = 3  # fills the plane in which it is cut
    recall.references[0] = dataclasses.replace(
        reference, embedding=dataclasses.replace(reference.embedding, body=cut), labels=labels
    )
    votes, _ = recall.votes(seen(scan, 1))
    above = np.zeros(votes.reach.shape, bool)
    above[-5:] = True
    above &= (votes.reach == 0) & scan.body.numpy()
    assert above.any() and votes.absent[1][above].all() and not votes.absent[3][above].any()


def test_a_scan_without_a_patient_is_left_to_the_network():
    empty = dataclasses.replace(patient(3), body=torch.zeros(SHAPE, dtype=torch.bool))
    assert recall_of(1).prior(seen(empty, 3)) is None
    with pytest.raises(ValueError, match="patient3 shows no patient"):
        kept(empty, labels_of(3))


def test_a_file_of_references_holds_what_was_kept(tmp_path):
    cases = [kept(patient(seed), labels_of(seed)) for seed in (1, 2)]
    save_references(tmp_path / "references.safetensors", cases, {"generator": 2})
    found, facts = load_references(tmp_path / "references.safetensors")
    assert facts == {"generator": 2} and len(found) == 2
    for case, reference in zip(cases, found):
        wanted = reference_of(case)
        assert reference.embedding.name == wanted.embedding.name
        assert torch.equal(reference.embedding.fine, wanted.embedding.fine)
        assert np.array_equal(reference.labels, wanted.labels) and np.array_equal(reference.affine, wanted.affine)


def test_a_damaged_file_of_references_is_named(tmp_path):
    path = tmp_path / "references.safetensors"
    save_references(path, [kept(patient(1), labels_of(1))], {})
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="references.safetensors: not readable as labelled references"):
        load_references(path)
    with pytest.raises(ValueError, match="none.safetensors: not readable"):
        load_references(tmp_path / "none.safetensors")


def test_of_two_cases_the_better_match_counts_more():
    """The worse case is embedded with noise, and its labels are wrong, so that its votes can be told apart."""
    noisy = with_noise(patient_embedding(3), 0.4, seed=0)
    good, bad = (reference_of(kept(patient(2), labels_of(2))), reference_of(kept(noisy, labels_of(3))))
    bad = dataclasses.replace(bad, labels=np.where(bad.labels == 1, 4, bad.labels))
    truth = atlas_labels(1) == 1
    shares = []
    for other in (bad, dataclasses.replace(bad, embedding=good.embedding)):
        counts, values, *_ = count_votes(patient(1), [good, other], SHAPE, AFFINE)
        votes = dict(zip(values.tolist(), counts))
        shares.append(votes[1][truth].sum() / (votes[1][truth].sum() + votes[4][truth].sum()))
    worse_match, equal_match = shares
    assert worse_match > equal_match + 0.05 and worse_match > 0.6


class Sure(torch.nn.Module):
    """A network that takes every voxel for background, by so many nats: windows [B, 1, D, H, W] -> [B, 5, D, H, W]."""

    def __init__(self, nats: float) -> None:
        super().__init__()
        self.nats = torch.tensor([nats, 0, 0, 0, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.nats.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[2:])


def sure_segmenter(nats: float, *seeds: int) -> Segmenter:
    classes = LabelClasses(tuple(range(NUM_CLASSES)), ("background", "a", "b", "c", "d"))
    known = Preprocessing((8.0, 8.0, 8.0), -125.0, 225.0, (32, 32, 32))
    return Segmenter(Sure(nats), classes, known, WindowOptions((32, 32, 32), overlap=0.0), CPU, recall_of(*seeds))


def read_patient(name: str) -> tuple[Volume, np.ndarray]:
    seed = int(name.removeprefix("patient"))
    return patient_volume(seed), atlas_labels(seed)


def test_weight_and_blur_are_learnt_by_leaving_cases_out():
    """The odds that are spread over 5 classes are 3.8 nats at most: 12 nats need a weight of 4, and little blur."""
    weight, blur_mm = learn_strength(sure_segmenter(12.0, 1, 2), read_patient, MemoryOptions())
    assert weight in WEIGHTS and weight >= 4 and blur_mm in BLURS_MM and blur_mm <= 6
    assert learn_strength(sure_segmenter(0.0, 1, 2), read_patient, MemoryOptions(memory_weight=0.5))[0] == 0.5
    assert learn_strength(sure_segmenter(12.0, 1, 2), read_patient, MemoryOptions(memory_blur_mm=5.0))[1] == 5.0


def test_the_left_out_case_does_not_speak_for_itself():
    """The other case has no organ: had the left-out one spoken, its organs would have been found."""
    segmenter = sure_segmenter(0.0, 1, 2)
    empty = dataclasses.replace(segmenter.recall.reference_of("patient2"), labels=np.zeros(SHAPE, np.uint8))
    segmenter.recall.references[1] = empty
    assert left_out_dice(segmenter, *read_patient("patient1"), "patient1", [(3.0, 3.0)]) == 0
    assert left_out_dice(segmenter, *read_patient("patient2"), "patient2", [(3.0, 3.0)]) > 0.7
