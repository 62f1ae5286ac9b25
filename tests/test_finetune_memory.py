"""Finetuning with a memory, and prediction and evaluation with it: files, both Dice, resume, ranks, refusals."""

import json
import re
import shutil
import socket

import nibabel as nib
import numpy as np
import pytest
import torch

import scripts.evaluate_segmentation
import scripts.finetune_segmentation as command
from engine.checkpoint import LATEST, CheckpointError, load_checkpoint
from engine.segmentation import remembering
from engine.segmentation.memory import Memory, Sam, open_recall
from engine.segmentation.remembering import BLURS_MM, WEIGHTS
from sam_embed.checkpoint import EmbedderInfo, load_embedder
from sam_embed.network import AnatomicalEmbedder
from scripts import predict
from tests.labelled_corpus import finetune_arguments, labelled_volume, make_labelled_corpus
from tests.launched import run_ranks
from tests.sam_fakes import compact_options, dice, save_embedder
from tests.tiny_run import log_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SAM_INFO = EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0), hu_min=-1000.0, hu_max=600.0, scale_to=4.0, offset=-2.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_labelled_corpus(tmp_path_factory.mktemp("corpus"))


def save_sam(path, seed: int):
    torch.manual_seed(seed)
    network = AnatomicalEmbedder(**compact_options(width=4, embed_dim=8))
    save_embedder(path, network, SAM_INFO)
    return path


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A SAM that nobody trained: of the same scan it still finds every place again."""
    return save_sam(tmp_path_factory.mktemp("sam") / "sam.pth", 0)


@pytest.fixture(scope="module")
def finished(corpus, sam, tmp_path_factory):
    """An uninterrupted run with a memory of all three training cases."""
    output_dir = tmp_path_factory.mktemp("finished")
    command.main(finetune_arguments(corpus, output_dir, **with_memory(sam)))
    return output_dir


def with_memory(sam, **changed) -> dict:
    return {"memory": "true", "sam_checkpoint": sam, "memory_weight": 3, "memory_blur_mm": 4} | changed


def test_a_run_keeps_its_memory_and_reports_both_dice(finished, sam):
    memory = Memory(**load_checkpoint(finished / "best.pth", "segmentation")["memory"])
    assert memory.names == ["case0", "case1", "case2"] and memory.weight == 3 and memory.blur_mm == 4
    assert memory.sam == {"path": str(sam), "fingerprint": load_embedder(sam)[1].fingerprint}
    for line in log_of(finished, "validation"):
        assert 0 <= line["dice_without_memory"] <= 1 and line["dice"] != line["dice_without_memory"]
    summary = json.loads((finished / "evaluation" / "results.json").read_text())
    assert summary["dice_without_memory"]["num"] == 2 and "dice_without_memory" in summary["organs"]["liver"]
    assert "memory: 3 labelled cases (case0, case1, case2)" in summary["description"]["memory"]
    assert "Dice without memory (%)" in (finished / "evaluation" / "results.md").read_text()


def test_without_a_memory_the_network_and_its_dice_are_the_same(finished, corpus, tmp_path):
    command.main(finetune_arguments(corpus, tmp_path))
    ours, theirs = (load_checkpoint(folder / LATEST)["model"] for folder in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "memory" not in load_checkpoint(tmp_path / "best.pth")
    plain = [line["dice"] for line in log_of(tmp_path, "validation")]
    assert plain == [line["dice_without_memory"] for line in log_of(finished, "validation")]


def test_interrupted_and_resumed_equals_uninterrupted(finished, corpus, sam, tmp_path, monkeypatch):
    flags = with_memory(sam, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path, steps=3, **flags))
    monkeypatch.setattr(command, "remember_cases", None)  # the checkpoint's is taken
    moved = shutil.copy(sam, tmp_path / "moved.pth")
    command.main(finetune_arguments(corpus, tmp_path, **(flags | {"sam_checkpoint": moved})))
    ours, theirs = (load_checkpoint(folder / LATEST) for folder in (tmp_path, finished))
    assert ours["memory"]["sam"] == theirs["memory"]["sam"] and ours["step"] == theirs["step"]
    for one, other in zip(ours["memory"]["cases"], theirs["memory"]["cases"], strict=True):
        assert all(torch.equal(one["parts"][name], other["parts"][name]) for name in other["parts"])
    last, expected = (log_of(folder, "validation")[-1] for folder in (tmp_path, finished))
    assert last["step"] == expected["step"] == 4


def test_a_resumed_run_must_keep_its_memory(finished, corpus, sam, tmp_path):
    shutil.copy(finished / LATEST, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="--memory True -> False"):
        command.main(finetune_arguments(corpus, tmp_path))
    with pytest.raises(CheckpointError, match="--memory_weight 3.0 -> 2.0"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam, memory_weight=2)))
    with pytest.raises(CheckpointError, match="--sam_checkpoint"):
        other = save_sam(tmp_path / "other.pth", 1)
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(other)))
    old = load_checkpoint(finished / LATEST)
    for name in ("memory", "memory_cases", "sam_checkpoint"):
        del old["flags"][name]
    torch.save(old, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="--memory False -> True"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam)))


def one_of_two_ranks(rank: int, port: int, argv: list[str]) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    command.main(argv)


def test_two_ranks_have_one_memory(finished, corpus, sam, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = with_memory(sam, num_val_cases=0, steps=1, val_freq=1)
    run_ranks(one_of_two_ranks, (port, finetune_arguments(corpus, tmp_path, **flags)))
    summary = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert summary["num_cases"] == summary["dice_without_memory"]["num"] == 2
    ours, theirs = (load_checkpoint(folder / LATEST)["memory"]["cases"] for folder in (tmp_path, finished))
    assert all(torch.equal(one["label"], other["label"]) for one, other in zip(ours, theirs, strict=True))


def test_memory_cases_limits_what_is_remembered(corpus, sam, tmp_path):
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert Memory(**load_checkpoint(tmp_path / "best.pth")["memory"]).names == ["case0"]


def test_cases_with_carried_labels_are_remembered_only_where_no_label_was_drawn(corpus, sam, tmp_path):
    content = json.loads((corpus / "list.json").read_text())
    for weights, names in (((0.6, 1, 0.9), ["case1"]), ((0.6, 0.5, 0.9), ["case0", "case1", "case2"])):
        for entry, weight in zip(content["training"], weights):
            entry["weight"] = weight
        (tmp_path / "list.json").write_text(json.dumps(content))
        flags = with_memory(sam, json_list=tmp_path / "list.json", steps=1, val_freq=0, evaluate="false")
        command.main(finetune_arguments(corpus, tmp_path / names[0], **flags))
        assert Memory(**load_checkpoint(tmp_path / names[0] / "best.pth")["memory"]).names == names


def test_strength_is_learnt_once_and_kept_in_the_best_weights(corpus, sam, tmp_path, monkeypatch, capsys):
    flags = {"memory": "true", "sam_checkpoint": sam, "memory_cases": 2, "steps": 1, "val_freq": 1, "evaluate": "false"}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    memory = Memory(**load_checkpoint(tmp_path / "best.pth")["memory"])
    assert memory.is_learnt and memory.weight in WEIGHTS and memory.blur_mm in BLURS_MM
    assert "(learnt by leaving cases out)" in capsys.readouterr().out
    monkeypatch.setattr(remembering, "learn_strength", None)
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert Memory(**load_checkpoint(tmp_path / "best.pth")["memory"]).weight == memory.weight


def test_flags_that_cannot_be_are_named(corpus, sam, tmp_path):
    with pytest.raises(ValueError, match="--memory True, --sam_checkpoint gone.pth: expected the file of SAM's"):
        command.main(finetune_arguments(corpus, tmp_path, memory="true", sam_checkpoint="gone.pth"))
    with pytest.raises(ValueError, match="--memory true: expected a 3-D network"):
        command.main(finetune_arguments(corpus, tmp_path, **with_memory(sam, roi_z=1)))


def predicted(finished, corpus, folder, *words: str) -> np.ndarray:
    """The label map that predict.py writes for a held-out case."""
    out = folder / "out.nii.gz"
    image = corpus / "images" / "case4_0000.nii.gz"
    best = ["--checkpoint_file", str(finished / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(image), str(out), *best, *words])
    return np.asarray(nib.load(out).dataobj)


def test_prediction_uses_the_memory_and_says_so(finished, corpus, tmp_path, capsys):
    fused = predicted(finished, corpus, tmp_path)
    shown = capsys.readouterr().out
    assert "memory: 3 labelled cases" in shown
    assert int(re.search(r"carried the labels of 3 of them, to (\d+)% of the scan", shown)[1]) > 50
    plain = predicted(finished, corpus, tmp_path, "--memory", "false")
    assert "memory" not in capsys.readouterr().out
    assert (fused != plain).any()


def test_a_remembered_scan_under_another_name_is_left_to_the_network(finished, corpus, tmp_path, capsys, sam):
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false")
    command.main(finetune_arguments(corpus, tmp_path / "one", **flags))
    image = shutil.copy(corpus / "images" / "case0_0000.nii.gz", tmp_path / "renamed.nii.gz")
    words = ["--checkpoint_file", str(tmp_path / "one" / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(image), str(tmp_path / "out.nii.gz"), *words])
    assert "the memory is not used" in capsys.readouterr().out


def test_predictions_find_the_labels_of_a_similar_scan(corpus, sam, tmp_path):
    """A copy whose voxels differ a little: nearly all labels come back, though the network learnt nothing."""
    flags = with_memory(sam, memory_cases=1, steps=1, val_freq=0, evaluate="false", memory_weight=20, memory_blur_mm=1)
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    hu, label = labelled_volume(0)
    affine = nib.load(corpus / "images" / "case0_0000.nii.gz").affine
    hu = (hu + np.random.default_rng(0).integers(-3, 4, hu.shape)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "copy.nii.gz")
    words = ["--checkpoint_file", str(tmp_path / "best.pth"), "--device", "cpu", "--overlap", "0"]
    predict.main([str(tmp_path / "copy.nii.gz"), str(tmp_path / "out.nii.gz"), *words])
    found = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj)
    for value in (1, 2):
        assert dice(found == value, label == value) > 0.8, value


def test_the_evaluation_command_gives_both_dice(finished, corpus, tmp_path):
    paths = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--device", "cpu"]
    flags = ["--checkpoint_file", str(finished / "best.pth"), "--output_dir", str(tmp_path), "--overlap", "0"]
    scripts.evaluate_segmentation.main([*paths, *flags])
    for name in ("cases.csv", "results.md"):
        ours, theirs = ((folder / name).read_text().splitlines()[:5] for folder in (tmp_path, finished / "evaluation"))
        assert ours == theirs, name


def test_another_or_a_missing_sam_is_refused(finished, corpus, sam, tmp_path, monkeypatch):
    other = save_sam(tmp_path / "other.pth", 1)
    marks = [load_embedder(path)[1].fingerprint for path in (other, sam)]
    with pytest.raises(ValueError, match=f"other.pth is SAM {marks[0]}, and .*best.pth .* SAM {marks[1]}"):
        predicted(finished, corpus, tmp_path, "--sam_checkpoint", str(other))
    with pytest.raises(ValueError, match="gone.pth: no such file.*--sam_checkpoint.*--memory false"):
        predicted(finished, corpus, tmp_path, "--sam_checkpoint", str(tmp_path / "gone.pth"))
    stored = load_checkpoint(finished / "best.pth")["memory"]
    stored = stored | {"sam": stored["sam"] | {"path": str(tmp_path / "moved.pth")}}
    monkeypatch.setattr("engine.segmentation.memory.SHIPPED", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="moved.pth: no such file. best.pth remembers"):
        open_recall(stored, "best.pth", "", CPU)
    monkeypatch.setattr("engine.segmentation.memory.SHIPPED", other)
    with pytest.raises(ValueError, match="other.pth is SAM .*best.pth remembers .*moved.pth"):
        open_recall(stored, "best.pth", "", CPU)
    monkeypatch.setattr("engine.segmentation.memory.SHIPPED", sam)
    for given in (str(sam), ""):  # where the noted file is gone, the weights that ship are tried
        assert open_recall(stored, "best.pth", given, CPU).memory.names == ["case0", "case1", "case2"]


def test_weights_of_something_else_are_no_sam(finished):
    with pytest.raises(ValueError, match="--sam_checkpoint .*best.pth holds no SAM"):
        Sam(finished / "best.pth", CPU)


def test_a_sam_for_a_network_without_memory_is_refused(finished, corpus, sam, tmp_path):
    state = load_checkpoint(finished / "best.pth")
    del state["memory"]
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(ValueError, match="--sam_checkpoint .*remembers no cases"):
        predicted(tmp_path, corpus, tmp_path, "--sam_checkpoint", str(sam))
