"""--probe_freq: the numbers are written, and the run is the same, bit for bit, as without them."""

import os
import signal
import socket

import pytest
import torch

import engine.loop
import main_ddp
from engine.checkpoint import LATEST, load_checkpoint
from tests.labelled_corpus import make_stored_corpus
from tests.launched import run_ranks
from tests.tiny_run import TINY, add_store_and_table, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [f"probe_{probe}_balanced{ending}" for ending in ("", "_teacher") for probe in ("knn", "linear")]
PROBED = {"probe_freq": 1, "probe_voxels": 5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_stored_corpus(tmp_path_factory.mktemp("corpus"))


def arguments(corpus, output_dir, **changed) -> list[str]:
    paths = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store"}
    small = {"backbone": "unet", "roi_z": 32, "pairing": "random", "lambda2": 0, "output_dir": output_dir}
    flags = TINY | paths | small | changed
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def without(corpus, tmp_path_factory):
    """A run of two epochs of two steps without probes."""
    folder = tmp_path_factory.mktemp("without")
    main_ddp.main(arguments(corpus, folder, epochs=2, steps_per_epoch=2))
    return folder


def assert_same_run(one, other) -> None:
    ours, theirs = (torch.load(folder / LATEST, weights_only=True) for folder in (one, other))
    for part in ("student", "teacher", "loss"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), f"{part} {name} differs"
    for index, values in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][index][name], value) for name, value in values.items())
    assert [line["loss"] for line in log_of(one)] == [line["loss"] for line in log_of(other)]


def test_a_probed_run_equals_one_without_probes_and_logs_four_numbers(corpus, without, tmp_path):
    main_ddp.main(arguments(corpus, tmp_path, epochs=2, steps_per_epoch=2, **PROBED))
    assert_same_run(tmp_path, without)
    lines = log_of(tmp_path, "probe")
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (2, 1), (4, 2)]
    assert all(0 <= line[name] <= 1 for line in lines for name in NAMES)
    assert lines[0]["probe_knn_balanced"] == lines[0]["probe_knn_balanced_teacher"], "they start as one network"
    assert lines[0]["probe_knn_balanced"] > 0.3, "four classes of plain intensities: chance is 0.25"
    assert not log_of(without, "probe")


def test_interrupted_and_resumed_with_probes_equals_uninterrupted_without(corpus, without, tmp_path, monkeypatch):
    plain = engine.loop.seed_step

    def signal_at_third_step(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.loop, "seed_step", signal_at_third_step)
    argv = arguments(corpus, tmp_path, epochs=2, steps_per_epoch=2, **PROBED)
    with pytest.raises(SystemExit):
        main_ddp.main(argv)
    assert load_checkpoint(tmp_path / LATEST)["step"] == 3
    monkeypatch.setattr(engine.loop, "seed_step", plain)
    main_ddp.main(argv)
    assert_same_run(tmp_path, without)
    assert [line["step"] for line in log_of(tmp_path, "probe")] == [0, 2, 4]


def one_of_two_ranks(rank: int, port: int, argv: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    main_ddp.main(argv)


def test_rank_0_probes_and_the_other_waits(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = arguments(corpus, tmp_path, batch_size=1, steps_per_epoch=1, warmup_epochs=0, **PROBED)
    run_ranks(one_of_two_ranks, (port, argv))
    assert [line["step"] for line in log_of(tmp_path, "probe")] == [0, 1]
    assert len(log_of(tmp_path, "train")) == 1


def test_probes_without_labels_are_refused_before_anything_starts(tmp_path):
    folder = add_store_and_table(make_corpus(tmp_path, num_training=2, num_validation=0))
    argv = arguments(folder, tmp_path / "out", json_list=folder / "list.json", probe_freq=1)
    with pytest.raises(ValueError, match="list.json: 0 of its cases have labels.*--probe_json_list"):
        main_ddp.main(argv)
    assert not (tmp_path / "out").exists()
