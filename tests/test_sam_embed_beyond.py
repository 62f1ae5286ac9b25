"""What a reference says of places beyond its ends."""

import dataclasses

import numpy as np
import pytest
import torch

from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.beyond import Beyond, Ends, excluded
from sam_embed.matching.reference import Reference
from tests.sam_fakes import patient_embedding

TURNS = [np.eye(4), np.diag([-1.0, 1, -1, 1]), np.eye(4)[[2, 0, 1, 3]]]


def reference(turn: np.ndarray) -> Embedding:
    """The body lies in voxels 2 to 9 of 12, of 8 mm."""
    body = torch.zeros(12, 12, 12, dtype=torch.bool)
    body[2:10, 2:10, 2:10] = True
    return dataclasses.replace(patient_embedding(1), body=body, fine_affine=turn @ np.diag([8.0, 8.0, 8.0, 1.0]))


def fine_affine(scan: Embedding) -> np.ndarray:
    """Of a grid with four voxels along each side of the embedding's, over the same box."""
    affine = scan.fine_affine @ np.diag([0.25, 0.25, 0.25, 1.0])
    affine[:3, 3] += affine[:3, :3] @ [-1.5, -1.5, -1.5]
    return affine


@pytest.mark.parametrize("turn", TURNS)
def test_a_label_is_cut_at_the_ends_that_it_comes_near(turn):
    """Labels in voxels of 2 mm: the body fills 8 to 39 of them, and 8 mm are 4."""
    scan = reference(turn)
    affine = fine_affine(scan)
    for first, last, low, high in ((12, 36, 0, 0), (11, 30, 1, 0), (20, 37, 0, 1), (8, 30, 1, 0), (8, 40, 1, 1)):
        for axis in range(3):
            labels = np.zeros((48, 48, 48), np.uint8)
            box = [slice(20, 28)] * 3
            box[axis] = slice(first, last)
            labels[tuple(box)] = 5
            found = Ends.of(Reference(scan, labels, affine)).cuts
            assert list(found) == [5]
            assert list(found[5]) == [2 * axis] * low + [2 * axis + 1] * high, (first, last, axis)
            for face, points_mm in found[5].items():
                index = (points_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
                along = index[:, axis]
                assert (along <= 12 if face % 2 == 0 else along >= 35).all() and np.ptp(index, axis=0).max() == 7


@pytest.mark.parametrize("turn", TURNS)
def test_a_place_lies_beyond_the_nearest_end(turn):
    scan = reference(turn)
    index = np.array([[5.5, 5, 13], [5, 6, 1], [11, 5, 5], [0, 4, 7], [6, 10, 6], [6, -3, 3]])
    places = index @ scan.fine_affine[:3, :3].T + scan.fine_affine[:3, 3]
    ends = Ends.of(Reference(scan, np.zeros((48, 48, 48), np.uint8), fine_affine(scan)))
    assert ends.nearest(places).tolist() == [5, 4, 1, 0, 3, 2]


def test_a_label_goes_on_where_it_is_cut_alone():
    """A kidney that is whole, and an aorta that is cut at the low end of the first axis, in voxels of 2 mm."""
    scan = reference(np.eye(4))
    affine = fine_affine(scan)
    labels = np.zeros((48, 48, 48), np.uint8)
    labels[20:26, 12:16, 12:16] = 1
    labels[8:30, 22:26, 22:26] = 2
    index = np.array([[6, 24, 24], [6, 30, 24], [6, 39, 24], [42, 24, 24], [6, 13, 13]])  # 12 mm and 28 mm beside it
    places = (index @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32)
    reach = np.zeros((1, 1, 7), np.float32)
    reach[..., 5:] = 0.5
    beyond = [Beyond(np.array([0, 1, 2, 3, 6]), places)]
    ends = Ends.of(Reference(scan, labels, affine))
    found = excluded([ends], beyond, reach)
    assert found[1].ravel().tolist() == [True, True, True, True, False, False, False]
    assert found[2].ravel().tolist() == [False, False, True, True, False, False, False]
    # A second reference that has no kidney says nothing of it; another place is beyond its end alone.
    more = [*beyond, Beyond(np.array([4, 5]), places[[4, 4]])]
    without_kidney = Ends.of(Reference(scan, labels * (labels == 2), affine))
    both = excluded([ends, without_kidney], more, reach)
    assert both[1].ravel().tolist() == [True, True, True, True, False, False, False]
    assert both[2].ravel().tolist() == [False, False, True, True, True, False, False]
