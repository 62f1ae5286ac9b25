"""Which cases of a corpus are embedded: what the store or the list gives, without the few that are of no use."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from datasets.ct.nifti import Volume, write_nifti
from datasets.lists.data_list import Case
from datasets.store.files import FileWriteError
from datasets.store.volumes import build_store
from sam_embed.case_source import CaseOptions, CaseSource, open_cases
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings import corpus as corpus_module
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embedding_store import embedded_cases
from sam_embed.network import AnatomicalEmbedder
from tests.sam_fakes import patient_volume

INFO = EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0), fingerprint="abc")


def small_network() -> AnatomicalEmbedder:
    torch.manual_seed(0)
    return AnatomicalEmbedder(width=4, embed_dim=8).eval()  # in the published layout, whose pool has a stride


def write_patient(folder: Path, seed: int) -> Path:
    volume = patient_volume(seed)
    write_nifti(folder / f"patient{seed}.nii.gz", volume.array, volume.affine)
    return folder / f"patient{seed}.nii.gz"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A store of two patients and a list that speaks of a third, which nobody could read."""
    cases = [Case(f"patient{seed}", write_patient(tmp_path / "images", seed)) for seed in (0, 1)]
    build_store(cases, tmp_path / "store", progress=False)
    listed = {"training": [{"image": f"patient{seed}.nii.gz"} for seed in (0, 1, 2)], "validation": []}
    listed["others"] = [{"image": "patient3.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    return tmp_path


def test_listed_cases_that_the_store_lacks_are_left_out_and_named(corpus, capsys):
    cases = open_cases(CaseOptions(str(corpus / "store"), json_list=str(corpus / "list.json")))
    assert cases.names == ["patient0", "patient1"] and cases.read("patient1").shape == patient_volume(1).shape
    told = capsys.readouterr().err
    assert "1 of 3 listed cases are not in the store, first patient2" in told and "failures.json" in told
    open_cases(CaseOptions(str(corpus / "store"), json_list=str(corpus / "list.json")), rank=1)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of 1 listed cases are not in the store, first patient3.*--store_dir"):
        open_cases(CaseOptions(str(corpus / "store"), json_list=str(corpus / "list.json"), sections=["others"]))
    with pytest.raises(ValueError, match="no cases in validation"):
        open_cases(CaseOptions(str(corpus / "store"), json_list=str(corpus / "list.json"), sections=["validation"]))


def test_an_empty_store_is_no_corpus(tmp_path):
    build_store([], tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="store: the store holds no case; scripts/prepare_volumes.py"):
        open_cases(CaseOptions(str(tmp_path / "store")))


@pytest.mark.parametrize("kind", ["store", "file"])
def test_a_case_is_embedded_again_when_its_ct_has_changed(corpus, kind):
    network = small_network()

    def embed(kind: str) -> list[str]:
        folders = {"store": (str(corpus / "store"), None), "file": (None, str(corpus / "images"))}
        cases = open_cases(CaseOptions(*folders[kind]))
        assert all(cases.identity(name).startswith(f"{kind}:") for name in cases.names)
        made = embed_corpus(network, INFO, cases, corpus / "made")
        assert sorted(made["written"] + made["reused"]) == ["patient0", "patient1"]
        return made["written"]

    assert embed(kind) == ["patient0", "patient1"] and not embed(kind)
    assert not embed({"store": "file", "file": "store"}[kind])  # identities of two kinds tell nothing
    volume = patient_volume(5)
    write_nifti(corpus / "images" / "patient1.nii.gz", volume.array, volume.affine)
    cases = [Case(name, corpus / "images" / f"{name}.nii.gz") for name in ("patient0", "patient1")]
    build_store(cases, corpus / "store", progress=False)
    assert embed(kind) == ["patient1"] and not embed(kind)


def test_a_stored_case_whose_header_was_corrected_has_another_identity(corpus):
    before = open_cases(CaseOptions(str(corpus / "store"))).identity("patient0")
    volume = patient_volume(0)
    moved = volume.affine.copy()
    moved[2, 3] += 100
    write_nifti(corpus / "images" / "patient0.nii.gz", volume.array, moved)
    build_store([Case("patient0", corpus / "images" / "patient0.nii.gz")], corpus / "store", progress=False)
    assert open_cases(CaseOptions(str(corpus / "store"))).identity("patient0") != before


def test_embeddings_of_unknown_source_are_kept(corpus):
    """Files of older versions state none, and a CT may be gone once it is embedded."""
    cases = open_cases(CaseOptions(data_dir=str(corpus / "images")))
    embed_corpus(small_network(), INFO, CaseSource(cases.names, cases.read), corpus / "made")
    for identity in (cases.identity, lambda name: ""):
        made = embed_corpus(small_network(), INFO, dataclasses.replace(cases, identity=identity), corpus / "made")
        assert made["reused"] == ["patient0", "patient1"]
    (corpus / "images" / "patient0.nii.gz").unlink()
    assert cases.identity("patient0") == ""


def test_a_case_that_cannot_be_embedded_does_not_stop_the_others(tmp_path, monkeypatch):
    thin = patient_volume(0)
    volumes = {"a_thin": Volume(thin.array[17:18], thin.affine, "thin")}
    volumes |= {name: patient_volume(1) for name in ("b_large", "c_larger", "d_odd", "e_good")}
    errors = {
        "b_large": torch.cuda.OutOfMemoryError("CUDA out of memory"),
        "c_larger": MemoryError(),
        "d_odd": ValueError("one piece"),
    }

    def embed(network, volume, info, memory_mb, name):
        if name in errors:
            raise errors[name]
        return embed_volume(network, volume, info, memory_mb, name)

    embed_volume = corpus_module.embed_volume
    monkeypatch.setattr(corpus_module, "embed_volume", embed)
    report = embed_corpus(small_network(), INFO, CaseSource(list(volumes), volumes.__getitem__), tmp_path)
    assert report["written"] == ["e_good"] == embedded_cases(tmp_path)
    assert "too small" in report["failed"].pop("a_thin")
    assert report["failed"] == {"b_large": "CUDA out of memory", "c_larger": "MemoryError", "d_odd": "one piece"}


def test_a_folder_that_cannot_be_written_to_ends_the_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileWriteError):
        embed_corpus(small_network(), INFO, CaseSource(["patient0"], lambda _: patient_volume(0)), tmp_path / "file")
