"""Matching: published numbers, equality with the obvious computation, known shifts, memory chunks, points outside."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.ct.geometry import index_to_world
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching import search
from sam_embed.matching.match import best_voxels, cycle_error_mm, match_points, query_vectors, similarity_map
from sam_embed.matching.mine import MiningOptions, draw_points
from tests.golden_fill import golden_arrays, known
from tests.published_matching import published_match, published_similarity
from tests.sam_fakes import patient_embedding

FINE_AFFINE = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 20], [4.0, 0, 0, -300], [0, 0, 0, 1]])


def random_embedding(seed: int, shape=(9, 12, 10), semantic: bool = False) -> Embedding:
    """Random unit vectors; the coarse grid has twice the fine stride and starts half a fine voxel later."""
    generator = torch.Generator().manual_seed(seed)
    coarse_shape = [(size + 1) // 2 for size in shape]
    coarse_affine = FINE_AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse_affine[:3, 3] = index_to_world(FINE_AFFINE, [0.5, 0.5, 0.5])

    def unit(*size):
        return F.normalize(torch.randn(16, *size, generator=generator), dim=0).half()

    return Embedding(
        name=f"case{seed}",
        fine=unit(*shape),
        coarse=unit(*coarse_shape),
        fine_affine=FINE_AFFINE,
        coarse_affine=coarse_affine,
        semantic=unit(*shape) if semantic else None,
    )


@pytest.mark.parametrize("same_volume", [False, True])
def test_published_matching_is_reproduced(same_volume):
    golden = golden_arrays("golden_match.npz")
    query = tuple(torch.from_numpy(golden[f"q_{level}"]) for level in ("fine", "coarse"))
    key = query if same_volume else tuple(torch.from_numpy(golden[f"k_{level}"]) for level in ("fine", "coarse"))
    side = "q" if same_volume else "k"
    shape_xyz = golden[f"{side}_imshape"][[2, 1, 3]]  # (1, Y, X, Z)
    found, score = published_match(query, key, golden["points"], golden["q_ratio"], golden[f"{side}_ratio"], shape_xyz)
    np.testing.assert_allclose(score, golden["score_self" if same_volume else "score"], atol=1e-5)
    if same_volume:
        np.testing.assert_array_equal(found, golden["xyz_self"])
        return
    similarity = published_similarity(query, key, golden["points"], golden["q_ratio"])
    np.testing.assert_allclose(*known(similarity, golden["sim"]), atol=1e-5)
    zyx = np.stack(np.unravel_index(similarity.argmax(dim=1).numpy(), key[0].shape[2:]), axis=1)
    np.testing.assert_array_equal(zyx, golden["zyx_argmax"])
    np.testing.assert_array_equal(found, np.clip(np.trunc(golden["xyz_unclipped_float"]), 0, shape_xyz - 1))
    np.testing.assert_array_equal(found[2:], golden["xyz"][2:])  # rows where the published clipping does no harm


def obvious_similarity(query: Embedding, key: Embedding, point_mm: np.ndarray) -> torch.Tensor:
    """The definition: interpolate the coarse map with all channels to every fine voxel, normalise, take the cosines."""
    vectors = query_vectors(query, point_mm[None])
    fine_index = np.stack(np.meshgrid(*map(np.arange, key.fine.shape[1:]), indexing="ij"), axis=-1).reshape(-1, 3)
    coarse = query_vectors(key, index_to_world(key.fine_affine, fine_index)).coarse  # [d * h * w, C]
    cosines = [vectors.fine[0] @ key.fine.float().flatten(1), coarse @ vectors.coarse[0]]
    if key.semantic is not None:
        cosines.append(vectors.semantic[0] @ key.semantic.float().flatten(1))
    return (sum(cosines) / len(cosines)).view(key.fine.shape[1:])


@pytest.mark.parametrize("semantic", [False, True])
def test_fast_similarity_equals_the_definition(semantic):
    query, key = random_embedding(0, semantic=semantic), random_embedding(1, shape=(7, 8, 11), semantic=semantic)
    for index in ([3.3, 4.8, 2.1], [0.0, 0.0, 0.0], [8.0, 11.0, 9.0]):
        point_mm = index_to_world(query.fine_affine, index)
        torch.testing.assert_close(
            similarity_map(query, key, point_mm), obvious_similarity(query, key, point_mm), atol=2e-6, rtol=0
        )


def test_chunks_change_nothing():
    query, key = random_embedding(0), random_embedding(1)
    vectors = query_vectors(query, index_to_world(FINE_AFFINE, np.random.default_rng(0).uniform(1, 7, (20, 3))))
    whole_index, whole_score = best_voxels(vectors, key, memory_mb=100, by_tiles=False)
    slab_index, slab_score = best_voxels(vectors, key, memory_mb=0.001, by_tiles=False)
    assert torch.equal(whole_index, slab_index)
    torch.testing.assert_close(whole_score, slab_score)


def patients(semantic: bool) -> tuple[Embedding, Embedding]:
    """Two patients whose coarse map tells where in the body a voxel lies, as a trained one does."""
    query, key = patient_embedding(0), patient_embedding(1)
    if semantic:
        query, key = (dataclasses.replace(one, semantic=one.fine.roll(2, dims=0)) for one in (query, key))
    return query, key


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("tile_vox", [40, 700])
def test_what_the_coarse_map_rules_out_is_not_looked_at_and_changes_nothing(tile_vox, semantic, monkeypatch):
    monkeypatch.setattr(search, "TILE_VOX", tile_vox)
    looked_at = []
    visit = search._TileSearch.visit
    monkeypatch.setattr(search._TileSearch, "visit", lambda *given: looked_at.append(len(given[2])) or visit(*given))
    query, key = patients(semantic)
    vectors = query_vectors(query, draw_points(query, MiningOptions(num_points=60)))
    all_index, all_score = best_voxels(vectors, key, by_tiles=False)
    tile_index, tile_score = best_voxels(vectors, key, by_tiles=True)
    num_tiles = np.prod([len(axis) for axis in search.grid_of(key).runs])
    assert num_tiles > 20 and 0 < sum(looked_at) < 0.4 * 60 * num_tiles
    assert torch.equal(all_index, tile_index)
    torch.testing.assert_close(all_score, tile_score, atol=1e-6, rtol=0)


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("worthwhile", [0.0, 2.0])  # 2: tiles whatever they cost
def test_searching_tiles_of_an_untrained_embedding_finds_the_same(worthwhile, semantic, monkeypatch):
    monkeypatch.setattr(search, "TILE_VOX", 30)
    monkeypatch.setattr(search, "WORTHWHILE", worthwhile)
    for shape in ((7, 8, 11), (1, 5, 2), (3, 1, 1)):  # the last two: axes with a single coarse voxel
        query, key = random_embedding(0, semantic=semantic), random_embedding(1, shape=shape, semantic=semantic)
        vectors = query_vectors(query, index_to_world(FINE_AFFINE, np.random.default_rng(0).uniform(1, 7, (20, 3))))
        all_index, all_score = best_voxels(vectors, key, by_tiles=False)
        tile_index, tile_score = best_voxels(vectors, key, by_tiles=True)
        assert torch.equal(all_index, tile_index)
        torch.testing.assert_close(all_score, tile_score, atol=1e-6, rtol=0)


def test_many_queries_are_searched_by_tiles_whatever_is_in_question(monkeypatch):
    """Everything is in question in an untrained embedding; few queries then look at all in one go."""
    query, key = random_embedding(0), random_embedding(1, shape=(7, 8, 11))
    vectors = query_vectors(query, index_to_world(FINE_AFFINE, np.random.default_rng(0).uniform(1, 7, (20, 3))))
    expected = search.search_all(vectors, key, 64)
    monkeypatch.setattr(search, "WORTHWHILE", 0.0)
    monkeypatch.setattr(search, "search_all", lambda *given: "all in one go")
    assert search.search_where_possible(vectors, key, 64) == "all in one go"
    monkeypatch.setattr(search, "MANY", 20)
    where, score = search.search_where_possible(vectors, key, 64)
    assert torch.equal(where, expected[0])
    torch.testing.assert_close(score, expected[1], atol=1e-6, rtol=0)


def test_interpolated_length_is_that_of_the_interpolated_vectors():
    key = random_embedding(1, shape=(7, 8, 11))
    grid = search.grid_of(key)
    direct = torch.linalg.vector_norm(grid.on_fine(key.coarse.float(), 0, 7), dim=0)
    torch.testing.assert_close(grid.length, direct, atol=1e-5, rtol=0)
    assert search.grid_of(key) is grid


def test_a_moved_volume_is_matched_to_where_it_went():
    query = random_embedding(0)
    moved = np.eye(4)
    moved[:3, 3] = [5.0, -7.0, 11.0]
    key = Embedding("moved", query.fine, query.coarse, moved @ query.fine_affine, moved @ query.coarse_affine)
    points_mm = index_to_world(FINE_AFFINE, [[2, 3, 4], [5, 5, 5], [0, 11, 9]])
    matches = match_points(query, key, points_mm, refine=False)
    np.testing.assert_allclose(matches.points_mm, points_mm + [5.0, -7.0, 11.0], atol=1e-9)
    np.testing.assert_allclose(matches.score, 1.0, atol=2e-3)
    np.testing.assert_allclose(cycle_error_mm(query, key, points_mm, matches, refine=False), 0, atol=1e-9)


def test_points_outside_have_no_match():
    query, key = random_embedding(0), random_embedding(1)
    points_mm = np.array([index_to_world(FINE_AFFINE, [4, 4, 4]), [1e4, 0, 0], [np.nan] * 3])
    matches = match_points(query, key, points_mm)
    cycle = cycle_error_mm(query, key, points_mm, matches)
    assert np.isfinite(matches.points_mm[0]).all() and np.isfinite(cycle[0])
    assert np.isnan(matches.points_mm[1:]).all() and np.isnan(matches.score[1:]).all() and np.isnan(cycle[1:]).all()


def smooth_embedding(shift_vox: float) -> Embedding:
    """An embedding that varies smoothly in space, seen on a grid shifted by a fraction of a voxel along W."""
    axes = [np.arange(14.0), np.arange(14.0), np.arange(14.0) + shift_vox]
    place = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij")))  # [3, 14, 14, 14]
    frequencies = torch.tensor([0.2, 0.37, 0.61], dtype=torch.float64)
    waves = (place[:, None] * frequencies[:, None, None, None]).flatten(0, 1)
    fine = F.normalize(torch.cat([waves.sin(), waves.cos()]), dim=0).half()
    affine = np.eye(4)
    affine[:3, 3] = [0, 0, shift_vox]
    return Embedding("smooth", fine, fine[:, ::2, ::2, ::2], affine, affine @ np.diag([2.0, 2, 2, 1]))


def test_refinement_finds_places_between_voxels():
    query, key = smooth_embedding(0.0), smooth_embedding(0.4)
    points_mm = np.random.default_rng(1).integers(3, 11, (30, 3)).astype(float)
    rough = match_points(query, key, points_mm, refine=False).points_mm
    fine = match_points(query, key, points_mm, refine=True).points_mm
    assert np.abs(rough - points_mm).max() > 0.35
    assert np.linalg.norm(fine - points_mm, axis=1).mean() < 0.3 * np.linalg.norm(rough - points_mm, axis=1).mean()


def test_embeddings_of_different_weights_are_not_compared():
    query = random_embedding(0)
    other = Embedding("b", query.fine, query.coarse, FINE_AFFINE, query.coarse_affine, fingerprint="other")
    with pytest.raises(ValueError, match="different weights"):
        match_points(query, other, np.zeros((1, 3)))


def test_of_equally_similar_voxels_the_first_is_taken_by_every_search(monkeypatch):
    monkeypatch.setattr(search, "WORTHWHILE", 2.0)  # tiles, however little they save
    monkeypatch.setattr(search, "TILE_VOX", 200)
    fine = torch.zeros(2, 16, 16, 32, dtype=torch.float16)
    fine[1] = 1
    first = (0, 3, 20)  # in a later tile than the next one, but before it
    for place in (first, (5, 1, 1), (9, 9, 9)):
        fine[:, place[0], place[1], place[2]] = torch.tensor([1.0, 0.0])
    coarse = torch.zeros(2, 8, 8, 16, dtype=torch.float16)
    coarse[0] = 1
    key = Embedding("key", fine, coarse, FINE_AFFINE, FINE_AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0]))
    vectors = search.QueryVectors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), None)
    for find in (search.search_all, search.search_where_possible):
        where, score = find(vectors, key, 64)
        assert np.unravel_index(int(where), (16, 16, 32)) == first and float(score) == 1.0
