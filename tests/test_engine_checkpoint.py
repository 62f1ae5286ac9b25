"""Checkpoints: atomic, falling back to the one before, loadable without running code."""

import os
import stat
import threading
import warnings
import zipfile

import pytest
import torch

from engine import checkpoint as ck
from engine.checkpoint import BackgroundSaver
from engine.distributed import World
from engine.run import warn_of_changed_flags


def state(step: int) -> dict:
    return {"kind": "alice", "student": {"weight": torch.full((3,), float(step))}, "step": step, "flags": {"lr": 0.1}}


def test_latest_and_previous_rotate_and_load_with_weights_only(tmp_path):
    for step in (1, 2, 3):
        assert ck.save_checkpoint(state(step), tmp_path)
    assert torch.load(tmp_path / ck.LATEST, weights_only=True)["step"] == 3
    assert torch.load(tmp_path / ck.PREVIOUS, weights_only=True)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [ck.LATEST, ck.PREVIOUS]


def test_the_disk_has_a_checkpoint_before_it_gets_its_name_and_then_the_name(tmp_path, monkeypatch):
    """A rename may reach the disk before the content does, and a power cut then leaves an empty checkpoint."""
    plain, synced = os.fsync, []

    def note(handle: int) -> None:
        names = sorted(path.name for path in tmp_path.iterdir())
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        is_whole = is_folder or zipfile.is_zipfile(tmp_path / f"{ck.LATEST}.tmp")
        synced.append((is_folder, is_whole, names))
        plain(handle)

    monkeypatch.setattr(os, "fsync", note)
    ck.save_checkpoint(state(1), tmp_path)
    assert synced == [(False, True, [f"{ck.LATEST}.tmp"]), (True, True, [ck.LATEST])]


def test_numbered_copy_stays(tmp_path):
    ck.save_checkpoint(state(1), tmp_path, keep_as="checkpoint0010.pth")
    ck.save_checkpoint(state(2), tmp_path)
    ck.save_checkpoint(state(3), tmp_path)
    assert ck.load_checkpoint(tmp_path / "checkpoint0010.pth", "alice")["step"] == 1


def damaged(content: bytes, damage: str) -> bytes:
    """The bytes of a checkpoint after an accident; "flip" is one bit of a tensor, which torch.load takes as it is."""
    if damage == "flip":
        at = content.index(b"\x00\x00\x00\x40") + 3  # a float32 of 2.0
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return {"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"no checkpoint"}[damage]


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "flip"])
def test_damaged_latest_falls_back_with_a_warning(tmp_path, damage):
    ck.save_checkpoint(state(1), tmp_path)
    ck.save_checkpoint(state(2), tmp_path)
    latest = tmp_path / ck.LATEST
    content = latest.read_bytes()
    latest.write_bytes(damaged(content, damage))
    if damage == "flip":
        assert torch.load(latest, weights_only=True)["student"]["weight"][0] != 2.0
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        found, path = ck.find_resumable(tmp_path, "alice")
    assert found["step"] == 1 and path.name == ck.PREVIOUS
    assert (tmp_path / ck.DAMAGED).read_bytes() == damaged(content, damage)
    # The damaged one must not push the good one out.
    ck.save_checkpoint(state(3), tmp_path)
    assert ck.load_checkpoint(tmp_path / ck.PREVIOUS)["step"] == 1
    assert ck.load_checkpoint(tmp_path / ck.LATEST)["step"] == 3


def test_killed_between_the_renames_resumes_from_previous(tmp_path):
    ck.save_checkpoint(state(1), tmp_path)
    (tmp_path / ck.LATEST).rename(tmp_path / ck.PREVIOUS)
    (tmp_path / (ck.LATEST + ".tmp")).write_bytes(b"half a checkpoint")
    found, _ = ck.find_resumable(tmp_path, "alice")
    assert found["step"] == 1


def test_nothing_to_resume_and_nothing_readable_differ(tmp_path):
    assert ck.find_resumable(tmp_path, "alice") is None
    (tmp_path / ck.LATEST).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ck.CheckpointError, match="--resume none"):
            ck.find_resumable(tmp_path, "alice")


def test_runs_that_were_set_aside_stay_and_mix_with_no_other(tmp_path):
    names = ["checkpoint.pth", "checkpoint0010.pth", "best.pth", "log.txt", "run.json", "store", "tensorboard"]
    for run in ("first", "second", "third"):
        for name in names:
            if name in ("store", "tensorboard"):
                (tmp_path / name).mkdir(exist_ok=True)
            else:
                (tmp_path / name).write_text(run)
        if run == "second":  # one that was ended before its first checkpoint
            (tmp_path / "checkpoint.pth").unlink()
        ck.set_aside(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if ".before" not in path.name] == ["store"]
    for ending, run in ((".before", "first"), (".before2", "second"), (".before3", "third")):
        kept = {path.name.removesuffix(ending): path for path in tmp_path.glob("*" + ending)}
        assert kept.keys() == set(names) - {"store"} - ({"checkpoint.pth"} if run == "second" else set())
        assert all(path.read_text() == run for path in kept.values() if path.is_file())


@pytest.mark.parametrize(("own", "expected"), [(None, 5), (5, 5), (4, 5), (6, 6), ("damaged", 5)])
def test_a_given_checkpoint_counts_until_the_folder_has_a_later_one(tmp_path, own, expected):
    ck.save_checkpoint(state(5), tmp_path / "other")
    given, run = tmp_path / "other" / ck.LATEST, tmp_path / "run"
    if own == "damaged":
        run.mkdir()
        (run / ck.LATEST).write_bytes(b"no checkpoint")
    elif own is not None:
        ck.save_checkpoint(state(own), run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, path = ck.find_wanted(str(given), run, "alice", World())
    assert found["step"] == expected and path == (given if expected == 5 else run / ck.LATEST)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, error):
    ck.save_checkpoint(state(1), tmp_path)

    def refuse(content, file):
        file.write(b"part of it")
        raise error

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.warns(UserWarning, match="is kept"):
        assert not ck.save_checkpoint(state(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ck.LATEST]
    assert ck.load_checkpoint(tmp_path / ck.LATEST)["step"] == 1


def test_a_disk_that_fills_up_in_the_middle_of_the_file_keeps_the_old_checkpoint(tmp_path):
    """No stand-in here: the kernel ends the write after 200 kB, through PyTorch's own zip writer."""
    resource = pytest.importorskip("resource")
    ck.save_checkpoint(state(1), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        expected = f"could not write a checkpoint.*File too large.*{ck.LATEST} from before is kept"
        with pytest.warns(UserWarning, match=expected):
            assert not ck.save_checkpoint(state(2) | {"large": torch.ones(500, 500)}, tmp_path, keep_as="kept.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [ck.LATEST]
    assert ck.load_checkpoint(tmp_path / ck.LATEST)["step"] == 1
    assert ck.save_checkpoint(state(3), tmp_path)  # room again


class Foreign:
    """Something that only code can rebuild."""


def test_pickles_that_carry_code_are_refused(tmp_path):
    torch.save({"kind": "alice", "args": Foreign()}, tmp_path / "foreign.pth")
    with pytest.raises(ck.CheckpointError, match="could run code"):
        ck.load_checkpoint(tmp_path / "foreign.pth")


def test_wrong_kind_and_missing_file_name_the_file(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ck.CheckpointError, match="other.pth.*not a checkpoint of kind 'alice'.*state_dict"):
        ck.load_checkpoint(tmp_path / "other.pth", "alice")
    with pytest.raises(ck.CheckpointError, match="absent.pth"):
        ck.load_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ck.CheckpointError, match="holds a list"):
        ck.load_checkpoint(tmp_path / "list.pth")


def test_strict_loading_lists_what_does_not_fit(tmp_path):
    module = torch.nn.Linear(4, 2)
    with pytest.raises(ck.CheckpointError, match=r'run.pth: .*Missing.*"bias".*Unexpected.*"gain".*mismatch.*weight'):
        ck.load_strictly(module, {"weight": torch.zeros(2, 3), "gain": torch.zeros(1)}, "student", "run.pth")
    ck.load_strictly(module, {"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "student", "run.pth")
    assert module.weight.sum() == 8


# Writing while training goes on


def test_what_is_written_is_the_state_at_the_call(tmp_path, monkeypatch):
    may_write, module = threading.Event(), torch.nn.BatchNorm1d(3)
    plain = ck.write_synced
    monkeypatch.setattr(ck, "write_synced", lambda *given: may_write.wait(60) and plain(*given))
    saver = BackgroundSaver(tmp_path)
    saver.save({"kind": "alice", "student": module.state_dict(), "list": [torch.ones(2), 3], "step": 1})
    with torch.no_grad():
        module.weight.fill_(7.0)  # training goes on before a byte is written
    assert not (tmp_path / ck.LATEST).exists()
    may_write.set()
    assert saver.wait()
    state = ck.load_checkpoint(tmp_path / ck.LATEST, "alice")
    assert state["student"]["weight"].tolist() == [1.0] * 3 and state["list"][1] == 3
    assert state["student"]._metadata == module.state_dict()._metadata


def test_one_checkpoint_after_the_other_and_failures_are_known(tmp_path, monkeypatch):
    saver = BackgroundSaver(tmp_path)
    for step in (1, 2, 3):
        saver.save(state(step), keep_as=f"checkpoint{step:04d}.pth")
    assert saver.wait() and saver.wait()
    assert [ck.load_checkpoint(tmp_path / name)["step"] for name in (ck.PREVIOUS, ck.LATEST)] == [2, 3]
    assert ck.load_checkpoint(tmp_path / "checkpoint0001.pth")["step"] == 1

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "write_synced", refuse)
    with pytest.warns(UserWarning, match="No space left"):
        saver.save(state(4))
        assert not saver.wait()


def test_changed_flags_are_told_with_both_values_unless_they_are_free():
    before, now = {"lr": 0.1, "num_workers": 1, "gone": 1}, {"lr": 0.2, "num_workers": 2, "new": 1}
    with pytest.warns(UserWarning, match=r"run.pth was trained with other flags: --lr 0.1 -> 0.2$"):
        warn_of_changed_flags(before, now, "run.pth")
