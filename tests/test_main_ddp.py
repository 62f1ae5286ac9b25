"""main_ddp.py from its command line, on a tiny corpus: files, exact resume, two ranks against one, the smoke config."""

import json
import os
import signal
import socket

import pytest
import torch

import engine.loop
import main_ddp
from engine.checkpoint import LATEST, load_checkpoint
from engine.flags import REPOSITORY
from engine.signals import EXIT_INTERRUPTED
from tests.launched import run_ranks
from tests.tiny_run import add_store_and_table, arguments, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run: one epoch of three steps, one validation."""
    output_dir = tmp_path_factory.mktemp("finished")
    main_ddp.main(arguments(corpus, output_dir, val_freq=1, num_val_pairs=1, keep_freq=1))
    return output_dir


def flat(state, prefix: str = "") -> dict:
    """Nested dicts and lists -> {dotted name: leaf}."""
    if not isinstance(state, dict | list):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}.{key}").items()}


def test_run_leaves_what_it_should(finished):
    state = torch.load(finished / LATEST, weights_only=True)
    assert state["kind"] == "alice" and (state["step"], state["epoch"]) == (3, 1)
    assert state["preprocessing"] == {
        "axcodes": "SPL", "spacing_mm": [2.0, 2.0, 2.0], "hu_min": -125.0, "hu_max": 225.0, "roi": [64, 32, 32]
    }  # fmt: skip
    assert state["backbone"] == {"name": "swin_unetr", "feature_size": 12, "in_channels": 1}
    assert state["num_training_cases"] == 3
    assert (state["effective_batch"], state["steps_per_epoch"]) == (2, 3)
    assert state["flags"]["batch_size"] == 2 and state["commit"]
    assert load_checkpoint(finished / "checkpoint0001.pth", "alice")["step"] == 3
    assert json.loads((finished / "run.json").read_text())["flags"] == state["flags"]
    assert list((finished / "tensorboard").iterdir())


def test_log_holds_terms_monitors_and_pair_statistics(finished):
    lines = log_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]
    terms = {
        "loss",
        "loss_cls",
        "loss_tokens",
        "loss_recon",
        "teacher_entropy_share",
        "teacher_kl_share",
        "feature_std",
        "casa_cos_right",
        "casa_entropy",
    }
    rates = {"lr", "weight_decay", "momentum_teacher", "teacher_temp", "grad_norm", "samples_per_s", "data_wait_share"}
    for line in lines:
        assert (terms | rates | {"fallback_share", "pair_score"}) <= line.keys()
        assert all(abs(value) < 1e6 for name, value in line.items() if name != "kind")
        assert 0.7 <= line["pair_score"] <= 1 and line["fallback_share"] == 0
        weighted = line["loss_cls"] + line["loss_tokens"] + 10 * line["loss_recon"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-4)
    assert [line["step"] for line in log_of(finished, "validation")] == [3]
    assert [line["step"] for line in log_of(finished, "epoch")] == [3]


def test_interrupted_in_the_middle_of_an_epoch_and_resumed_equals_uninterrupted(
    finished, corpus, tmp_path, monkeypatch, capfd
):
    plain = engine.loop.seed_step

    def signal_at_second_step(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.loop, "seed_step", signal_at_second_step)
    with pytest.raises(SystemExit) as ended:
        main_ddp.main(arguments(corpus, tmp_path))
    assert ended.value.code == EXIT_INTERRUPTED == 75
    assert load_checkpoint(tmp_path / LATEST)["step"] == 2
    monkeypatch.setattr(engine.loop, "seed_step", plain)
    main_ddp.main(arguments(corpus, tmp_path, num_workers=2))
    assert "resumed at step 2" in capfd.readouterr().out
    ours, theirs = (torch.load(folder / LATEST, weights_only=True) for folder in (tmp_path, finished))
    for part in ("student", "teacher", "loss", "optimizer"):
        one, other = flat(ours[part]), flat(theirs[part])
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, f"{part}{name} differs"
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]
    for one, other in zip(log_of(tmp_path), log_of(finished)):
        assert one["loss"] == other["loss"]


def one_of_two_ranks(rank: int, port: int, argv: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    main_ddp.main(argv)


def test_two_ranks_equal_one_process_on_the_joined_batch(finished, corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = arguments(corpus, tmp_path, batch_size=1, val_freq=1, num_val_pairs=2)
    run_ranks(one_of_two_ranks, (port, argv))
    for kind in ("train", "validation"):
        assert len(log_of(tmp_path, kind)) == len(log_of(finished, kind)) > 0
        for one, other in zip(log_of(tmp_path, kind), log_of(finished, kind)):
            for name in ("loss", "loss_cls", "loss_tokens", "loss_recon", "pair_score"):
                assert one[name] == pytest.approx(other[name], rel=2e-3), (kind, one["step"], name)
    ours, theirs = (torch.load(folder / LATEST, weights_only=True) for folder in (tmp_path, finished))
    # AdamW divides by the gradient's own size, so weights whose gradient is rounding noise differ; its running means of
    # gradients do not.
    for name, mean in flat(theirs["optimizer"]["state"]).items():
        if name.endswith("exp_avg"):
            other = flat(ours["optimizer"]["state"])[name]
            assert (mean - other).abs().max() <= 1e-3 * mean.abs().max() + 1e-5, name
    for name, value in theirs["student"].items():
        if value.is_floating_point():
            close = torch.isclose(ours["student"][name], value, rtol=1e-3, atol=1e-4).float().mean()
            assert close > 0.95, (name, float(close))
    for name, value in theirs["loss"].items():
        torch.testing.assert_close(ours["loss"][name], value, rtol=1e-4, atol=1e-5)


def test_smoke_config_builds_the_store_validates_and_draws(tmp_path, capfd):
    corpus = make_corpus(tmp_path)
    paths = [f"--data_dir={corpus}", f"--json_list={corpus / 'list.json'}", f"--output_dir={tmp_path / 'smoke'}"]
    main_ddp.main(["--config", str(REPOSITORY / "configs" / "smoke.yaml"), *paths, "--device=cpu"])
    told = capfd.readouterr().out
    assert "5 cases to add at 4 x 4 x 4 mm" in told
    assert "cases: 3 to train with, 2 held out" in told
    assert (tmp_path / "smoke" / "store" / "store.json").exists()
    for name in ("reconstruction", "attention", "features"):
        assert (tmp_path / "smoke" / f"{name}.png").stat().st_size > 10_000
    assert log_of(tmp_path / "smoke", "validation")[0]["loss"] > 0


def test_starting_weights_change_the_start_and_foreign_files_are_refused(finished, corpus, tmp_path, capfd):
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"layer.weight": torch.zeros(3, 3)}}, foreign)
    with pytest.raises(ValueError, match="--checkpoint_file .*foreign.pth: 0 of 137 keys .*--feature_size"):
        main_ddp.main(arguments(corpus, tmp_path / "a", checkpoint_file=foreign))
    changed = {"checkpoint_file": finished / LATEST, "steps_per_epoch": 1, "warmup_epochs": 1}
    main_ddp.main(arguments(corpus, tmp_path / "b", **changed))
    assert "started from the weights of" in capfd.readouterr().out
    # The first step of a warm-up has learning rate 0: these still are the weights that the run started from.
    ours, theirs = load_checkpoint(tmp_path / "b" / LATEST), load_checkpoint(finished / LATEST)
    for name, value in theirs["student"].items():
        assert torch.equal(ours["student"][name], value), name
