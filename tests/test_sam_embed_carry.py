"""Dense maps and carried labels: patients whose true map is known, places out of reach, votes, finer grids, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from datasets.ct.geometry import index_to_world
from sam_embed.matching.carry import carry_labels, count_votes
from sam_embed.matching.dense import dense_map, map_both_ways, map_nodes
from sam_embed.matching.nodes import make_nodes, window_cost
from sam_embed.matching.reference import Reference
from tests.sam_fakes import (
    AFFINE,
    ORGANS,
    SHAPE,
    atlas_labels,
    dice,
    patient_embedding,
    to_atlas,
    to_patient,
    with_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(seed: int) -> Reference:
    return Reference(patient_embedding(seed), atlas_labels(seed), AFFINE)


def test_windows_are_compared_node_by_node(monkeypatch):
    """Windows that begin inside and outside of the grid, in blocks that do not divide their number."""
    monkeypatch.setattr("sam_embed.matching.nodes.NODES_PER_BLOCK", 4)
    nodes = make_nodes(with_noise(patient_embedding(1), 0.3, 0), 40.0)
    rng = np.random.default_rng(0)
    centres = rng.integers(-4, np.array(nodes.shape) + 4, size=(30, 3))
    offsets = rng.integers(-2, 3, size=(7, 3))
    vectors = torch.nn.functional.normalize(torch.randn(30, nodes.vectors.shape[1]), dim=1)
    found = window_cost(vectors, nodes, centres, offsets)
    grid = nodes.vectors.view(*nodes.shape, -1)
    for row, centre in enumerate(centres):
        for column, place in enumerate(centre + offsets):
            is_inside = ((place >= 0) & (place < nodes.shape)).all()
            similarity = grid[tuple(place)] @ vectors[row] if is_inside else torch.tensor(0.0)
            torch.testing.assert_close(found[row, column], 1 - similarity)


@pytest.mark.parametrize("noise, limit_mm", [(0.0, 4.0), (0.2, 5.0)])
def test_dense_map_finds_the_true_places(noise, limit_mm):
    scan, other = (with_noise(patient_embedding(seed), noise, seed) for seed in (1, 2))
    found = dense_map(scan, other)
    nodes = make_nodes(scan, 8.0)
    assert found.places_mm.shape == (*SHAPE, 3) and np.allclose(nodes.affine, AFFINE)
    truth = to_patient(2, to_atlas(1, nodes.points_mm))
    miss = np.linalg.norm(found.places_mm - truth, axis=-1)
    assert np.median(miss[nodes.body]) < limit_mm
    assert found.trust.min() >= 0 and found.trust.max() <= 1


def test_both_ways_at_once_give_the_two_maps():
    scan, other = (make_nodes(with_noise(patient_embedding(seed), 0.2, seed), 8.0) for seed in (1, 2))
    for found, wanted in zip(map_both_ways(scan, other), (map_nodes(scan, other), map_nodes(other, scan)), strict=True):
        np.testing.assert_array_equal(found.places_mm, wanted.places_mm)
        np.testing.assert_array_equal(found.trust, wanted.trust)
        np.testing.assert_array_equal(found.affine, wanted.affine)


def test_air_around_the_patient_gets_no_votes():
    """Maps are extrapolated beyond the body, where the reference's labels (here: all of its voxels) may lie."""
    scan, full = patient_embedding(1), reference(2)
    everywhere = dataclasses.replace(full, labels=np.full_like(full.labels, 7))
    votes, values, reach, _ = count_votes(scan, [everywhere], SHAPE, AFFINE)
    near = binary_dilation(scan.body.numpy())
    assert values.tolist() == [0, 7] and (votes[1][scan.body.numpy()] > 0).mean() > 0.9
    assert not votes[:, ~near].any() and not reach[~near].any() and not near.all()


def test_trust_is_lower_where_matches_scatter():
    scan, other = patient_embedding(1), patient_embedding(2)
    noisy = with_noise(scan, 1.0, 0)
    half = scan.fine.shape[1] // 2
    mixed = dataclasses.replace(
        scan,
        fine=torch.cat([scan.fine[:, :half], noisy.fine[:, half:]], dim=1),
        coarse=torch.cat([scan.coarse[:, : half // 2], noisy.coarse[:, half // 2 :]], dim=1),
    )
    found, body = dense_map(mixed, other), scan.body.numpy()
    assert found.trust[:half][body[:half]].mean() > found.trust[half:][body[half:]].mean() + 0.2


def test_node_grid_keeps_places_when_it_is_wider_than_the_embedding():
    embedding = patient_embedding(3)
    nodes = make_nodes(embedding, 16.0)
    assert nodes.spacing_mm == pytest.approx([16.0] * 3) and nodes.shape == (17, 13, 17)
    every = tuple(slice((size - 1) % 2 // 2, None, 2) for size in SHAPE)
    vectors = embedding.fine[(slice(None), *every)].float().flatten(1).T / 2**0.5
    torch.testing.assert_close(nodes.vectors[:, : len(embedding.fine)], vectors, atol=2e-3, rtol=0)
    assert np.array_equal(nodes.body, embedding.body.numpy()[every])


def test_labels_arrive_on_the_grid_that_is_asked_for():
    """A grid of 4 mm in another orientation than the embedding's: labels lie where the scan's organs are."""
    affine = np.array([[-4.0, 0, 0, 128], [0, 0, 4.0, -120], [0, 4.0, 0, -690], [0, 0, 0, 1]])
    shape = (66, 64, 52)
    carried = carry_labels(patient_embedding(1), [reference(2), reference(3)], shape, affine)
    truth = atlas_labels(1, shape, affine)
    assert carried.labels.shape == carried.confidence.shape == shape and carried.labels.dtype == np.uint8
    for value in ORGANS:
        assert dice(carried.labels == value, truth == value) > 0.85, value
    assert carried.confidence.dtype == np.float32 and carried.confidence.min() >= 0 and carried.confidence.max() <= 1
    assert set(np.unique(carried.labels)) == {0, *ORGANS}


def test_places_outside_of_a_reference_are_left_empty():
    """The reference's label map shows its lower half only: no vote and no confidence above."""
    full = reference(2)
    half = SHAPE[0] // 2
    cut = Reference(full.embedding, full.labels[:half], full.affine)
    votes, values, reach, _ = count_votes(patient_embedding(1), [cut, full], SHAPE, AFFINE)
    assert values.tolist() == [0, *ORGANS] and votes.shape == (3, *SHAPE)
    truth = to_patient(2, to_atlas(1, index_to_world(AFFINE, np.argwhere(np.ones(SHAPE, bool))))).reshape(*SHAPE, 3)
    top = index_to_world(AFFINE, np.array([half, 0, 0]))[2]
    body = patient_embedding(1).body.numpy()
    assert np.allclose(reach[body & (truth[..., 2] > top + 16)], 0.5)
    assert np.allclose(reach[body & (truth[..., 2] < top - 16)], 1.0)
    assert (votes.sum(axis=0) <= 1 + 1e-5).all()
    alone = carry_labels(patient_embedding(1), [cut], SHAPE, AFFINE)
    assert (alone.confidence[body & (truth[..., 2] > top + 16)] == 0).all()


def test_the_majority_wins():
    """One of three references calls organ 1 by the name of organ 4."""
    wrong = reference(3)
    wrong = dataclasses.replace(wrong, labels=np.where(wrong.labels == 1, 4, wrong.labels).astype(np.uint8))
    carried = carry_labels(patient_embedding(1), [reference(2), wrong, reference(4)], SHAPE, AFFINE)
    truth = atlas_labels(1)
    assert dice(carried.labels == 1, truth == 1) > 0.8
    unanimous = carry_labels(patient_embedding(1), [reference(2), reference(4)], SHAPE, AFFINE)
    inside = np.linalg.norm(
        to_atlas(1, index_to_world(AFFINE, np.argwhere(truth == 1))) - np.array(ORGANS[1][0]), axis=1
    )
    core = tuple(np.argwhere(truth == 1)[inside < 20].T)
    assert carried.confidence[core].mean() < unanimous.confidence[core].mean()


def test_votes_on_a_coarse_grid_give_smooth_labels_on_a_fine_one():
    affine = AFFINE @ np.diag([0.25, 0.25, 0.25, 1])
    shape = tuple(4 * size for size in SHAPE)
    carried = carry_labels(patient_embedding(1), [reference(2)], shape, affine, vote_mm=8.0)
    truth = atlas_labels(1, shape, affine)
    assert dice(carried.labels == 1, truth == 1) > 0.85
    blocks = carried.labels[1:137:4, 1:105:4, 1:137:4].repeat(4, 0).repeat(4, 1).repeat(4, 2)
    assert (carried.labels != blocks).any(), "organs' surfaces do not follow the coarse voxels"


def test_errors_say_what_is_expected():
    scan, good = patient_embedding(1), reference(2)
    with pytest.raises(ValueError, match="at least one"):
        carry_labels(scan, [], SHAPE, AFFINE)
    with pytest.raises(ValueError, match="integers"):
        carry_labels(scan, [dataclasses.replace(good, labels=good.labels.astype(float))], SHAPE, AFFINE)
    with pytest.raises(ValueError, match="0 or more"):
        carry_labels(scan, [dataclasses.replace(good, labels=good.labels.astype(int) - 1)], SHAPE, AFFINE)
    stranger = dataclasses.replace(good.embedding, fingerprint="other")
    with pytest.raises(ValueError, match="different weights"):
        carry_labels(scan, [dataclasses.replace(good, embedding=stranger)], SHAPE, AFFINE)
    empty = dataclasses.replace(good.embedding, body=torch.zeros(SHAPE, dtype=torch.bool))
    with pytest.raises(ValueError, match="body"):
        carry_labels(scan, [dataclasses.replace(good, embedding=empty)], SHAPE, AFFINE)
