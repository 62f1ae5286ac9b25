"""The authors' pickles: every layout comes in at the right place, and nothing in a file is ever executed."""

import os
import pickle
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import Volume, write_nifti
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.compact import Storage
from sam_embed.embeddings.embed import embed_volume
from sam_embed.embeddings.embedding_store import embedded_cases, embedding_path, load_embedding, stored_form
from sam_embed.embeddings.plain_pickle import PublishedPickleError, read_plain
from sam_embed.embeddings.published_pickle import (
    COARSE_GRID,
    FINE_GRID,
    PublishedEmbedding,
    read_published,
    to_embedding,
)
from sam_embed.matching.match import match_points
from sam_embed.network import AnatomicalEmbedder
from scripts import import_embeddings
from tests.golden_fill import fill_by_name

INPUT_SHAPE = (33, 48, 50)  # at 2 mm
FINE_SHAPE, COARSE_SHAPE = (16, 24, 25), (8, 3, 4)
NETWORK = {"width": 8, "embed_dim": 16}


def volume_of(shape=INPUT_SHAPE, spacing_mm=(2.0, 2.0, 2.0), path="ct.nii.gz") -> Volume:
    """Soft tissue up to every border, so that the body crop keeps the whole volume."""
    along_d, along_h, along_w = spacing_mm
    affine = np.array([[0, 0, -along_w, 40], [0, -along_h, 0, 30], [along_d, 0, 0, -90], [0, 0, 0, 1]])
    hu = np.random.default_rng(0).normal(40, 60, shape).clip(-150, 400).astype(np.int16)
    return Volume(hu, affine.astype(float), path)


def unit_vectors(shape: tuple, seed: int = 0) -> torch.Tensor:
    values = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=1).half()


FINE, COARSE, SEMANTIC = unit_vectors(FINE_SHAPE), unit_vectors(COARSE_SHAPE, seed=1), unit_vectors(FINE_SHAPE, seed=2)
PUBLISHED = PublishedEmbedding(FINE[0], COARSE[0], None)
IMAGE = np.full((1, 1, *INPUT_SHAPE), 16.25, dtype=np.float32)
LAYOUTS = {
    "fine, coarse": [FINE, COARSE],
    "image": [FINE, COARSE, torch.from_numpy(IMAGE)],
    "image array": [FINE, COARSE, IMAGE[0, 0]],
    "name": [FINE, COARSE, "case_7"],
    "image and name": [FINE, COARSE, IMAGE, "case_7"],
    "name and image, a tuple": ("case_7", IMAGE, FINE, COARSE),
    "arrays": [FINE.numpy(), np.asfortranarray(COARSE.numpy())],
    "big-endian floats": [FINE.numpy().astype(">f4"), COARSE.float()],
    "parameters and plain values": [torch.nn.Parameter(FINE), COARSE, None, 3, 2.5, np.float32(1), {"mm": [2, 2]}],
    "semantic": [FINE, COARSE, SEMANTIC],
    "semantic and image": [FINE, COARSE, SEMANTIC, IMAGE],
    "strided": [FINE.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), COARSE],
}


@pytest.mark.parametrize("writer", ["pickle 2", "pickle 4", "pickle 5", "torch", "old torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(layout, writer, tmp_path):
    path = tmp_path / "case.pkl"
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(LAYOUTS[layout], protocol=int(writer[-1])))
    else:
        torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=writer == "torch")
    published = read_published(path)
    assert published.fine.dtype == published.coarse.dtype == torch.float16
    assert torch.equal(published.fine, FINE[0]) and torch.equal(published.coarse, COARSE[0])
    assert published.name == ("case_7" if "name" in layout else None)
    assert (published.semantic is not None) == ("semantic" in layout)
    if published.semantic is not None:
        assert torch.equal(published.semantic, SEMANTIC[0])
        assert torch.equal(to_embedding(published, volume_of(), "case").semantic, SEMANTIC[0])


def test_vectors_are_brought_to_unit_length(tmp_path):
    (tmp_path / "case.pkl").write_bytes(pickle.dumps([FINE.float() * 7, COARSE]))
    torch.testing.assert_close(read_published(tmp_path / "case.pkl").fine, FINE[0], atol=1e-3, rtol=0)
    (tmp_path / "case.pkl").write_bytes(pickle.dumps([FINE * float("nan"), COARSE]))
    with pytest.raises(PublishedPickleError, match="case.pkl.*finite"):
        read_published(tmp_path / "case.pkl")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class NumpySubclass(np.ndarray):
    pass


def nested_in_a_storage(mark: str) -> Calls:
    """What torch itself unpickles within a tensor must not run either."""
    return Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=2))


@pytest.mark.parametrize("writer", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize(
    "make, named",
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), f"{os.system.__module__}.system"),
        (lambda mark: Calls(eval, f"open({mark!r}, 'w')"), r"([a-z_]+\.)?eval;"),
        (lambda mark: deque("abc"), "collections.deque"),
        (lambda mark: EmbedderInfo(), "sam_embed.checkpoint.EmbedderInfo"),
        (lambda mark: os.system, f"{os.system.__module__}.system"),
        (lambda mark: np.zeros(2).view(NumpySubclass), "NumpySubclass"),
    ],
)
def test_anything_else_is_refused_by_name_and_not_run(make, named, writer, tmp_path):
    path, mark = tmp_path / "case.pkl", tmp_path / "mark"
    content = [FINE, COARSE, make(str(mark))]
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(PublishedPickleError, match=f"case.pkl: refused.*{named}"):
        read_published(path)
    assert not mark.exists()


def test_code_inside_a_storage_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / "case.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps([FINE, COARSE, nested_in_a_storage(str(mark))]))
    with pytest.raises(PublishedPickleError, match=f"case.pkl: refused.*{os.system.__module__}.system"):
        read_plain(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program, reason",
    [
        (b"c_codecs\nencode\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b.", "refused.*a change of _codecs.encode"),
        (b"c_codecs\nencode\n.", "refused.*_codecs.encode"),
        (pickle.dumps([print]), "refused.*builtins.print"),
        (pickle.dumps(np.array(["a", None])), "refused.*numpy.dtype.*O8"),
        (pickle.dumps(np.zeros(2, dtype=[("a", "f4")])), "refused.*numpy.dtype.*V4"),
    ],
)
def test_hand_made_programs_are_refused(program, reason, tmp_path):
    (tmp_path / "case.pkl").write_bytes(program)
    with pytest.raises(PublishedPickleError, match=reason):
        read_plain(tmp_path / "case.pkl")


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    rebuild, (storage, *_) = torch.zeros(4).__reduce_ex__(2)
    call = Calls(rebuild, storage, 2, (1000,), (1,), False, None)
    (tmp_path / "case.pkl").write_bytes(pickle.dumps([call]))
    with pytest.raises(PublishedPickleError, match="damaged"):
        read_plain(tmp_path / "case.pkl")


def repeated(rebuild, storage, size: int) -> list:
    """One stored number that pretends to be two embeddings."""
    shape = (1, 16, size, size, size)
    return [Calls(rebuild, storage, 0, shape, (0,) * 5, False, {}) for _ in range(2)]


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_small_file_cannot_ask_for_much_memory(writer, tmp_path):
    path = tmp_path / "case.pkl"
    rebuild, (storage, *_) = torch.zeros(1).__reduce_ex__(2)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(repeated(rebuild, storage, 2000)))
    else:
        torch.save([torch.zeros(1).expand(1, 16, 2000, 2000, 2000)] * 2, path)
    assert path.stat().st_size < 2000
    with pytest.raises(PublishedPickleError, match=r"refused.*\[1, 16, 2000, 2000, 2000\] that repeats what it stores"):
        read_published(path)


def test_lists_that_hold_each_other_end_soon(tmp_path):
    laughs = ["ha"]
    for _ in range(15):
        laughs = [laughs] * 10
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(laughs))
    with pytest.raises(PublishedPickleError, match="refused.*more than 10,000 items"):
        read_plain(tmp_path / "case.pkl")


@pytest.mark.parametrize("program", [b"]r\xff\xff\xff\x07.", b"]p134217727\n.", b"]q\x09."])
def test_numbers_of_objects_are_not_taken_for_lengths(program, tmp_path):
    (tmp_path / "case.pkl").write_bytes(program)
    with pytest.raises(PublishedPickleError, match="refused.*an object with the number [0-9]+, although 1 precede it"):
        read_plain(tmp_path / "case.pkl")


@pytest.mark.parametrize("writer", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.95, 0.9999])
def test_truncated_files_say_so(writer, kept, tmp_path):
    path = tmp_path / "case.pkl"
    if writer == "pickle":
        path.write_bytes(pickle.dumps([FINE, COARSE]))
    else:
        torch.save([FINE, COARSE], path, _use_new_zipfile_serialization=writer == "torch")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(PublishedPickleError, match="case.pkl: truncated, damaged"):
        read_published(path)


@pytest.mark.parametrize(
    "content",
    [
        {"fine": FINE},
        [FINE],
        [FINE, COARSE, COARSE],
        [FINE, COARSE, SEMANTIC, FINE],
        [FINE, COARSE[:, :8]],
        [FINE, COARSE, "a", "b"],
        [FINE, IMAGE],
    ],
    ids=["dict", "one", "three", "four", "widths", "names", "image"],
)
def test_other_contents_are_described(content, tmp_path):
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(PublishedPickleError, match=r"case.pkl.*expected.*fine"):
        read_published(tmp_path / "case.pkl")


def test_grids_are_the_published_networks():
    network = AnatomicalEmbedder(**NETWORK)
    assert network.fine_grid() == FINE_GRID and network.coarse_grid() == COARSE_GRID


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (4.0, 1.0, 1.0)])
def test_imported_equals_the_directly_made_one(spacing_mm, tmp_path):
    shape = tuple(round(size * 2 / mm) for size, mm in zip((32, 48, 50), spacing_mm))
    volume = volume_of(shape, spacing_mm)
    network = fill_by_name(AnatomicalEmbedder(**NETWORK)).eval()
    direct = embed_volume(network, volume, EmbedderInfo(fingerprint="f"), name="case")
    (tmp_path / "case.pkl").write_bytes(pickle.dumps([direct.fine[None], direct.coarse[None]]))
    imported = to_embedding(read_published(tmp_path / "case.pkl"), volume, "case", "f")
    np.testing.assert_allclose(imported.fine_affine, direct.fine_affine, atol=1e-9)
    np.testing.assert_allclose(imported.coarse_affine, direct.coarse_affine, atol=1e-9)
    assert torch.equal(imported.fine, direct.fine) and torch.equal(imported.coarse, direct.coarse)
    assert torch.equal(imported.body, direct.body) and imported.body.any()
    points_mm = index_to_world(direct.fine_affine, np.array([[3, 5, 7], [9, 12, 20]]))
    matches = match_points(imported, direct, points_mm)
    np.testing.assert_allclose(matches.points_mm, match_points(direct, direct, points_mm).points_mm)


@pytest.mark.parametrize("depth, height, width", [(33, 48, 50), (32, 47, 49), (33.9, 47.1, 50)])
def test_sizes_may_be_rounded_either_way(depth, height, width):
    spacing_mm = (depth * 2 / 20, height * 2 / 60, width * 2 / 60)
    volume = volume_of((20, 60, 60), spacing_mm)
    embedding = to_embedding(PUBLISHED, volume, "case")
    first_corner = index_to_world(volume.affine, np.array([[-0.5, -0.5, -0.5]]))
    # Index 0 of fine lies at input index (0.5, 0, 0), whose first voxel begins at the CT's first corner.
    corner = index_to_world(embedding.fine_affine, np.array([[-0.5, -0.25, -0.25]]))
    np.testing.assert_allclose(corner, first_corner, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 48, 50), (33, 44, 50), (33, 48, 60), (16, 48, 50)])
def test_shapes_that_do_not_fit_are_refused_with_both_named(shape):
    volume = volume_of(shape, path="that_ct.nii.gz")
    with pytest.raises(PublishedPickleError, match=r"this.pkl: fine \[16, 24, 25\].*that_ct.nii.gz.*gives fine"):
        to_embedding(PUBLISHED, volume, "case", source="this.pkl")


@pytest.fixture
def corpus(tmp_path):
    """Four CTs; pickles named in each way that people name them, one of them bad."""
    (tmp_path / "data").mkdir()
    (tmp_path / "pickles").mkdir()
    for name in ("case_1_0000", "case_2_0000", "case_3_0000", "case_7_0000"):
        volume = volume_of((20, 48, 50) if "3" in name else INPUT_SHAPE)
        write_nifti(tmp_path / "data" / f"{name}.nii.gz", volume.array, volume.affine)
    contents = {
        "case_1.pkl": [FINE, COARSE],
        "case_2_0000.nii.gz.pickle": [FINE, COARSE, IMAGE],
        "case_3.pkl": [FINE, COARSE],
        "0007.pkl": [FINE, COARSE, "/home/them/case_7_0000.nii.gz"],
        "unknown.pkl": [FINE, COARSE],
        "case_1_0000.p": [FINE, COARSE],
    }
    for name, content in contents.items():
        (tmp_path / "pickles" / name).write_bytes(pickle.dumps(content))
    return tmp_path


def command(corpus, *words: str) -> list[str]:
    folders = {"--pickle_dir": "pickles", "--data_dir": "data", "--embed_dir": "embeddings"}
    return [word for flag, name in folders.items() for word in (flag, str(corpus / name))] + list(words)


def test_a_folder_is_imported_and_resumed(corpus, capsys):
    import_embeddings.main(command(corpus, "--storage", "fp16"))
    printed = capsys.readouterr()
    assert embedded_cases(corpus / "embeddings") == ["case_1", "case_2", "case_7"]
    assert "imported 3 of 6" in printed.out and "3 failed" in printed.out
    for reason in ("case_3.pkl: fine", "unknown.pkl: no case", "was already taken"):
        assert reason in printed.err
    assert (corpus / "embeddings" / "import_run.json").is_file()
    assert torch.equal(load_embedding(corpus / "embeddings", "case_7").fine, FINE[0])
    written = embedding_path(corpus / "embeddings", "case_1").stat().st_mtime_ns
    size = embedding_path(corpus / "embeddings", "case_1").stat().st_size
    embedding_path(corpus / "embeddings", "case_2").unlink()
    import_embeddings.main(command(corpus))
    assert "imported 1 of 6 pickles, 2 were there" in capsys.readouterr().out
    assert embedding_path(corpus / "embeddings", "case_1").stat().st_mtime_ns == written
    ct = corpus / "data" / "case_7_0000.nii.gz"
    os.utime(ct, ns=(ct.stat().st_atime_ns, ct.stat().st_mtime_ns + 1))
    import_embeddings.main(command(corpus))  # the geometry comes from the CT
    assert "imported 1 of 6 pickles, 2 were there" in capsys.readouterr().out
    import_embeddings.main(command(corpus, "--overwrite"))
    assert "imported 3 of 6" in capsys.readouterr().out
    assert stored_form(corpus / "embeddings", "case_7") == Storage().form
    assert embedding_path(corpus / "embeddings", "case_1").stat().st_size * 2 < size


def test_a_pickle_that_needs_too_much_memory_does_not_stop_the_others(corpus, capsys, monkeypatch):
    def read(path):
        if path.name == "case_1.pkl":
            raise RuntimeError("not enough memory: you tried to allocate 17 TB")
        return read_published(path)

    monkeypatch.setattr(import_embeddings, "read_published", read)
    import_embeddings.main(command(corpus))
    assert "case_1.pkl: not enough memory" in capsys.readouterr().err
    assert {"case_2", "case_7"} <= set(embedded_cases(corpus / "embeddings"))


def test_a_name_inside_that_contradicts_the_file_name_is_refused(corpus, capsys):
    (corpus / "pickles" / "case_2_0000.nii.gz.pickle").write_bytes(pickle.dumps([FINE, COARSE, "case_1"]))
    import_embeddings.main(command(corpus))
    assert "its content says case_1" in capsys.readouterr().err
    assert "case_2" not in embedded_cases(corpus / "embeddings")


def test_a_folder_without_usable_pickles_ends_with_an_error(corpus):
    for path in (corpus / "pickles").iterdir():
        path.write_bytes(b"")
    with pytest.raises(PublishedPickleError, match="no pickle could be imported"):
        import_embeddings.main(command(corpus))
    for path in (corpus / "pickles").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="--pickle_dir"):
        import_embeddings.main(command(corpus))
