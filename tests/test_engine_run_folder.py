"""One run, one folder: a second process is refused while the first lives, and never afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main_ddp
from engine.distributed import World
from engine.run_folder import LOCK, FolderInUseError, claimed
from tests.tiny_run import add_store_and_table, arguments, make_corpus

REPOSITORY = Path(__file__).resolve().parents[1]
ALONE = World()
HOLDER = """
import sys, time
from engine.distributed import World
from engine.run_folder import claimed
with claimed(sys.argv[1], World()):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_the_folder(holder, tmp_path):
    told = f"--output_dir .*run is in use by process {holder.pid} on .*, since"
    with pytest.raises(FolderInUseError, match=told), claimed(tmp_path / "run", ALONE):
        pytest.fail("the folder was claimed twice")
    with claimed(tmp_path / "other", ALONE), claimed(tmp_path / "run", World(rank=1, size=2)):
        pass  # other folders, and the other ranks of a run, are nobody's business


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):  # and neither does one that ended
        with claimed(tmp_path / "run", ALONE):
            assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()


def test_pretraining_into_a_folder_in_use_changes_nothing_there(holder, tmp_path):
    corpus = add_store_and_table(make_corpus(tmp_path))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    started = time.monotonic()
    with pytest.raises(FolderInUseError):
        main_ddp.main(arguments(corpus, tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert time.monotonic() - started < 30, "it does not wait"
