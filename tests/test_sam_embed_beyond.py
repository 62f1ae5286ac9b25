"""What a reference says of places beyond its ends."""

import dataclasses

import numpy as np
import pytest
import torch

from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.beyond import Beyond, excluded, faces_reached, nearest_faces
from tests.sam_fakes import patient_embedding

TURNS = [np.eye(4), np.diag([-1.0, 1, -1, 1]), np.eye(4)[[2, 0, 1, 3]]]


def reference(turn: np.ndarray) -> Embedding:
    """The body lies in voxels 2 to 9 of 12, of 8 mm."""
    body = torch.zeros(12, 12, 12, dtype=torch.bool)
    body[2:10, 2:10, 2:10] = True
    return dataclasses.replace(patient_embedding(1), body=body, fine_affine=turn @ np.diag([8.0, 8.0, 8.0, 1.0]))


@pytest.mark.parametrize("turn", TURNS)
def test_a_label_reaches_the_ends_that_it_comes_near(turn):
    """Labels in voxels of 2 mm: the body fills 8 to 39 of them, and 8 mm are 4."""
    scan = reference(turn)
    affine = scan.fine_affine @ np.diag([0.25, 0.25, 0.25, 1.0])
    affine[:3, 3] += affine[:3, :3] @ [-1.5, -1.5, -1.5]  # the first of four voxels in each of the body's
    for first, last, low, high in ((12, 36, 0, 0), (11, 30, 1, 0), (20, 37, 0, 1), (8, 30, 1, 0), (8, 40, 1, 1)):
        for axis in range(3):
            labels = np.zeros((48, 48, 48), np.uint8)
            box = [slice(20, 28)] * 3
            box[axis] = slice(first, last)
            labels[tuple(box)] = 5
            expected = np.zeros(6, bool)
            expected[2 * axis : 2 * axis + 2] = low, high
            found = faces_reached(scan, labels, affine)
            assert list(found) == [5] and np.array_equal(found[5], expected), (first, last, axis)


@pytest.mark.parametrize("turn", TURNS)
def test_a_place_lies_beyond_the_nearest_end(turn):
    scan = reference(turn)
    index = np.array([[5.5, 5, 13], [5, 6, 1], [11, 5, 5], [0, 4, 7], [6, 10, 6], [6, -3, 3]])
    places = index @ scan.fine_affine[:3, :3].T + scan.fine_affine[:3, 3]
    assert nearest_faces(scan, places).tolist() == [5, 4, 1, 0, 3, 2]


def test_a_label_is_excluded_beyond_ends_that_it_does_not_reach_where_nobody_shows_the_place():
    reach = np.array([[[1.0, 0, 0, 0, 0.5]]], np.float32)
    kidney, aorta = np.zeros(6, bool), np.array([1, 0, 0, 0, 0, 0], bool)
    beyond = [Beyond(np.array([1, 2, 4]), np.array([0, 1, 1], np.uint8))]
    found = excluded([{1: kidney, 2: aorta}], beyond, reach)
    assert found[1].ravel().tolist() == [False, True, True, False, False]
    assert found[2].ravel().tolist() == [False, False, True, False, False]
    # A second reference that has no kidney says nothing of it, and one that sees the aorta end there excludes it.
    more = [*beyond, Beyond(np.array([1, 3]), np.array([0, 5], np.uint8))]
    both = excluded([{1: kidney, 2: aorta}, {2: kidney}], more, reach)
    assert both[1].ravel().tolist() == [False, True, True, False, False]
    assert both[2].ravel().tolist() == [False, True, True, True, False]
