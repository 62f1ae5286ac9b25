"""Runs that are killed, signalled, poisoned or moved to another world size end where an undisturbed one does."""

import functools
import os
import random
import shutil
import signal

import pytest
import torch

import main_ddp
from engine.checkpoint import LATEST, PREVIOUS, load_checkpoint
from engine.distributed import World
from engine.flags import flags_as_dict
from engine.pretrain_data import open_data
from engine.signals import EXIT_INTERRUPTED
from models.methods import Alice
from tests.launched import (
    assert_same_weights,
    die_at_save,
    flat,
    poison_sample,
    signal_at_step,
    signal_at_step_and_write_slowly,
    smallest,
    start,
    start_two_ranks,
    two_ranks,
    wait_until,
    write_slowly,
)
from tests.tiny_run import add_store_and_table, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """Four epochs of two steps, one process, batch 2."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    main_ddp.main(smallest(corpus, output_dir))
    return output_dir


# Killed


def step_on_disk(folder) -> int:
    """The step that the same command would go on from; 0 without a checkpoint."""
    found = [load_checkpoint(path)["step"] for name in (LATEST, PREVIOUS) if (path := folder / name).exists()]
    return max(found, default=0)


def test_killed_at_every_moment_of_a_save_goes_on_from_a_complete_checkpoint(corpus, undisturbed, tmp_path):
    """Saves come every epoch, that is every 2 steps; what is lost is at most that."""
    argv, told = smallest(corpus, tmp_path / "run"), tmp_path / "told.txt"
    # (save of that process, moment, step that must be on disk afterwards)
    kills = [(2, "writing", 2), (1, "written", 2), (1, "between", 2), (1, "renamed", 4)]
    for number, moment, expected in kills:
        process = start(argv, told, functools.partial(die_at_save, number, moment))
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, (moment, told.read_text())
        assert step_on_disk(tmp_path / "run") == expected, moment
    last = start(argv, told)
    last.join(300)
    assert last.exitcode == 0, told.read_text()
    assert_same_weights(tmp_path / "run", undisturbed)
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))


def test_killed_at_random_moments_ends_with_the_same_weights(corpus, undisturbed, tmp_path):
    """With half of the time spent in writing checkpoints; the moments are drawn anew each time this test runs."""
    argv, told = smallest(corpus, tmp_path / "run"), tmp_path / "told.txt"
    draws = random.SystemRandom()
    for attempt in range(13):
        process = start(argv, told, functools.partial(write_slowly, 0.3))
        before = step_on_disk(tmp_path / "run")
        process.join(draws.uniform(0.8, 2.0) * (1 + attempt / 10) if attempt < 12 else 300)  # then to its end
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        assert step_on_disk(tmp_path / "run") >= before
    assert process.exitcode == 0, told.read_text()
    assert_same_weights(tmp_path / "run", undisturbed)


def test_damaged_latest_checkpoint_costs_one_save_and_is_told(corpus, undisturbed, tmp_path):
    argv, told = smallest(corpus, tmp_path / "run"), tmp_path / "told.txt"
    process = start(argv, told, functools.partial(die_at_save, 3, "writing"))
    process.join(300)
    latest = tmp_path / "run" / LATEST
    latest.write_bytes(latest.read_bytes()[:100_000])
    process = start(argv, told)
    process.join(300)
    text = told.read_text()
    assert process.exitcode == 0 and "trying the checkpoint before it" in text and "resumed at step 2" in text
    assert_same_weights(tmp_path / "run", undisturbed)


def test_disk_that_refuses_checkpoints_on_the_way_does_not_end_the_run(corpus, tmp_path, monkeypatch):
    """Saves 2 and 3 of 4 fail; the run goes on, says so each time, and its last save is there."""
    plain, counted = torch.save, []

    def full_for_a_while(state, file):
        counted.append(file)
        if len(counted) in (2, 3):
            file.write(b"a part of it")
            raise OSError(28, "No space left on device")
        plain(state, file)

    monkeypatch.setattr(torch, "save", full_for_a_while)
    with pytest.warns(UserWarning, match=f"No space left on device.*{LATEST} from before is kept") as told:
        main_ddp.main(smallest(corpus, tmp_path))
    assert len([warning for warning in told if "No space left" in str(warning.message)]) == 2
    assert load_checkpoint(tmp_path / LATEST)["step"] == NUM_STEPS
    assert load_checkpoint(tmp_path / PREVIOUS)["step"] == 2


# Signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_before_the_first_step_ends_with_the_code_of_an_interruption(corpus, tmp_path, number):
    """While it starts up there is nothing to save, but the job script must start it again all the same."""
    process = start(smallest(corpus, tmp_path / "run", epochs=1000), tmp_path / "told.txt")
    wait_until(lambda: (tmp_path / "run" / "run.json").exists())
    os.kill(process.pid, number)
    process.join(300)
    assert process.exitcode == EXIT_INTERRUPTED, (tmp_path / "told.txt").read_text()


def test_no_rank_leaves_while_rank_0_writes_the_checkpoint(corpus, tmp_path):
    """Launchers end all processes soon after the first has ended."""
    argv = smallest(corpus, tmp_path / "run", batch_size=1)
    prepare = functools.partial(signal_at_step_and_write_slowly, 0, 2.0)
    ranks = start_two_ranks(argv, tmp_path / "told.txt", prepare)
    ranks[1].join(300)
    assert load_checkpoint(tmp_path / "run" / LATEST)["step"] == 1
    ranks[0].join(300)
    assert [process.exitcode for process in ranks] == [EXIT_INTERRUPTED] * 2


# Started again by the same command


def test_resume_file_goes_on_from_its_own_checkpoint_when_started_again(corpus, tmp_path, capfd):
    main_ddp.main(smallest(corpus, tmp_path / "first", epochs=1))
    again = smallest(corpus, tmp_path / "run", resume=tmp_path / "first" / LATEST)
    main_ddp.main([*again, "--epochs=2"])
    assert f"resumed at step 2 from {tmp_path / 'first' / LATEST}\n" in capfd.readouterr().out
    main_ddp.main(again)
    told = capfd.readouterr().out
    assert f"resumed at step 4 from {tmp_path / 'run' / LATEST}, which is further than --resume" in told
    assert load_checkpoint(tmp_path / "run" / LATEST)["step"] == NUM_STEPS


def test_resume_none_holds_for_the_first_start_of_a_job(corpus, undisturbed, tmp_path, monkeypatch, capfd):
    """An old run's checkpoint is out of the way, also when the job is restarted before its first save."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(undisturbed / LATEST, run)
    argv = smallest(corpus, run, resume="none", epochs=1)
    main_ddp.main(argv)
    assert "started from random weights" in capfd.readouterr().out
    assert load_checkpoint(run / f"{LATEST}.before")["step"] == NUM_STEPS and not (run / PREVIOUS).exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main_ddp.main([*argv, "--epochs=2"])
    assert "resumed at step 2 from" in capfd.readouterr().out
    assert load_checkpoint(run / LATEST)["step"] == 4


# Poisoned


def test_nan_on_one_rank_stops_all_and_names_its_cases(corpus, tmp_path):
    """Sample 3 is step 1 of rank 1 (batch 1 on two ranks)."""
    argv = smallest(corpus, tmp_path / "run", batch_size=1)
    codes = two_ranks(argv, tmp_path / "told.txt", functools.partial(poison_sample, 3))
    told = (tmp_path / "told.txt").read_text()
    assert codes == [1, 1], told
    places = open_data(main_ddp.make_flags().parse_args(argv), Alice, World()).training.places(3)
    cases = ", ".join(sorted(set(places.names)))
    errors = [line for line in told.splitlines() if line.startswith("error: step 1: loss or gradient is not finite")]
    assert len(errors) == 2, told
    assert all("rank 1: loss [nan]" in line and f"cases {cases}" in line for line in errors)
    assert all("rank 0" not in line and "--nan_policy skip" in line for line in errors)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1]


def test_skipping_leaves_one_step_out_on_both_ranks(corpus, tmp_path):
    argv = smallest(corpus, tmp_path / "run", batch_size=1, nan_policy="skip")
    assert two_ranks(argv, tmp_path / "told.txt", functools.partial(poison_sample, 3)) == [0, 0]
    told = (tmp_path / "told.txt").read_text()
    assert told.count("skipped step 1: loss or gradient is not finite (rank 1: loss [nan]") == 1, told
    state = load_checkpoint(tmp_path / "run" / LATEST)
    assert state["step"] == NUM_STEPS
    for name, value in flat({part: state[part] for part in ("student", "teacher", "loss")}).items():
        assert not torch.is_tensor(value) or value.isfinite().all(), name
    assert max(slot["step"] for slot in state["optimizer"]["state"].values()) == NUM_STEPS - 1


# Broken volumes


def test_a_broken_volume_is_told_once_and_workers_do_not_change_what_stands_in(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    file = tmp_path / "corpus" / "store" / "cases" / "case1.b2nd"
    file.write_bytes(file.read_bytes()[:1000])
    for num_workers in (0, 1):
        told = tmp_path / f"{num_workers}.txt"
        process = start(smallest(tmp_path / "corpus", tmp_path / str(num_workers), num_workers=num_workers), told)
        process.join(300)
        assert process.exitcode == 0 and told.read_text().count("case case1 cannot be read") == 1, told.read_text()
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    assert log_of(tmp_path / "0")[-1]["step"] == NUM_STEPS


# What is said before the first step


def test_batch_rate_and_length_are_printed_before_the_first_step(corpus, tmp_path, capfd):
    argv = smallest(corpus, tmp_path, epochs=1, accumulate_steps=3, lr=0.01, lr_reference_batch=12, warmup_epochs=0)
    main_ddp.main(argv)
    told = capfd.readouterr().out.split("[train] step 1")[0]
    assert "effective batch: 6 = 2 a process x 1 processes x 3 accumulated" in told
    assert "learning rate: peak 0.005 = 0.01 x 6 / 12, floor 1e-06" in told
    assert "length: 2 steps an epoch, 2 in all" in told


def test_a_floor_above_the_scaled_peak_is_refused_before_anything_is_written(corpus, tmp_path, monkeypatch):
    """At batch 2 on 4 processes the peak of 1e-3 x 8 / 256 lies below the floor; on 64 it does not."""
    flags = {"lr": 1e-3, "lr_reference_batch": 256, "min_lr": 1e-4, "min_score": 2}
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"peak learning rate 3\.125e-05 .*effective batch 8"):
        main_ddp.main(smallest(corpus, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "64")
    main_ddp.check_and_build(main_ddp.make_flags().parse_args(smallest(corpus, tmp_path / "run", **flags)))


def test_printed_config_is_the_run(corpus, tmp_path, capsys):
    argv = smallest(corpus, tmp_path / "run", lr=0.0123)
    with pytest.raises(SystemExit) as ended:
        main_ddp.main([*argv, "--print_config"])
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    parse = main_ddp.make_flags().parse_args
    again, plain = (flags_as_dict(parse(words)) for words in (["--config", str(tmp_path / "run.yaml")], argv))
    assert again == plain and again["lr"] == 0.0123


# Workers and world size


def test_loading_processes_change_nothing(corpus, undisturbed, tmp_path):
    main_ddp.main(smallest(corpus, tmp_path, num_workers=2))
    assert_same_weights(tmp_path, undisturbed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stopped_on_two_ranks_goes_on_in_one_process_with_the_same_samples(corpus, undisturbed, tmp_path, num_workers):
    """Batch 1 on two ranks until the middle of the second epoch, then batch 2 in one process."""
    run = tmp_path / "run"
    codes = two_ranks(smallest(corpus, run, batch_size=1), tmp_path / "told.txt", functools.partial(signal_at_step, 2))
    assert codes == [EXIT_INTERRUPTED] * 2, (tmp_path / "told.txt").read_text()
    assert load_checkpoint(run / LATEST)["step"] == 3
    main_ddp.main(smallest(corpus, run, batch_size=2, num_workers=num_workers))
    ours, theirs = log_of(run), log_of(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(ours, theirs):
        assert one["pair_score"] == pytest.approx(other["pair_score"], abs=1e-6)  # the same pairs
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3), one["step"]
    # AdamW turns rounding noise into full steps where a gradient is almost 0, so that single weights differ by more
    # than rounding; all of them together must have gone the same way.
    start_of_both = main_ddp.check_and_build(main_ddp.make_flags().parse_args(smallest(corpus, run))).student
    joined = [
        torch.cat([state[name].flatten() for name, _ in start_of_both.named_parameters()])
        for state in (load_checkpoint(run / LATEST)["student"], load_checkpoint(undisturbed / LATEST)["student"])
    ]
    way = joined[1] - torch.nn.utils.parameters_to_vector(start_of_both.parameters()).detach()
    assert (joined[0] - joined[1]).norm() < 0.05 * way.norm(), (joined[0] - joined[1]).norm() / way.norm()
