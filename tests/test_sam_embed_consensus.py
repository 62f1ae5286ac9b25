"""Neighbourhood consensus: local maps are found among outliers, and matches that nothing confirms are told apart."""

import dataclasses

import numpy as np
import pytest
import torch

from datasets.ct.geometry import index_to_world, world_to_index
from sam_embed.embeddings.embedding_store import EmbeddingCache, save_embedding
from sam_embed.matching.consensus import CORNERS, consensus, fit_local_maps
from sam_embed.matching.match import match_points, score_at, similarity_map
from sam_embed.matching.mine import MiningOptions, draw_points, mine_case
from tests.sam_fakes import AFFINE, SHAPE, patient_embedding, to_atlas, to_patient

OFFSETS = np.concatenate([np.zeros((1, 3)), 20.0 * CORNERS])
RNG = np.random.default_rng(0)


def test_neighbours_lie_at_the_radius_and_balance():
    offsets = 20.0 * CORNERS
    np.testing.assert_allclose(np.linalg.norm(offsets, axis=1), 20.0)
    np.testing.assert_allclose(offsets.mean(axis=0), 0.0, atol=1e-12)
    assert len(np.unique(offsets.round(6), axis=0)) == len(offsets)


def affine_places(num: int, stretch: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """True centres [N, 3], and where an affine map near the identity puts each centre's neighbourhood."""
    centres = RNG.uniform(-200, 200, (num, 3))
    linear = np.eye(3) + RNG.uniform(-stretch, stretch, (num, 3, 3))
    return centres, centres[:, None] + np.einsum("nab,pb->npa", linear, OFFSETS)


def test_right_matches_stay_where_they_are():
    centres, places = affine_places(50)
    found = fit_local_maps(OFFSETS, places)
    np.testing.assert_allclose(found.points_mm, centres, atol=1e-6)
    assert found.spread_mm.max() < 3


@pytest.mark.parametrize("wrong", [[0], [0, 3], [1, 2, 4]])
def test_outliers_lose_their_say(wrong):
    centres, places = affine_places(50)
    places += RNG.normal(0, 1.0, places.shape)
    places[:, wrong] += RNG.choice([-1, 1], (50, len(wrong), 3)) * RNG.uniform(40, 150, (50, len(wrong), 3))
    found = fit_local_maps(OFFSETS, places)
    assert np.linalg.norm(found.points_mm - centres, axis=1).max() < 6


def test_many_near_outliers_take_several_rounds():
    """Four of nine lie 8 to 15 mm off by one vector: after one round the map is still pulled their way."""
    rng = np.random.default_rng(0)
    centres, places = affine_places(300, 0.2)
    places += rng.normal(0, 0.5, places.shape)
    places[:, :4] += rng.choice([-1, 1], (300, 1, 3)) * rng.uniform(8, 15, (300, 1, 3))
    found = fit_local_maps(OFFSETS, places)
    assert np.linalg.norm(found.points_mm - centres, axis=1).mean() < 2.4


def test_scattered_neighbourhoods_have_a_large_spread():
    scattered = fit_local_maps(OFFSETS, RNG.uniform(-150, 150, (50, len(OFFSETS), 3)))
    assert np.median(scattered.spread_mm) > 30


def test_missing_neighbours_are_left_out():
    centres, places = affine_places(4)
    places[0, 2:4], places[1, 0], places[2, 1:], places[3] = np.nan, np.nan, np.nan, np.nan
    found = fit_local_maps(OFFSETS, places)
    np.testing.assert_allclose(found.points_mm[0], centres[0], atol=2)  # what is left of its neighbours has a side
    np.testing.assert_allclose(found.points_mm[1:3], centres[1:3], atol=1e-6)
    assert np.isnan(found.points_mm[3]).all() and np.isnan(found.spread_mm[3])


def spoilt(share: float):
    """Patient 1 with some fine and coarse vectors exchanged with those of other places, so that points are lost."""
    embedding = patient_embedding(1)
    generator = torch.Generator().manual_seed(0)
    fine = embedding.fine.flatten(1).clone()
    chosen = torch.randperm(fine.shape[1], generator=generator)[: int(share * fine.shape[1])]
    fine[:, chosen] = fine[:, chosen.roll(1)]
    return dataclasses.replace(embedding, fine=fine.view(embedding.fine.shape), name="patient1")


def test_lost_points_are_brought_back():
    query, key = patient_embedding(0), spoilt(0.6)
    points_mm = draw_points(query, MiningOptions(num_points=80, border_mm=24))
    truth_mm = to_patient(1, to_atlas(0, points_mm))
    own, agreed = match_points(query, key, points_mm), consensus(query, key, points_mm, 16.0)
    own_mm, agreed_mm = (np.linalg.norm(place - truth_mm, axis=1) for place in (own.points_mm, agreed.points_mm))
    assert np.mean(agreed_mm) < 0.7 * np.mean(own_mm)


def test_mining_with_consensus_moves_and_drops_rows(tmp_path):
    save_embedding(tmp_path, patient_embedding(0))
    save_embedding(tmp_path, spoilt(0.6))
    cache, names = EmbeddingCache(tmp_path), ["patient0", "patient1"]
    base = MiningOptions(num_points=40, num_partners=1, border_mm=24, consensus_mm=0)

    def mined(**changes) -> np.ndarray:
        return mine_case(cache, names, "patient0", ["patient1"], dataclasses.replace(base, **changes))

    def errors(rows: np.ndarray) -> np.ndarray:
        truth = to_patient(1, to_atlas(0, rows["query_mm"].astype(float)))
        return np.linalg.norm(truth - rows["key_mm"], axis=1)

    plain, agreed = mined(), mined(consensus_mm=16.0)
    spread = consensus(cache["patient0"], cache["patient1"], draw_points(cache["patient0"], base), 16.0).spread_mm
    strict = mined(consensus_mm=16.0, max_spread_mm=float(np.median(spread)))
    assert errors(agreed).mean() < errors(plain).mean()
    assert 0 < len(strict) < len(agreed) <= 40
    np.testing.assert_array_equal(strict, agreed[np.isin(agreed["query_mm"][:, 0], strict["query_mm"][:, 0])])
    inside = world_to_index(AFFINE, agreed["key_mm"])
    assert ((inside > -0.5) & (inside < np.array(SHAPE) - 0.5)).all()
    assert np.isfinite(agreed["cycle_mm"]).all() and np.isnan(plain["spread_mm"]).all()
    at = np.isin(draw_points(cache["patient0"], base).astype(np.float32)[:, 0], agreed["query_mm"][:, 0])
    np.testing.assert_allclose(agreed["spread_mm"], spread[at], rtol=1e-6)
    assert strict["spread_mm"].max() <= np.median(spread)


def test_rows_hold_the_score_of_the_place_that_they_hold(tmp_path):
    """The similarity of a point's own match says nothing about another place, where its neighbours put it."""
    save_embedding(tmp_path, patient_embedding(0))
    save_embedding(tmp_path, spoilt(0.6))
    cache = EmbeddingCache(tmp_path)
    query, key = cache["patient0"], cache["patient1"]
    options = MiningOptions(num_points=40, num_partners=1, border_mm=24, consensus_mm=16.0)
    rows = mine_case(cache, ["patient0", "patient1"], "patient0", ["patient1"], options)
    point_mm, place_mm = rows["query_mm"].astype(float), rows["key_mm"].astype(float)
    expected = []
    for point, place in zip(point_mm, place_mm):
        voxel = np.rint(world_to_index(key.fine_affine, place)).astype(int)
        expected.append(float(similarity_map(query, key, point)[tuple(voxel)]))
    np.testing.assert_allclose(rows["score"], expected, atol=2e-4)  # places are stored in single precision
    own = match_points(query, key, point_mm)
    moved = np.linalg.norm(own.points_mm - place_mm, axis=1) > 8  # to another voxel
    assert moved.sum() > 3 and np.median(own.score[moved] - rows["score"][moved]) > 0.1
    np.testing.assert_allclose(score_at(query, key, point_mm, own.points_mm), own.score, atol=1e-5)
    assert np.isnan(
        score_at(query, key, np.array([[1e4, 0, 0], point_mm[0]]), np.array([place_mm[0], [np.nan] * 3]))
    ).all()


@pytest.mark.parametrize(
    "wrong", [{"consensus_mm": -1.0}, {"max_spread_mm": 0.0}, {"consensus_mm": 0.0, "max_spread_mm": 10.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="--consensus_mm"):
        MiningOptions(**wrong)


def test_points_outside_have_no_consensus():
    query, key = patient_embedding(0), patient_embedding(1)
    points_mm = np.array([index_to_world(AFFINE, [17, 13, 17]), [1e4, 0, 0]])
    agreed = consensus(query, key, points_mm, 16.0)
    assert np.isfinite(agreed.points_mm[0]).all() and np.isnan(agreed.points_mm[1]).all()
    assert np.isnan(agreed.spread_mm[1])
