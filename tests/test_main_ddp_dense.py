"""main_ddp.py with the dense term: embeddings are opened, runs resume exactly, and what does not fit is refused."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import main_ddp
from datasets.store.volumes import VolumeStore
from engine.checkpoint import LATEST, load_checkpoint
from sam_embed.embeddings.compact import Storage
from sam_embed.embeddings.embedding_store import Embedding, embedding_path, load_embedding, save_embedding
from tests.launched import assert_same_weights, smallest
from tests.tiny_run import add_store_and_table, log_of, make_corpus

STEP = 4  # store voxels from one fine voxel to the next
DENSE = {"lambda1": 0, "lambda2": 0, "lambda4": 5, "dense_points": 8, "dense_hidden_dim": 16, "pairing": "sam"}


def fake_embedding(record, fingerprint: str = "sam") -> Embedding:
    """Unit vectors that change with the place in the world; the lower half of the grid lies in the patient."""
    shape = [side // STEP for side in record.shape]
    first = np.diag([STEP, STEP, STEP, 1.0])
    first[:3, 3] = (STEP - 1) / 2
    affine = record.affine @ first
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    phase = (index @ affine[:3, :3].T + affine[:3, 3]) * 0.05
    waves = torch.from_numpy(np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)).permute(3, 0, 1, 2)
    fine = F.normalize(waves, dim=0).half()
    body = torch.ones(shape, dtype=torch.bool)
    body[shape[0] // 2 :] = False
    coarse = fine[:, ::2, ::2, ::2].contiguous()
    coarse_affine = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    return Embedding(record.name, fine, coarse, affine, coarse_affine, None, body, fingerprint, record.identity)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tiny corpus, with embeddings in the compact form."""
    folder = add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))
    store = VolumeStore(folder / "store")
    for name in store.names:
        save_embedding(folder / "embeddings", fake_embedding(store.record(name)), Storage())
    return folder


@pytest.fixture
def embeddings(corpus, tmp_path) -> Path:
    """A copy of the folder of embeddings, to spoil."""
    return shutil.copytree(corpus / "embeddings", tmp_path / "embeddings")


def train(corpus: Path, output_dir: Path, **changed) -> Path:
    main_ddp.main(smallest(corpus, output_dir, **(DENSE | changed)))
    return output_dir


@pytest.mark.parametrize("variant", ["distil", "across", "across_contrast", "coordinates"])
def test_a_stopped_run_ends_as_one_that_never_stopped(corpus, tmp_path, variant):
    """With validation, and with other workers after the stop."""
    common = {"dense_variant": variant, "epochs": 2, "steps_per_epoch": 1, "warmup_epochs": 0, "val_freq": 1}
    common |= {"num_val_pairs": 2, "keep_freq": 1}
    whole, parts = train(corpus, tmp_path / "whole", **common), tmp_path / "parts"
    parts.mkdir()
    shutil.copyfile(whole / "checkpoint0001.pth", parts / LATEST)
    train(corpus, parts, **common, num_workers=2)
    assert len(log_of(whole)) == 2 and len(log_of(parts)) == 1
    assert_same_weights(whole, parts)
    for kind in ("train", "validation"):
        for line in log_of(whole, kind):
            assert np.isfinite(line["loss_dense"]) and 0 <= line["dense_nearest"] <= 1, line
    assert log_of(whole)[0]["lambda4"] == 5


def test_the_checkpoint_names_the_sam_and_a_resumed_run_warns_of_another(corpus, embeddings, tmp_path):
    run = train(corpus, tmp_path / "run", epochs=2, steps_per_epoch=1, warmup_epochs=0, keep_freq=1)
    assert "anatomy" in load_checkpoint(run / LATEST)["data"]
    shutil.copyfile(run / "checkpoint0001.pth", run / LATEST)
    for name in VolumeStore(corpus / "store").names:
        another = dataclasses.replace(load_embedding(embeddings, name), fingerprint="another")
        save_embedding(embeddings, another, Storage())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(corpus, run, epochs=2, steps_per_epoch=1, warmup_epochs=0, embed_dir=embeddings)
    assert any("trained on embeddings of another SAM (--embed_dir)" in str(one.message) for one in heard)


def test_a_run_without_the_term_needs_no_embeddings_and_knows_nothing_of_them(corpus, tmp_path):
    run = train(corpus, tmp_path / "run", lambda4=0, pairing="iou", embed_dir="", epochs=1, steps_per_epoch=1)
    state = load_checkpoint(run / LATEST)
    assert "anatomy" not in state["data"] and not [name for name in state["student"] if "dense" in name]


def test_missing_embeddings_are_refused_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(ValueError, match="--lambda4 5 needs SAM's embeddings, and --embed_dir is not given.*generate_"):
        train(corpus, tmp_path / "run", embed_dir="", pairing="iou")
    with pytest.raises(ValueError, match=f"--embed_dir {tmp_path} holds no embedding"):
        train(corpus, tmp_path / "run", embed_dir=tmp_path, pairing="iou")
    with pytest.raises(ValueError, match="--json_list .*nowhere.json: no such file"):
        train(corpus, tmp_path / "run", json_list=tmp_path / "nowhere.json")
    assert not (tmp_path / "run").exists()


def test_embeddings_that_do_not_belong_are_refused_by_name(corpus, embeddings, tmp_path):
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            train(corpus, tmp_path / "run", embed_dir=embeddings)

    good = load_embedding(embeddings, "case1")
    save_embedding(embeddings, dataclasses.replace(good, fingerprint="another"), Storage())
    refused("different weights.*another: case1")
    moved = good.source[:-1] + ("0" if good.source[-1] != "0" else "1")
    save_embedding(embeddings, dataclasses.replace(good, source=moved), Storage())
    refused("1 of 3 cases were embedded from other files than those of --store_dir, first case1")
    embedding_path(embeddings, "case1").unlink()
    refused("1 of 3 cases have no embedding, first case1; run scripts/generate_sam_embeddings.py")


def test_held_out_cases_need_embeddings_only_where_they_are_used(corpus, embeddings, tmp_path):
    embedding_path(embeddings, "case4").unlink()
    short = {"epochs": 1, "steps_per_epoch": 1, "warmup_epochs": 0, "embed_dir": embeddings}
    train(corpus, tmp_path / "run", **short)
    with pytest.raises(ValueError, match="1 of 5 cases have no embedding, first case4"):
        train(corpus, tmp_path / "validated", **short, val_freq=1)
