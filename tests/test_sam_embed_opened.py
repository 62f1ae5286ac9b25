"""Embeddings that can be read at single places: the same vectors as whole ones, refusals, coordinates of the body."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sam_embed.embeddings.body_coordinates import BodyCoordinates
from sam_embed.embeddings.compact import FP16, Storage
from sam_embed.embeddings.embedding_store import (
    EmbedDirError,
    embedded_cases,
    embedding_path,
    load_embedding,
    save_embedding,
)
from sam_embed.embeddings.opened import (
    OpenedVectors,
    check_embeddings,
    num_channels,
    open_embeddings,
    opened_path,
)
from sam_embed.matching.match import query_vectors, score_at
from sam_embed.matching.mine import lies_in_body
from tests.sam_fakes import AFFINE, SHAPE, patient_embedding, patient_landmarks, to_atlas

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [f"patient{seed}" for seed in range(4)]


@pytest.fixture(scope="module")
def embed_dir(tmp_path_factory):
    """Four patients in the compact form, opened."""
    folder = tmp_path_factory.mktemp("embeddings")
    for seed in range(len(NAMES)):
        save_embedding(folder, patient_embedding(seed), Storage("pca", 0.05, 1e9))
    open_embeddings(folder, NAMES)
    return folder


def places(num: int, seed: int = 0) -> np.ndarray:
    """World points in and around the embedded box."""
    index = np.random.default_rng(seed).uniform(-3, np.array(SHAPE) + 2, size=(num, 3))
    return index @ AFFINE[:3, :3].T + AFFINE[:3, 3]


def test_vectors_are_those_of_the_whole_embedding(embed_dir):
    reader, embedding, points = OpenedVectors(embed_dir, NAMES), load_embedding(embed_dir, NAMES[1]), places(400)
    points = points[reader[NAMES[1]].inside(points)]
    expected = query_vectors(embedding, points)
    joined = torch.cat([expected.fine, expected.coarse], dim=1).numpy() / np.sqrt(2)
    found = reader[NAMES[1]].vectors(points)
    assert (
        found.dtype == np.float32 and found.shape == (len(points), num_channels(embed_dir, NAMES)) and len(points) > 50
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * joined).sum(axis=1).min() > 0.9998


def test_their_product_is_the_score_of_a_match(embed_dir):
    reader = OpenedVectors(embed_dir, NAMES)
    query, key = (load_embedding(embed_dir, name) for name in NAMES[:2])
    points = np.array(list(patient_landmarks(0).values()))
    voxels = AFFINE[:3, :3] @ np.array([[12, 9, 20], [15, 14, 11], [20, 12, 16], [17, 15, 15], [9, 10, 17]]).T
    keys = voxels.T + AFFINE[:3, 3]
    product = (reader[NAMES[0]].vectors(points) * reader[NAMES[1]].vectors(keys)).sum(axis=1)
    np.testing.assert_allclose(product, score_at(query, key, points, keys), atol=5e-3)


def test_inside_is_the_body(embed_dir):
    reader, points = OpenedVectors(embed_dir, NAMES), places(2000, seed=1)
    inside = reader[NAMES[2]].inside(points)
    np.testing.assert_array_equal(inside, lies_in_body(load_embedding(embed_dir, NAMES[2]), points))
    assert 0.1 < inside.mean() < 0.9


def test_an_embedding_without_a_body_and_one_in_half_precision_are_read_too(tmp_path):
    save_embedding(tmp_path, dataclasses.replace(patient_embedding(0), body=None), FP16)
    open_embeddings(tmp_path, ["patient0"])
    assert num_channels(tmp_path, ["none", "patient0"]) == 18 + 18
    reader, points = OpenedVectors(tmp_path, ["patient0"]), places(500)
    index = (points - AFFINE[:3, 3]) @ np.linalg.inv(AFFINE[:3, :3]).T
    within = ((np.rint(index) >= 0) & (np.rint(index) < SHAPE)).all(axis=1)
    np.testing.assert_array_equal(reader["patient0"].inside(points), within)
    np.testing.assert_allclose(np.linalg.norm(reader["patient0"].vectors(points[within]), axis=1), 1, atol=1e-5)


def test_opened_files_are_no_embeddings_and_are_made_once(embed_dir):
    assert embedded_cases(embed_dir) == NAMES
    before = opened_path(embed_dir, NAMES[0]).stat().st_mtime_ns
    open_embeddings(embed_dir, NAMES)
    assert opened_path(embed_dir, NAMES[0]).stat().st_mtime_ns == before


def test_a_changed_embedding_is_opened_anew(tmp_path):
    save_embedding(tmp_path, patient_embedding(0))
    open_embeddings(tmp_path, ["patient0"])
    before = OpenedVectors(tmp_path, ["patient0"])["patient0"].vectors(places(5))
    save_embedding(tmp_path, dataclasses.replace(patient_embedding(1), name="patient0"))
    stat = embedding_path(tmp_path, "patient0").stat()
    os.utime(embedding_path(tmp_path, "patient0"), ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    open_embeddings(tmp_path, ["patient0"])
    assert not np.allclose(before, OpenedVectors(tmp_path, ["patient0"])["patient0"].vectors(places(5)), atol=1e-3)


def test_no_file_stays_open_and_no_memory_is_kept(embed_dir):
    reader = OpenedVectors(embed_dir, NAMES)
    for name in NAMES * 3:
        reader[name].vectors(places(50))

    own = Path("/proc/self")
    if not own.is_dir():
        pytest.skip("no /proc here")
    assert str(embed_dir) not in (own / "maps").read_text()
    assert not any(str(embed_dir) in os.path.realpath(link) for link in (own / "fd").iterdir())


def test_missing_mixed_and_strange_embeddings_are_refused_by_name(tmp_path):
    with pytest.raises(EmbedDirError, match="--embed_dir .* holds no embedding of these 4 cases"):
        num_channels(tmp_path, NAMES)
    for seed in range(2):
        save_embedding(tmp_path, dataclasses.replace(patient_embedding(seed), source=f"store:{seed}:0:DIGEST{seed}"))
    identities = {f"patient{seed}": f"store:other:1:DIGEST{seed}" for seed in range(2)}
    assert check_embeddings(tmp_path, identities) == "atlas", "the same files, stored at another spacing"
    assert check_embeddings(tmp_path, dict.fromkeys(identities, "store:9:9")) == "atlas", "an older store says no file"
    with pytest.raises(EmbedDirError, match="1 of 3 cases have no embedding, first patient7.*--embed_dir"):
        check_embeddings(tmp_path, identities | {"patient7": ""})
    with pytest.raises(EmbedDirError, match="1 of 2 cases were embedded from other files.*--store_dir, first patient1"):
        check_embeddings(tmp_path, identities | {"patient1": "store:other:1:ANOTHER"})
    save_embedding(tmp_path, dataclasses.replace(patient_embedding(1), fingerprint="another"))
    with pytest.raises(EmbedDirError, match="different weights.*another: patient1"):
        check_embeddings(tmp_path, identities)


def test_body_coordinates_are_whitened_and_the_same_in_all_patients(embed_dir):
    reader = OpenedVectors(embed_dir, NAMES)
    coordinates = BodyCoordinates(reader, NAMES[:3], 3)
    rng = np.random.default_rng(5)
    drawn = {name: reader[name].random_places(2000, rng) for name in NAMES}
    assert all(coordinates[name].inside(points).all() for name, points in drawn.items())
    values = np.concatenate([coordinates[name].vectors(drawn[name]) for name in NAMES[:3]])
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(np.cov(values.T), np.eye(3), atol=0.15)
    # What was fitted to three patients says where a place of a fourth is: fit atlas mm to it there.
    basis = {name: np.c_[coordinates[name].vectors(drawn[name]), np.ones(2000)] for name in NAMES}
    atlas = {name: to_atlas(seed, drawn[name]) for seed, name in enumerate(NAMES)}
    fitted = np.linalg.lstsq(basis[NAMES[0]], atlas[NAMES[0]], rcond=None)[0]
    explained = 1 - (atlas[NAMES[3]] - basis[NAMES[3]] @ fitted).var() / atlas[NAMES[3]].var()
    assert explained > 0.5


def test_body_coordinates_are_deterministic(embed_dir):
    one, other = (BodyCoordinates(OpenedVectors(embed_dir, NAMES), NAMES, 3) for _ in range(2))
    points = OpenedVectors(embed_dir, NAMES)[NAMES[0]].random_places(10, np.random.default_rng(0))
    np.testing.assert_array_equal(one[NAMES[0]].vectors(points), other[NAMES[0]].vectors(points))
    assert one.digest() == other.digest()
    fewer = BodyCoordinates(OpenedVectors(embed_dir, NAMES), NAMES[:1], 3)
    assert fewer.digest() != one.digest()
