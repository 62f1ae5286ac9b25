"""Instance optimisation: places between nodes are found, and what lies outside of the body goes along."""

import numpy as np
import pytest
import torch

from sam_embed.matching.instance import RADIUS, optimised
from sam_embed.matching.nodes import Nodes

SPACING = np.array([8.0, 6.0, 7.0])


def nodes_of(places: np.ndarray, body: np.ndarray) -> Nodes:
    """Nodes whose vectors depend smoothly on places [d, h, w, 3], in nodes."""
    waves = np.random.default_rng(0).normal(size=(3, 24)) * 0.45
    features = torch.from_numpy(np.concatenate([np.sin(places @ waves), np.cos(places @ waves)], axis=-1))
    vectors = torch.nn.functional.normalize(features.float().flatten(0, 2), dim=1)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, :3] = affine[:3, :3][::-1] * np.array([[1], [-1], [1]])  # axes in another order, one reversed
    return Nodes(body.shape, affine, vectors, body)


def grid(shape) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float)


@pytest.mark.parametrize("shape, left_over", [((14, 16, 18), 0.5), ((1, 20, 24), 0.6)])
def test_shifts_of_less_than_a_node_are_found(shape, left_over):
    places = grid(shape)
    shift = 0.5 * np.sin(places[..., [1, 2, 0]] / 6) + 0.3
    shift[..., np.array(shape) == 1] = 0
    body = np.ones(shape, dtype=bool)
    reference, scan = nodes_of(places, body), nodes_of(places + shift, body)
    found = optimised(scan, reference, np.zeros((*shape, 3)))
    index = found @ np.linalg.inv(reference.affine[:3, :3]).T
    rim = tuple(slice(1, -1) if size > 1 else slice(None) for size in shape)
    before, after = np.linalg.norm(shift, axis=-1)[rim].mean(), np.linalg.norm(index - shift, axis=-1)[rim].mean()
    assert after < left_over * before


def test_a_map_that_is_right_stays():
    places = grid((10, 10, 10))
    body = np.ones((10, 10, 10), dtype=bool)
    nodes = nodes_of(places, body)
    assert np.abs(optimised(nodes, nodes, np.zeros((10, 10, 10, 3)))).mean() < 0.1 * SPACING.min()


def test_what_lies_outside_of_the_body_follows_its_surroundings():
    places = grid((12, 12, 12))
    body = np.zeros((12, 12, 12), dtype=bool)
    body[:, :, :6] = True
    vectors = nodes_of(places + [0.7, 0, 0], body).vectors.clone().view(12, 12, 12, -1)
    vectors[:, :, 6:] = torch.nn.functional.normalize(torch.randn(vectors[:, :, 6:].shape), dim=-1)  # must not count
    scan = Nodes((12, 12, 12), nodes_of(places, body).affine, vectors.flatten(0, 2), body)
    found = optimised(scan, nodes_of(places, body), np.zeros((12, 12, 12, 3)))
    index = found @ np.linalg.inv(scan.affine[:3, :3]).T
    assert np.abs(index[2:-2, 2:-2, 1:5] - [0.7, 0, 0]).mean() < 0.15
    assert np.abs(index[2:-2, 2:-2, 7] - [0.7, 0, 0]).mean() < 0.3


def test_corrections_end_at_the_window():
    places = grid((8, 8, 8))
    body = np.ones((8, 8, 8), dtype=bool)
    far = optimised(nodes_of(places + [4.0, 0, 0], body), nodes_of(places, body), np.zeros((8, 8, 8, 3)))
    assert np.abs(far @ np.linalg.inv(nodes_of(places, body).affine[:3, :3]).T).max() < 2 * RADIUS
