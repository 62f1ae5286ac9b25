"""No step of a pretraining run waits for its device, but for those that are logged or saved.

Shown on `tests.other_device`, where all that makes a CUDA program wait is counted, and on a GPU by CUDA itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main_ddp
from engine.flags import REPOSITORY
from models.methods import METHODS
from tests.other_device import SET_UP
from tests.test_methods import small
from tests.tiny_run import add_store_and_table, make_corpus

QUIET = {"epochs": 1, "steps_per_epoch": 5, "warmup_epochs": 0, "log_freq": 100, "device": "cuda"}
RUNS: dict[str, tuple[str, dict]] = {
    **{name: (name, {"precision": "bf16"}) for name in METHODS},
    "overflows are skipped": ("dino", {"precision": "fp16"}),
    "broken steps are skipped": ("caid", {"nan_policy": "skip", "accumulate_steps": 2}),
    "sinkhorn, sgd": ("alice", {"centring": "sinkhorn", "optimizer": "sgd", "clip_each": True}),
    "moved views": ("dino", {"move_views": True}),
    "window attention": ("alice", {"backbone": "swin_unetr", "feature_size": 12, "roi_z": 64, "batch_size": 1}),
    "window attention of nnFormer": ("alice", {"backbone": "nnformer"}),
}


def command(name: str, corpus: Path, folder: Path) -> list[str]:
    method, changed = RUNS[name]
    return small(method, corpus, folder / name, **QUIET, **changed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus"), 3, 0))


@pytest.fixture(scope="module")
def waits(corpus, tmp_path_factory) -> dict[str, list[list[str]]]:
    """Of each run, of each step, where it waited."""
    if SET_UP is None:
        pytest.skip("this PyTorch knows no devices written in Python (2.9 does)")
    folder = tmp_path_factory.mktemp("waits")
    (folder / "runs.json").write_text(json.dumps([command(name, corpus, folder) for name in RUNS]))
    words = [sys.executable, "-m", "tests.waiting", str(folder / "runs.json"), str(folder / "waits.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-6000:]
    return dict(zip(RUNS, json.loads((folder / "waits.json").read_text())))


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_for_logged_steps_alone(waits, name):
    first, *between, last = waits[name]  # the first one makes what later ones reuse
    assert len(between) == 3 and not any(between)
    assert any("in logging.py" in place for place in last), "what is counted would be seen"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RUNS)
def test_cuda_sees_no_wait_either(corpus, tmp_path, name, monkeypatch):
    """CUDA's own check raises at the first wait of the steps between the first and the last."""
    plain = main_ddp.distributed.seed_step

    def seed_and_watch(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        torch.cuda.set_sync_debug_mode("error" if 0 < step < QUIET["steps_per_epoch"] - 1 else "default")

    monkeypatch.setattr("engine.loop.seed_step", seed_and_watch)
    try:
        main_ddp.main(command(name, corpus, tmp_path))
    finally:
        torch.cuda.set_sync_debug_mode("default")
