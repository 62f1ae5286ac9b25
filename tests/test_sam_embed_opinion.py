"""Carried votes and a network's opinion of the same voxels."""

import numpy as np
import pytest

from sam_embed.matching.carry import carry_labels, coarser_grid
from sam_embed.matching.opinion import SPREAD, joined
from sam_embed.matching.reference import Reference
from tests.sam_fakes import AFFINE, SHAPE, atlas_labels, patient_embedding


def test_votes_and_opinion_are_multiplied_and_keep_their_sum():
    votes = np.array([[0.6, 0.0, 0.2], [0.3, 0.0, 0.0], [0.0, 0.0, 0.6]], np.float32).reshape(3, 1, 1, 3)
    opinion = {0: np.array([0.1, 0.5, 0.0]), 4: np.array([0.9, 0.2, 1.0]), 7: np.array([0.0, 0.3, 0.0]), 9: np.zeros(3)}
    opinion = {value: share.reshape(1, 1, 3) for value, share in opinion.items()}
    found = joined(votes, [0, 4, 7], opinion)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), votes.sum(axis=0), atol=1e-6)
    low, high = ((1 - SPREAD) * share + SPREAD / 3 for share in (0.1, 0.9))
    wanted = 0.9 * np.array([0.6 * low, 0.3 * high, 0.0]) / (0.6 * low + 0.3 * high)
    np.testing.assert_allclose(found[:, 0, 0, 0], wanted, rtol=1e-5)
    assert (found[:, 0, 0, 1] == 0).all(), "nobody voted there"
    # A network that is sure of what nobody voted for changes nothing between the others.
    np.testing.assert_allclose(found[:, 0, 0, 2], votes[:, 0, 0, 2], atol=1e-6)


def test_labels_without_an_opinion_are_named():
    votes = np.ones((2, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match=r"votes for labels \[5\], and the second opinion knows \[0, 1\]"):
        joined(votes, [0, 5], {0: np.ones((1, 1, 1)), 1: np.ones((1, 1, 1))})


def test_an_opinion_is_asked_on_the_grid_of_the_votes_and_takes_an_organs_doubtful_places():
    scan = patient_embedding(1)
    references = [Reference(patient_embedding(seed), atlas_labels(seed), AFFINE) for seed in (2, 3, 4)]
    values = np.unique(references[0].labels).tolist()
    asked = []

    def opinion(shape, affine, missing=None):
        asked.append((shape, affine))
        shares = {value: np.full(shape, 1 / len(values), np.float32) for value in values}
        if missing is not None:
            shares[0], shares[missing] = shares[0] * 2, shares[missing] * 0
        return shares

    plain = carry_labels(scan, references, SHAPE, AFFINE)
    same = carry_labels(scan, references, SHAPE, AFFINE, opinion=opinion)
    np.testing.assert_array_equal(same.labels, plain.labels)
    np.testing.assert_allclose(same.confidence, plain.confidence, atol=1e-5)
    shape, affine = coarser_grid(SHAPE, AFFINE, 3.0)
    assert asked[0][0] == shape and np.allclose(asked[0][1], affine)
    less = carry_labels(scan, references, SHAPE, AFFINE, opinion=lambda *grid: opinion(*grid, missing=values[1]))
    counts = [[int((found.labels == value).sum()) for value in values[1:]] for found in (plain, less)]
    assert counts[1][0] < 0.9 * counts[0][0] and np.allclose(counts[1][1:], counts[0][1:], rtol=0.05), counts
