"""Embeddings in little room: every form comes back as promised, small enough, and matches stay where they were."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import embedding_storage
from benchmarks.results import HEADER
from datasets.ct.nifti import CTReadError, write_nifti
from datasets.store.format import StoreError
from sam_embed.case_source import CaseSource
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings import compact_codes
from sam_embed.embeddings.compact import FP16, Storage, pack, unpack
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embedding_store import (
    Embedding,
    embedding_path,
    load_embedding,
    save_embedding,
    stored_form,
    stored_header,
)
from sam_embed.matching.match import match_points
from sam_embed.network import AnatomicalEmbedder
from tests.sam_fakes import (
    AFFINE,
    ATLAS_LANDMARKS_MM,
    compact_options,
    patient_embedding,
    patient_landmarks,
    patient_volume,
    save_embedder,
)

pytestmark = pytest.mark.usefixtures("one_thread")
COMPACT = {"pca": Storage("pca", pca_step=0.1, max_bytes=1e9), "fine steps": Storage("pca", 0.05, 1e9)}
LOWEST_COSINE = {"pca": 0.985, "fine steps": 0.995}


def smooth_units(num_channels: int, shape: tuple, seed: int) -> torch.Tensor:
    """float16 unit vectors [C, d, h, w] that change slowly, weaker along later channels before a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, num_channels, *[size // 3 + 2 for size in shape], generator=generator)
    values = F.interpolate(values, size=shape, mode="trilinear")[0] * torch.linspace(1, 0.2, num_channels).view(
        -1, 1, 1, 1
    )
    rotation, _ = torch.linalg.qr(torch.randn(num_channels, num_channels, generator=generator))
    return F.normalize(torch.einsum("ab,bdhw->adhw", rotation, values), dim=0).half()


@pytest.fixture(scope="module")
def embedding() -> Embedding:
    """24 channels with a semantic map, fine voxels partly in air."""
    shape = (15, 17, 21)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    return Embedding(
        name="case_1",
        fine=smooth_units(24, shape, 0),
        coarse=smooth_units(24, (4, 5, 6), 1),
        fine_affine=AFFINE,
        coarse_affine=AFFINE @ np.diag([4.0, 4.0, 4.0, 1.0]),
        semantic=smooth_units(24, shape, 2),
        body=torch.from_numpy((grid**2).sum(axis=0) < 0.9),
        fingerprint="abc",
    )


@pytest.mark.parametrize("form", COMPACT)
def test_forms_come_back_as_unit_vectors_near_the_originals(form, embedding, tmp_path):
    save_embedding(tmp_path, embedding, COMPACT[form])
    loaded = load_embedding(tmp_path, "case_1")
    assert stored_form(tmp_path, "case_1") == "pca" and stored_header(tmp_path, "case_1")["fingerprint"] == "abc"
    assert torch.equal(loaded.body, embedding.body) and loaded.name == "case_1" and loaded.fingerprint == "abc"
    np.testing.assert_array_equal(loaded.fine_affine, embedding.fine_affine)
    np.testing.assert_array_equal(loaded.coarse_affine, embedding.coarse_affine)
    for name in ("fine", "coarse", "semantic"):
        expected, received = getattr(embedding, name).float(), getattr(loaded, name).float()
        assert getattr(loaded, name).dtype == torch.float16 and received.shape == expected.shape
        stored = torch.ones(received.shape[1:], dtype=torch.bool) if name == "coarse" else embedding.body
        length = torch.linalg.vector_norm(received, dim=0)
        torch.testing.assert_close(length, stored.float(), atol=2e-3, rtol=0)  # one in the body, zero outside
        assert (expected * received).sum(dim=0)[stored].mean() > (0.99 if name == "coarse" else LOWEST_COSINE[form])


def test_fp16_files_are_as_they_always_were(embedding, tmp_path):
    save_embedding(tmp_path, embedding, FP16)
    with safe_open(embedding_path(tmp_path, "case_1"), framework="pt") as stored:
        assert stored.metadata()["format"] == "sam_embed.embedding.1"
        assert set(stored.keys()) == {"fine", "coarse", "semantic", "body"}
    loaded = load_embedding(tmp_path, "case_1")
    assert torch.equal(loaded.fine, embedding.fine) and stored_form(tmp_path, "case_1") == "fp16"


@pytest.mark.parametrize("body", [None, torch.zeros(15, 17, 21, dtype=torch.bool)], ids=["unknown", "empty"])
@pytest.mark.parametrize("form", COMPACT)
def test_without_a_body_every_voxel_is_stored(form, body, embedding, tmp_path):
    save_embedding(tmp_path, dataclasses.replace(embedding, body=body, semantic=None), COMPACT[form])
    loaded = load_embedding(tmp_path, "case_1")
    assert loaded.semantic is None and (loaded.body is None) == (body is None)
    assert (loaded.fine.float() * embedding.fine.float()).sum(dim=0).mean() > LOWEST_COSINE[form]


def test_rounding_shifts_scores_by_what_the_step_says():
    """Where all axes are in use, the error of a dot product has a standard deviation of step / sqrt(12)."""
    values = F.normalize(torch.randn(16, 20, 20, 20, generator=torch.Generator().manual_seed(0)), dim=0)
    voxels = compact_codes.Voxels(values)
    for step in (0.05, 0.2):
        parts = compact_codes.encode_pca(voxels, step, max_bytes=1e9)
        decoded = compact_codes.decoder_of_pca(parts, 16, len(voxels))(0, len(voxels))
        query = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), dim=1)
        error = query @ decoded - query @ values.flatten(1)
        assert error.std().item() == pytest.approx(step / 12**0.5, rel=0.1)
        assert abs(error.mean().item()) < step / 50


def test_vectors_that_cannot_be_small_stay_below_the_limit(embedding):
    """Random vectors, alike along all axes, are the worst there is."""
    fine = F.normalize(torch.randn(64, 24, 25, 25, generator=torch.Generator().manual_seed(0)), dim=0).half()
    maps = {"fine": fine, "coarse": embedding.coarse}
    sizes = {}
    for max_bytes in (8.0, 12.0, 1e9):
        parts, _ = pack(maps, Storage("pca", pca_step=0.1, max_bytes=max_bytes))
        sizes[max_bytes] = (parts["fine.codes"].numel() + parts["fine.pairs"].numel()) / fine[0].numel()
    assert sizes[8.0] < 8.3 and 9 < sizes[12.0] < 12.4 and sizes[1e9] > 14


@pytest.mark.parametrize("length", [1, 2, 7, 70_001])
def test_rows_come_back_exactly(length):
    rng = np.random.default_rng(length)
    codes = rng.integers(-7, 8, (5, length)).astype(np.int8)
    codes[3] = rng.integers(-127, 128, length)
    codes[3, 0] = 100  # wide for sure
    order, parts = compact_codes.pack_rows(codes)
    assert order.tolist() == [3, 0, 1, 2, 4] and int(parts["num_wide"]) == 1
    reader = compact_codes.unpack_rows(parts, 5, length)
    received = torch.cat([reader(first, last) for first, last in compact_codes.blocks(length)], dim=1)
    np.testing.assert_array_equal(received.numpy(), codes[order])


@pytest.mark.parametrize("form", ["pca", "default"])
def test_matches_stay_within_a_fraction_of_a_voxel(form, tmp_path):
    """Places of known patients, at 8 mm voxels, matched between decoded embeddings and against fp16."""
    storage = COMPACT.get(form, Storage())
    for seed in (0, 1):
        save_embedding(tmp_path, patient_embedding(seed), storage)
    points_mm = np.stack([patient_landmarks(0)[name] for name in ATLAS_LANDMARKS_MM])
    true_mm = np.stack([patient_landmarks(1)[name] for name in ATLAS_LANDMARKS_MM])
    query, key = (load_embedding(tmp_path, f"patient{seed}") for seed in (0, 1))
    for one, other in ((query, key), (patient_embedding(0), key)):  # mixed forms match too
        error_mm = np.linalg.norm(match_points(one, other, points_mm).points_mm - true_mm, axis=1)
        assert np.median(error_mm) < 5 and error_mm.max() < 12


def damaged(path, **changes) -> None:
    """Rewrite a file with some tensors changed (None: left out)."""
    with safe_open(path, framework="pt") as stored:
        header, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata=header)


@pytest.mark.parametrize(
    "changes",
    [
        {"fine__pairs": None},
        {"fine__mean": torch.zeros(3)},
        {"fine__pairs": torch.arange(200, dtype=torch.uint8)},
        {"fine__pairs": compact_codes.squeeze(np.zeros(10_000_000, dtype=np.uint8))},
        {"fine__num_wide": torch.tensor([1000])},
        {"body__codes": compact_codes.squeeze(np.zeros(3, dtype=np.uint8))},
    ],
    ids=["missing part", "other channels", "no codes", "too many codes", "too many rows", "other body"],
)
def test_damage_is_named(changes, embedding, tmp_path):
    save_embedding(tmp_path, embedding, COMPACT["pca"])
    damaged(embedding_path(tmp_path, "case_1"), **changes)
    with pytest.raises(ValueError, match=r"case_1\.safetensors: damaged.*embed the case again"):
        load_embedding(tmp_path, "case_1")


def test_a_flipped_bit_is_noticed():
    packed = compact_codes.squeeze(np.random.default_rng(0).integers(-3, 4, 5000).astype(np.int8))
    assert len(compact_codes.expand(packed, (5000,), np.int8)) == 5000
    for place in (len(packed) // 2, len(packed) - 1):
        flipped = packed.clone()
        flipped[place] ^= 4
        with pytest.raises(ValueError):
            compact_codes.expand(flipped, (5000,), np.int8)
    with pytest.raises(ValueError, match="cut off"):
        compact_codes.expand(packed[:-2], (5000,), np.int8)


def test_wrong_flags_are_named():
    for wrong, flag in (
        ({"form": "zip"}, "--storage"),
        ({"pca_step": 0.001}, "--pca_step"),
        ({"max_bytes": 0.0}, "--max_bytes"),
    ):
        with pytest.raises(ValueError, match=flag):
            Storage(**wrong)


def test_forms_of_other_versions_are_named(embedding):
    parts, header = pack(embedding.tensors(), COMPACT["pca"])
    with pytest.raises(ValueError, match="stored as 'pq', which this version does not know"):
        unpack(parts, header.replace('"form": "pca", "shape"', '"form": "pq", "shape"'))


def test_packing_is_deterministic(embedding):
    for storage in COMPACT.values():
        (one, header), (other, _) = pack(embedding.tensors(), storage), pack(embedding.tensors(), storage)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert torch.equal(unpack(one, header)["fine"], unpack(other, header)["fine"])


def test_a_corpus_is_stored_small_and_finished_cases_keep_their_form(tmp_path):
    """Cases that cannot be read are named and skipped, whatever holds them."""
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    info = EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0), fingerprint="abc")
    unreadable = {"patient7": CTReadError("patient7: no CT"), "patient8": StoreError("patient8: damaged")}

    def read(name: str):
        if name in unreadable:
            raise unreadable[name]
        return patient_volume(int(name[-1]))

    names = ["patient0", "patient1", "patient7", "patient8"]
    embed_corpus(network, info, CaseSource(names[:1], read), tmp_path)
    report = embed_corpus(network, info, CaseSource(names, read), tmp_path, storage=Storage())
    assert report["reused"] == ["patient0"] and report["written"] == ["patient1"]
    assert report["failed"] == {name: str(error) for name, error in unreadable.items()}
    assert [stored_form(tmp_path, name) for name in names] == ["fp16", Storage().form, None, None]
    report = embed_corpus(network, info, CaseSource(names[:2], read), tmp_path, overwrite=True, storage=FP16)
    assert report["written"] == names[:2] and stored_form(tmp_path, "patient1") == "fp16"


def test_the_worst_of_published_volumes_is_20_times_smaller(tmp_path):
    """128 channels alike along all axes; the body fills more than half of the scan."""
    embedding_storage.main(["--quick", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_channels"] == 128 and found["body_share"] > 0.55
    assert found["published_bytes"] == 2 * 128 * (63 * 52 * 52 + 32 * 7 * 7)
    assert found["forms"]["default"]["times_smaller"] > 20 and found["forms"]["fp16"]["times_smaller"] < 1.01
    assert all(len(row) == len(HEADER) for row in embedding_storage.rows(found))


def test_the_benchmark_measures_errors_on_held_out_cases(tmp_path, capsys):
    for seed in (0, 1):
        volume = patient_volume(seed)
        write_nifti(tmp_path / "images" / f"patient{seed}.nii.gz", volume.array, volume.affine)
        places = {name: place.tolist() for name, place in patient_landmarks(seed).items()}
        (tmp_path / f"patient{seed}.json").write_text(json.dumps({"landmarks_mm": places}))
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(tmp_path / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    flags = ["--checkpoint_file", str(tmp_path / "sam.pth"), "--data_dir", str(tmp_path / "images"), "--device", "cpu"]
    with pytest.raises(ValueError, match="--landmark_dir"):
        embedding_storage.main(flags)
    flags += ["--landmark_dir", str(tmp_path), "--forms", "[default]", "--output", str(tmp_path / "found.json")]
    embedding_storage.main(flags)
    found = json.loads((tmp_path / "found.json").read_text())
    voxels = 68 * 52 * 68 + 34 * 7 * 9  # 34 x 26 x 34 voxels of 8 mm are 136 x 104 x 136 of 2 mm
    assert found["published_bytes"] == 2 * 128 * voxels and list(found["forms"]) == ["fp16", "default"]
    assert found["forms"]["fp16"]["median_mm_change"] == 0 and abs(found["forms"]["default"]["median_mm_change"]) < 3
    assert "| default | 0." in capsys.readouterr().out
