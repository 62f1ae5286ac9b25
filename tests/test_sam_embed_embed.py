"""Embedding whole volumes: slabs equal the whole, affines are right, fast copies agree, files come back."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.embed import embed_tensor, embed_volume, for_inference, output_affine
from sam_embed.embeddings.embedding_store import (
    Embedding,
    EmbeddingCache,
    embedded_cases,
    embedding_path,
    load_embedding,
    save_embedding,
    stored_header,
)
from sam_embed.network import AnatomicalEmbedder
from sam_embed.preprocess import prepare, scale_hu
from tests.golden_fill import fill_by_name
from tests.sam_fakes import compact_options

LAYOUTS = {
    "published": {"width": 8, "embed_dim": 16},
    "semantic": {"width": 8, "embed_dim": 16, "semantic": True},
    "compact": compact_options(width=8, embed_dim=16),
    "strided stem": {**compact_options(width=8, embed_dim=16), "stem_stride": (2, 2, 2)},
}


@pytest.mark.parametrize("depth", [33, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slabs_equal_the_whole(layout, depth):
    network = fill_by_name(AnatomicalEmbedder(**LAYOUTS[layout])).eval()
    volume = torch.randn(1, 1, depth, 13, 10, generator=torch.Generator().manual_seed(0)) * 30
    with torch.no_grad():
        whole = network(volume)
    for memory_mb in (0.01, 0.3, 1000):
        slabs = embed_tensor(network, volume, memory_mb)
        for expected, received in zip(whole, slabs, strict=True):
            assert received.dtype == torch.float16
            torch.testing.assert_close(received.float(), expected[0], atol=3e-4, rtol=0)  # half precision's own error


@pytest.mark.parametrize("memory_mb", [0, -1, float("nan"), float("inf")])
def test_memory_must_be_a_size(memory_mb):
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    with pytest.raises(ValueError, match=f"--memory_mb {memory_mb:g}: expected a size in MB"):
        embed_tensor(network, torch.zeros(1, 1, 16, 16, 16), memory_mb)


def test_whole_map_norms_are_not_cut():
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16, norm="instance")).eval()
    volume = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        fine = network(volume)[0][0]
    torch.testing.assert_close(embed_tensor(network, volume)[0].float(), fine, atol=3e-4, rtol=0)
    with pytest.raises(ValueError, match="--memory_mb"):
        embed_tensor(network, volume, memory_mb=1)
    with pytest.raises(ValueError, match="eval"):
        embed_tensor(network.train(), volume)


@pytest.mark.parametrize("precision, lowest_cosine", [("fp32", 0.99999), ("bf16", 0.999)])
def test_fast_copy_agrees(precision, lowest_cosine):
    network = AnatomicalEmbedder(**LAYOUTS["published"])
    volume = torch.randn(1, 1, 16, 32, 32) * 30
    network.train()
    with torch.no_grad():
        network(volume)  # gives the batch norms statistics that are not 0 and 1
    fast = for_inference(network.eval(), precision)
    expected = embed_tensor(network, volume)
    received = embed_tensor(fast, volume.to(next(fast.parameters()).dtype))
    for one, other in zip(expected, received):
        assert F.cosine_similarity(one.float(), other.float(), dim=0).mean() > lowest_cosine
    assert network.backbone.conv1.bn.weight is not None  # the original keeps its norms


def blob_volume(shift_vox=(0, 0, 0)) -> Volume:
    """A body with bright blobs; `shift_vox` moves everything by whole voxels of 3 mm."""
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 44, 48)), indexing="ij"), axis=-1) - np.asarray(shift_vox)
    hu = np.full(grid.shape[:3], -1024.0)
    hu[((grid - [20, 22, 24]) ** 2 / np.array([400, 150, 200])).sum(-1) < 1] = 40
    rng = np.random.default_rng(0)
    for centre in rng.uniform([8, 16, 16], [32, 28, 32], (12, 3)):
        hu += rng.uniform(-60, 200) * np.exp(-((grid - centre) ** 2).sum(-1) / 8) * (hu > -500)
    affine = np.array([[0, 0, -3.0, 70], [0, -3.0, 0, 66], [3.0, 0, 0, -1000], [0, 0, 0, 1]])
    return Volume(hu.astype(np.int16), affine, "blobs")


def test_preparation_crops_the_body_and_keeps_places():
    volume, info = blob_volume(), EmbedderInfo(spacing_mm=(4.0, 4.0, 4.0))
    tensor, affine, _ = prepare(volume, info)
    assert tensor.shape[:2] == (1, 1) and tensor.dtype == torch.float32
    assert tensor[0, 0].numel() < volume.array.size * 27 / 64 * 0.8
    brightest = np.unravel_index(volume.array.argmax(), volume.shape)
    found = np.unravel_index(tensor[0, 0].argmax().item(), tensor.shape[2:])
    distance_mm = index_to_world(affine, found) - index_to_world(volume.affine, brightest)
    assert np.abs(distance_mm).max() < 3


def test_intensities_are_those_of_the_published_checkpoint():
    scaled = scale_hu(torch.tensor([-3000.0, -1024.0, 40.0, 3071.0, 5000.0]), EmbedderInfo())
    torch.testing.assert_close(scaled, torch.tensor([-50.0, -50.0, 16.26, 205.0, 205.0]), atol=0.01, rtol=0)


@pytest.mark.parametrize("layout", ["published", "compact"])
def test_output_affine_tells_where_outputs_look(layout):
    """The gradient of a block of outputs with respect to the input is centred at the block's place by the affine."""
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**LAYOUTS[layout]).eval()
    for parameter in network.parameters():
        parameter.data.abs_()  # no cancellation: the receptive field shows as it is
    volume = torch.rand(1, 1, 48, 37, 38, requires_grad=True)
    block = (slice(6, 18), slice(8, 12), slice(7, 11))  # many slices: the pool takes either of two at random
    network.backbone.first_stage(volume)[0][(slice(None), *block)].sum().backward()
    middle = [(part.start + part.stop - 1) / 2 for part in block]
    place = output_affine(np.eye(4), network.fine_grid()) @ [*middle, 1]
    for axis in range(3):
        profile = volume.grad[0, 0].sum(dim=[other for other in range(3) if other != axis])
        centre = (profile * torch.arange(len(profile))).sum() / profile.sum()
        assert abs(centre.item() - place[axis]) < 0.15


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"name": "other"}, "it is the embedding of 'other'"),
        ({"fine": torch.full((4, 4, 4, 4), float("nan"))}, "fine holds values that are not finite"),
        ({"fine": torch.ones(4, 4, 4)}, "fine is torch.float32 of shape .*, expected floats"),
        ({"coarse": torch.ones(4, 2, 2, 2, dtype=torch.int32)}, "coarse is torch.int32"),
        ({"coarse": torch.ones(3, 2, 2, 2)}, "do not fit"),
        ({"body": torch.ones(4, 4, 3, dtype=torch.bool)}, "do not fit"),
        ({"fine_affine": np.zeros((4, 4))}, "places no voxels in the world"),
        ({"coarse_affine": np.eye(3)}, "places no voxels in the world"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, changed, message):
    maps = {"fine": torch.ones(4, 4, 4, 4), "coarse": torch.ones(4, 2, 2, 2)}
    good = Embedding("case", **maps, fine_affine=np.eye(4), coarse_affine=np.diag([2.0, 2, 2, 1]))
    save_embedding(tmp_path, good)
    assert load_embedding(tmp_path, "case").name == "case"
    path = save_embedding(tmp_path, dataclasses.replace(good, **changed))
    path.rename(embedding_path(tmp_path, "case"))
    with pytest.raises(ValueError, match=f"case.safetensors: .*{message}"):
        load_embedding(tmp_path, "case")


def test_files_come_back_and_damage_is_named(tmp_path):
    network = fill_by_name(AnatomicalEmbedder(**LAYOUTS["semantic"])).eval()
    info = EmbedderInfo(spacing_mm=(4.0, 4.0, 4.0), fingerprint="abc")
    embedding = embed_volume(network, blob_volume(), info, name="case_1")
    save_embedding(tmp_path, embedding)
    loaded = load_embedding(tmp_path, "case_1")
    assert embedding.body.shape == embedding.fine.shape[1:] and 0.2 < embedding.body.float().mean() < 0.9
    for field in ("fine", "coarse", "semantic", "body"):
        assert torch.equal(getattr(loaded, field), getattr(embedding, field))
    np.testing.assert_array_equal(loaded.fine_affine, embedding.fine_affine)
    np.testing.assert_array_equal(loaded.coarse_affine, embedding.coarse_affine)
    assert loaded.fingerprint == stored_header(tmp_path, "case_1")["fingerprint"] == "abc"
    assert loaded.fine_spacing_mm == pytest.approx((8, 8, 8)) and embedded_cases(tmp_path) == ["case_1"]
    path = embedding_path(tmp_path, "case_1")
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="case_1.safetensors: .*its checksum differs"):
        load_embedding(tmp_path, "case_1")
    path.write_bytes(path.read_bytes()[:100])
    assert stored_header(tmp_path, "case_1") == {}
    for name in ("case_1", "absent"):
        with pytest.raises(ValueError, match=name):
            load_embedding(tmp_path, name)


def test_cache_keeps_the_last_used(tmp_path):
    network, info = AnatomicalEmbedder(**LAYOUTS["compact"]).eval(), EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0))
    for name in "abc":
        save_embedding(tmp_path, embed_volume(network, blob_volume(), info, name=name))
    one_mb = load_embedding(tmp_path, "a").num_bytes / 2**20
    cache = EmbeddingCache(tmp_path, limit_mb=2.5 * one_mb)
    first = cache["a"]
    assert cache["b"].name == "b" and cache["a"] is first
    assert cache["c"].name == "c"  # pushes out b, which was used before a
    assert cache["a"] is first and list(cache._kept) == ["c", "a"]


def test_the_input_keeps_a_margin_of_air_around_the_body():
    """Skin is seen against air, as in training."""
    hu = np.full((20, 40, 40), -1000, np.int16)
    hu[5:15, 10:30, 12:28] = 40
    info = EmbedderInfo(spacing_mm=(4.0, 3.0, 2.0))
    affine = np.array([[0, 0, -2.0, 0], [0, -3.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]])
    tensor, placed, body = prepare(Volume(hu, affine, "ct"), info)
    assert tensor.shape[2:] == body.shape == (10 + 2 * 2, 20 + 2 * 3, 16 + 2 * 4)  # at least 8 mm on every side
    assert body[2:-2, 3:-3, 4:-4].all() and body.sum() == 10 * 20 * 16
    np.testing.assert_allclose(index_to_world(placed, [0, 0, 0]), index_to_world(affine, [3, 7, 8]))
