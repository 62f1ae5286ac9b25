"""Mining: right matches, spread points, the same table whoever mines, resumed runs, complaints."""

import dataclasses

import numpy as np
import pytest
import torch

from datasets.correspondences import CorrespondenceTable
from datasets.geometry import index_to_world, world_to_index
from sam_embed.embedding_store import EmbeddingCache, embedding_path, load_embedding, save_embedding
from sam_embed.mine import (
    SHARD_FOLDER,
    MiningOptions,
    draw_partners,
    draw_points,
    lies_in_body,
    mine_case,
    mine_corpus,
)
from scripts import mine_pairs
from tests.sam_fakes import AFFINE, patient_embedding, to_atlas

OPTIONS = MiningOptions(num_points=12, num_partners=2, seed=3)


@pytest.fixture(scope="module")
def embed_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    for seed in range(4):
        save_embedding(folder, patient_embedding(seed))
    return folder


NAMES = [f"patient{seed}" for seed in range(4)]


def test_rows_are_right_matches(embed_dir, tmp_path):
    table = mine_corpus(embed_dir, NAMES, tmp_path, OPTIONS, {"commit": "abc"})
    assert len(table) == 4 * 12 * 2 and table.case_names == NAMES
    assert table.provenance["seed"] == 3 and table.provenance["commit"] == "abc"
    errors = []
    for row in table.rows:
        query_place = to_atlas(int(row["query_case"]), row["query_mm"].astype(float))
        key_place = to_atlas(int(row["key_case"]), row["key_mm"].astype(float))
        errors.append(np.linalg.norm(query_place - key_place))
    assert np.median(errors) < 3 and max(errors) < 10  # the fakes' grid is 8 mm
    assert (table.rows["query_case"] != table.rows["key_case"]).all()
    assert np.median(table.rows["cycle_mm"]) < 5 and table.rows["score"].min() > 0.95
    assert not list((tmp_path / SHARD_FOLDER).iterdir())


def test_points_are_spread_inside_and_off_the_border():
    embedding = patient_embedding(0)
    points = draw_points(embedding, MiningOptions(num_points=60, border_mm=16))
    index = np.rint(world_to_index(AFFINE, points)).astype(int)
    assert embedding.body.numpy()[tuple(index.T)].all()
    air = np.argwhere(~embedding.body.numpy())
    assert min(np.linalg.norm((air - place) * 8, axis=1).min() for place in index) >= 8
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([1e9] * len(points))
    plain = draw_points(embedding, MiningOptions(num_points=60, border_mm=16, seed=9))
    assert np.median(distances.min(axis=1)) > 15 and not np.array_equal(points, plain)
    np.testing.assert_array_equal(points, draw_points(embedding, MiningOptions(num_points=60, border_mm=16)))


def test_thin_slabs_still_get_points():
    embedding = patient_embedding(0)
    assert np.isfinite(draw_points(embedding, MiningOptions(num_points=5, border_mm=500))).all()


def test_partners_do_not_depend_on_the_order():
    options = MiningOptions(num_partners=2)
    assert draw_partners(NAMES, "patient1", options) == draw_partners(NAMES[::-1], "patient1", options)
    assert "patient1" not in draw_partners(NAMES, "patient1", options)
    assert draw_partners(NAMES, "patient1", MiningOptions(num_partners=99)) == ["patient0", "patient2", "patient3"]


def test_ranks_and_resumed_runs_give_the_same_table(embed_dir, tmp_path, monkeypatch):
    whole = mine_corpus(embed_dir, NAMES, tmp_path / "whole", OPTIONS)
    assert mine_corpus(embed_dir, NAMES, tmp_path / "shared", OPTIONS, rank=1, world_size=2) is None
    mined = []
    monkeypatch.setattr("sam_embed.mine.mine_case", lambda *args: mined.append(args[2]) or mine_case(*args))
    shared = mine_corpus(embed_dir, NAMES, tmp_path / "shared", OPTIONS, rank=0, world_size=2)
    assert mined == ["patient0", "patient2"]  # what the other process has done is not done again
    np.testing.assert_array_equal(whole.rows, shared.rows)
    mined.clear()
    other_seed = MiningOptions(num_points=12, num_partners=2, seed=4)
    mine_corpus(embed_dir, NAMES, tmp_path / "other", other_seed, rank=1, world_size=2)
    mine_corpus(embed_dir, NAMES, tmp_path / "other", OPTIONS)
    assert len(mined) == 2 + 4  # rows of another seed are not reused


def test_score_floor_drops_rows(embed_dir, tmp_path):
    cache = EmbeddingCache(embed_dir)
    rows = mine_case(cache, NAMES, "patient0", OPTIONS)
    floor = float(np.median(rows["score"]))
    kept = mine_case(cache, NAMES, "patient0", MiningOptions(num_points=12, num_partners=2, seed=3, min_score=floor))
    np.testing.assert_array_equal(kept, rows[rows["score"] >= floor])
    assert 0 < len(kept) < len(rows)


def test_command_writes_the_table(embed_dir, tmp_path, capsys):
    mine_pairs.main(["--embed_dir", str(embed_dir), "--output_dir", str(tmp_path), "--num_points", "5"])
    table = CorrespondenceTable.load(tmp_path)
    assert len(table) == 4 * 5 * 3 and '"num_rows": 60' in capsys.readouterr().out
    assert table.provenance["spacing_mm"] == [8.0, 8.0, 8.0] and (tmp_path / "mine_run.json").exists()


def test_what_cannot_be_mined_is_named(embed_dir, tmp_path):
    with pytest.raises(ValueError, match="absent"):
        mine_corpus(embed_dir, [*NAMES, "absent"], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="at least 2"):
        mine_corpus(embed_dir, NAMES[:1], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="--num_points"):
        MiningOptions(num_points=0)
    stranger = patient_embedding(9)
    torch.manual_seed(0)
    object.__setattr__(stranger, "fingerprint", "other")
    save_embedding(embed_dir, stranger)
    with pytest.raises(ValueError, match="different weights"):
        mine_corpus(embed_dir, [*NAMES, "patient9"], tmp_path, OPTIONS)
    assert load_embedding(embed_dir, "patient9").fingerprint == "other"
    embedding_path(embed_dir, "patient9").unlink()


def test_matches_in_air_are_dropped():
    embedding = patient_embedding(0)
    body = torch.zeros(embedding.fine.shape[1:], dtype=torch.bool)
    body[2, 3, 1] = True
    embedding = dataclasses.replace(embedding, body=body)
    index = np.array([[2, 3, 1], [2.4, 3.4, 0.6], [2.6, 3, 1], [0, 0, 0], [-9, 3, 1]], dtype=float)
    points_mm = np.concatenate([index_to_world(embedding.fine_affine, index), np.full((1, 3), np.nan)])
    assert lies_in_body(embedding, points_mm).tolist() == [True, True, False, False, False, False]
