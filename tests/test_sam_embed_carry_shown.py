"""What another volume shows of a scan, and labels that end where their reference ends."""

import dataclasses

import numpy as np
import pytest

from datasets.ct.geometry import index_to_world
from sam_embed.matching.carry import NODE_MM, carry_labels
from sam_embed.matching.dense import NEAR_MM, is_shown, map_nodes
from sam_embed.matching.nodes import make_nodes
from sam_embed.matching.reference import Reference
from tests.sam_fakes import AFFINE, SHAPE, lower_part, patient_embedding, to_atlas, to_patient

pytestmark = pytest.mark.usefixtures("one_thread")


def above_mm(points_mm: np.ndarray, num_slices: int) -> np.ndarray:
    """How far above the end of patient 2's lower part these points of patient 1 lie there, mm."""
    top_mm = index_to_world(AFFINE, [num_slices - 0.5, 0, 0])[2]
    return to_patient(2, to_atlas(1, points_mm))[..., 2] - top_mm


@pytest.mark.parametrize("num_slices", [24, 10])
def test_the_shown_part_ends_where_the_other_scan_ends(num_slices):
    """Points of the whole body, near the end too."""
    scan, other = patient_embedding(1), lower_part(2, num_slices)
    nodes, others = make_nodes(scan, NODE_MM), make_nodes(other, NODE_MM)
    above = above_mm(nodes.points_mm[nodes.body], num_slices)
    shown = is_shown(others, map_nodes(others, nodes), nodes.points_mm[nodes.body])
    assert shown[above < 0].all() and not shown[above > NEAR_MM + 8].any()


def rod(seed: int) -> np.ndarray:
    """An organ along the whole body, on the grid of a patient's embedding."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    place = to_atlas(seed, index_to_world(AFFINE, index)) - [0, -10, 0]
    return (3 * (np.linalg.norm(place[..., :2], axis=-1) < 30)).astype(np.uint8)


def test_labels_end_where_the_reference_ends():
    num_slices = 17
    reference = Reference(lower_part(2, num_slices), rod(2)[:num_slices], AFFINE)
    affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])  # twice as fine as the embedding
    shape = tuple(2 * size for size in SHAPE)
    alone = carry_labels(patient_embedding(1), [reference], shape, affine)
    points_mm = index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
    above, truth = above_mm(points_mm, num_slices), rod(1).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    hidden = above > NEAR_MM + 2 * NODE_MM
    assert not alone.labels[hidden].any() and not alone.confidence[hidden].any()
    body = patient_embedding(1).body.numpy().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    seen = body & (above < -16)
    assert (alone.confidence[seen] > 0.3).mean() > 0.95
    found, truth = alone.labels[seen] == 3, truth[seen] == 3
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8
    whole = dataclasses.replace(reference, embedding=patient_embedding(3), labels=rod(3))
    both = carry_labels(patient_embedding(1), [reference, whole], shape, affine)
    assert (both.labels[hidden & body] == 3).any()
