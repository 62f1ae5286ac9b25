"""Finetuning and prediction in 2-D: slices of phantoms in, organ Dice per volume and 3-D label maps out."""

import json
import os
import signal
import socket

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import engine.segmentation.loop
import scripts.evaluate_segmentation
import scripts.finetune_segmentation as command
from datasets.lists.data_list import load_data_list
from datasets.store.volumes import build_store
from engine.checkpoint import LATEST, load_checkpoint
from engine.segmentation.setup import resolve_setup
from engine.signals import EXIT_INTERRUPTED
from engine.weights import save_weights
from models.layers.batch_norm import has_batch_norms
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS, freeze, layer_groups
from models.weights_file import WeightsError, WeightsFile, read_weights_file
from scripts import predict
from tests.labelled_corpus import finetune_arguments, make_labelled_corpus
from tests.test_finetune_segmentation import one_of_two_ranks, same
from tests.tiny_run import log_of

SPACING_MM = (4.0, 2.0, 2.0)
# Pictures of 66 x 54 pixels: more than one crop, and less than one.
SLICES = {
    **{"backbone": "swin_unetr", "feature_size": 12, "roi_z": 1, "roi_y": 64, "roi_x": 64, "spacing_mm": None},
    **{"batch_size": 2, "window_batch": 8, "val_freq": 4},
}


def build(name: str, spatial_dims: int) -> torch.nn.Module:
    torch.manual_seed(9)
    return SEGMENTERS[name].build(1, 1, 12, spatial_dims=spatial_dims)


def arguments(corpus, output_dir, **changed) -> list[str]:
    return finetune_arguments(corpus, output_dir, **SLICES | changed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_labelled_corpus(tmp_path_factory.mktemp("corpus"), num_training=2, num_validation=1)
    cases = [case for part in ("training", "validation") for case in load_data_list(folder / "list.json", folder, part)]
    build_store(cases, folder / "store", SPACING_MM, progress=False)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a 2-D network, which say that they were trained on slices."""
    path = tmp_path_factory.mktemp("weights") / "simsiam.safetensors"
    preprocessing = {"spacing_mm": list(SPACING_MM), "hu_min": -100.0, "hu_max": 300.0, "roi": [1, 64, 64]}
    backbone = {"name": "swin_unetr", "feature_size": 12, "in_channels": 1}
    described = {"method": "simsiam", "step": 5, "backbone": backbone}
    state = {k: v for k, v in build("swin_unetr", 2).state_dict().items() if not k.startswith("out.")}
    save_weights(state, described | {"preprocessing": preprocessing | {"axcodes": "SPL"}}, path)
    return path


@pytest.fixture(scope="module")
def finished(weights, corpus, tmp_path_factory):
    """An uninterrupted run of four steps, all of whose sizes come from the weights, with its evaluation."""
    output_dir = tmp_path_factory.mktemp("finished")
    command.main(arguments(corpus, output_dir, weights=weights, **dict.fromkeys(list(SLICES)[:5])))
    return output_dir


def test_weights_of_slices_are_finetuned_on_slices_without_any_flag(finished, weights):
    best = load_checkpoint(finished / "best.pth", "segmentation")
    assert best["preprocessing"]["roi"] == [1, 64, 64] and best["pretrained"]["method"] == "simsiam"
    assert best["model"]["swinViT.patch_embed.proj.weight"].ndim == 4, "a 2-D network"
    given = read_weights_file(weights).tensors["swinViT.layers4.0.blocks.0.attn.qkv.weight"]
    moved = (best["model"]["swinViT.layers4.0.blocks.0.attn.qkv.weight"] - given).abs().max()
    assert 0 < moved < 0.05, "it started from the weights and learnt"


def test_results_have_organ_dice_per_volume_and_the_published_number_beside_it(finished):
    summary = json.loads((finished / "evaluation" / "results.json").read_text())
    assert summary["num_cases"] == 1 and list(summary["organs"]) == ["liver", "spleen", "aorta"]
    assert summary["organs"]["liver"]["dice"]["num"] == 1, "per volume"
    assert summary["slice_dice_published"]["num"] == 40, "per slice of the file"
    assert summary["slice_dice_published"]["mean"] > summary["dice"]["mean"], "background counts"
    assert "slice_dice_published: " in (finished / "evaluation" / "results.md").read_text()
    assert all({"dice", "slice_dice_published"} <= line.keys() for line in log_of(finished, "validation"))


def test_interrupted_and_resumed_equals_uninterrupted(finished, weights, corpus, tmp_path, monkeypatch):
    plain = engine.segmentation.loop.seed_step

    def signal_at_second_step(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    flags = dict.fromkeys(list(SLICES)[:5]) | {"weights": weights, "evaluate": "false"}
    monkeypatch.setattr(engine.segmentation.loop, "seed_step", signal_at_second_step)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments(corpus, tmp_path, **flags))
    assert ended.value.code == EXIT_INTERRUPTED and load_checkpoint(tmp_path / LATEST)["step"] == 3
    monkeypatch.setattr(engine.segmentation.loop, "seed_step", plain)
    command.main(arguments(corpus, tmp_path, **flags))
    for name in (LATEST, "best.pth"):
        ours, theirs = (load_checkpoint(folder / name) for folder in (tmp_path, finished))
        for part in theirs.keys() - {"flags", "commit"}:
            assert same(ours[part], theirs[part]), (name, part)


def test_a_scan_gets_a_label_map_on_its_own_voxels(finished, corpus, tmp_path):
    source = nib.load(corpus / "images" / "case2_0000.nii.gz")
    turn = nib.orientations.axcodes2ornt(("P", "I", "R"))
    turned = source.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(source.affine), turn))
    nib.save(turned, tmp_path / "scan.nii.gz")
    out, checkpoint = tmp_path / "labels.nii.gz", finished / "best.pth"
    flags = [f"--checkpoint_file={checkpoint}", "--device=cpu", "--overlap=0", "--window_batch=8"]
    predict.main([str(tmp_path / "scan.nii.gz"), str(out), *flags])
    found = nib.load(out)
    assert found.shape == turned.shape and np.allclose(found.affine, turned.affine, atol=1e-4)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2, 5}
    lists = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--output_dir", str(tmp_path / "e")]
    scripts.evaluate_segmentation.main([*lists, *flags, "--save_predictions"])
    assert (tmp_path / "e/cases.csv").read_text() == (finished / "evaluation/cases.csv").read_text()
    ours = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "e", finished / "evaluation"))
    assert len({summary["slice_dice_published"]["mean"] for summary in ours}) == 1
    whole = np.asarray(nib.load(tmp_path / "e" / "predictions" / "case2.nii.gz").dataobj)
    back = nib.orientations.ornt_transform(turn, nib.orientations.io_orientation(source.affine))
    assert np.array_equal(np.asarray(found.as_reoriented(back).dataobj), whole)


@pytest.mark.slow
def test_two_ranks_train_and_judge_together(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"steps": 2, "val_freq": 0, "clip_grad": 0, "section": "training"}
    mp.spawn(one_of_two_ranks, (port, arguments(corpus, tmp_path, **flags | {"batch_size": 1})), nprocs=2)
    command.main(arguments(corpus, tmp_path / "one", evaluate="false", **flags))
    for ours, theirs in zip(log_of(tmp_path), log_of(tmp_path / "one"), strict=True):
        # Not closer, because Dice is taken over each rank's own part of the batch.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    judged = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--output_dir", str(tmp_path / "e")]
    judged += [f"--checkpoint_file={tmp_path / 'best.pth'}", "--section=training", "--overlap=0", "--device=cpu"]
    scripts.evaluate_segmentation.main([*judged, "--window_batch=8"])
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("evaluation", "e"))
    assert (
        ours["slice_dice_published"] == theirs["slice_dice_published"] and theirs["slice_dice_published"]["num"] == 80
    )
    assert ours["organs"] == theirs["organs"]


# Weights of the wrong number of dimensions


@pytest.mark.parametrize(("trained", "wanted", "kinds"), [(1, 96, "2-D and .* a 3-D"), (64, 1, "3-D and .* a 2-D")])
def test_slices_and_volumes_are_not_mixed(trained, wanted, kinds):
    described = {"preprocessing": {"roi": [trained, 64, 64]}}
    with pytest.raises(ValueError, match=f"--roi_z {wanted}: the weights are {kinds} network") as refused:
        resolve_setup(described, {"roi": [wanted, None, None]}, SEGMENTERS)
    assert f"{trained} x 64 x 64 voxels" in str(refused.value) and f"{wanted} x 64 x 64 voxels" in str(refused.value)
    assert resolve_setup(described, {"roi": [trained, 96, 96]}, SEGMENTERS).preprocessing.roi == (trained, 96, 96)


@pytest.mark.parametrize(("given", "wanted"), [(2, 3), (3, 2)])
def test_files_that_do_not_say_their_crops_are_refused_by_their_shapes(given, wanted):
    file = WeightsFile("x.pth", build("swin_unetr", given).state_dict())
    network = build("swin_unetr", wanted)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=f"x.pth: the weights are {given}-D, and the network is {wanted}-D.*--roi_z"):
        load_pretrained(network, file, min_share=0.1)
    assert same(before, dict(network.state_dict()))


def test_a_run_refuses_weights_of_volumes_before_it_writes(corpus, weights, tmp_path):
    with pytest.raises(ValueError, match="--roi_z 32: the weights are 2-D"):
        command.main(arguments(corpus, tmp_path / "run", weights=weights, roi_z=32))
    assert not (tmp_path / "run").exists()


# The 2-D U-Net on ResNet-50


def test_resnet_unet_segments_slices_and_its_frozen_norms_keep_their_statistics():
    kind = SEGMENTERS["resnet50_unet"]
    network = kind.build(1, 4, 48, spatial_dims=2)
    assert has_batch_norms(network)
    scales = {group["lr_scale"] for group in layer_groups(network, kind, 0.5, lambda name, parameter: True)}
    assert scales == {0.5**depth for depth in range(6)}, "stem, four stages, decoder"
    encoder = [key for key in network.state_dict() if key.startswith(kind.encoder_key_prefixes)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    freeze(network, encoder)
    picture = torch.rand(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert network(picture).shape == (2, 4, 1, 32, 32)
    after = network.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"decoder"}
    freeze(network, encoder, is_frozen=False)
    network(picture)
    assert not torch.equal(network.encoder.bn1.running_mean, before["encoder.bn1.running_mean"])
