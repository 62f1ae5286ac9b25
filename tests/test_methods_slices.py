"""Every pretraining method on slices (`--roi_z 1`): steps, ranks, resuming, weights that fit MONAI's 2-D network."""

import functools

import pytest
import torch
import torch.multiprocessing as mp
from monai.networks.nets import SwinUNETR

import extract_backbone_weights
import main_ddp
from engine.checkpoint import LATEST
from tests import test_methods as in_3d
from tests.launched import assert_same_weights, die_at_save, start
from tests.tiny_run import add_store_and_table, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
FLAT = {"backbone": "swin_unetr", "feature_size": 12, "roi_z": 1, "roi_y": 64, "roi_x": 32}
MASKED_MODELLING = {"lambda1": 0, "lambda2": 0}
RUNS = {
    "simsiam": ("simsiam", {}),
    "dino": ("dino", {}),
    "caid": ("caid", {}),
    "voco": ("voco", {}),
    "alice": ("alice", {}),
    "masked image modelling": ("alice", MASKED_MODELLING),
}
RESNET_RUNS = {
    "caid": ("caid", {}),
    "masked image modelling": ("alice", MASKED_MODELLING),
}


def flat(run: tuple[str, dict], corpus, output_dir, **changed) -> list[str]:
    name, options = run
    return in_3d.small(name, corpus, output_dir, **(FLAT | options | changed))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus"), 3, 0))


def assert_two_steps_train_all(argv: list[str]) -> None:
    method, dataset = in_3d.build(argv), in_3d.dataset_of(argv)
    now = in_3d.moment(method)
    method(in_3d.batch_of(dataset), now)
    method.after_step(now, was_skipped=torch.tensor(False))  # a queue is empty before the first step
    total, terms = method(in_3d.batch_of(dataset, in_3d.NUM_SAMPLES), now)
    total.backward()
    assert total.isfinite() and all(torch.as_tensor(term).isfinite() for term in terms.values())
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name, p in trained.items() if p.ndim > 1 and not p.grad.any()]


@pytest.mark.parametrize("run", RUNS)
def test_two_steps_train_every_weight(run, corpus, tmp_path):
    assert_two_steps_train_all(flat(RUNS[run], corpus, tmp_path))


@pytest.mark.parametrize("run", RESNET_RUNS)
def test_two_steps_train_every_weight_of_the_other_2d_network(run, corpus, tmp_path):
    argv = flat(RESNET_RUNS[run], corpus, tmp_path, backbone="resnet50_unet")
    assert_two_steps_train_all(argv)
    assert in_3d.build(argv).sees_batch


@pytest.mark.parametrize("lambda3", [0, 10])
def test_a_backbone_without_casas_maps_names_the_flag(lambda3, corpus, tmp_path):
    argv = flat(("alice", {"lambda3": lambda3}), corpus, tmp_path, backbone="resnet50_unet")
    with pytest.raises(ValueError, match="--lambda2 0"):
        in_3d.build(argv)


def run_ranks(rank: int, jobs: list[tuple[str, list[str]]]) -> None:
    for folder, argv in jobs:
        in_3d.run_rank(rank, folder, argv)


def test_two_ranks_equal_one_process_on_the_joined_batch(corpus, tmp_path):
    jobs, batches = [], []
    for name in ("simsiam", "dino", "caid", "alice"):
        argv, folder = flat((name, {}), corpus, tmp_path), tmp_path / name
        folder.mkdir()
        batches.append(in_3d.batch_of(in_3d.dataset_of(argv)))
        torch.save(batches[-1], folder / "batch.pt")
        jobs.append((str(folder), argv))
    mp.spawn(run_ranks, args=(jobs,), nprocs=2)
    for (folder, argv), batch in zip(jobs, batches):
        ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
        whole = in_3d.joined(argv, batch)
        mean = (ranks[0]["total"] + ranks[1]["total"]) / 2
        torch.testing.assert_close(mean, whole["total"], rtol=1e-4, atol=1e-5, msg=folder)
        for rank in ranks:
            in_3d.assert_same_step(rank, whole)


@pytest.mark.parametrize("run", ["simsiam", "alice"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(run, corpus, tmp_path):
    main_ddp.main(flat(RUNS[run], corpus, tmp_path / "whole", epochs=2))
    killed = flat(RUNS[run], corpus, tmp_path / "killed", epochs=2)
    process = start(killed, tmp_path / "output.txt", functools.partial(die_at_save, 1, "renamed"))
    process.join(300)
    assert process.exitcode == -9, (tmp_path / "output.txt").read_text()
    main_ddp.main(killed)
    assert [line["step"] for line in log_of(tmp_path / "whole")] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("run", ["simsiam", "dino", "alice"])
def test_extracted_weights_fill_monais_2d_network(run, corpus, tmp_path, capsys):
    main_ddp.main(flat(RUNS[run], corpus, tmp_path / "run", epochs=1, steps_per_epoch=1))
    files = [str(tmp_path / "run" / LATEST), str(tmp_path / "w.pth")]
    extract_backbone_weights.main([*files, "--checkpoint_key", "student"])
    assert "swin_unetr in 2-D, feature size 12: encoder" in capsys.readouterr().out
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=12, spatial_dims=2)
    network.swinViT.load_state_dict(
        {key.removeprefix("swinViT."): value for key, value in weights.items() if key.startswith("swinViT.")},
        strict=True,
    )
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == []
    if run == "alice":  # encoder and decoder: all but the output
        assert all(key.startswith("out.") for key in missing)
