"""Every method but Alice on a device that is not the CPU (`tests.other_device`): the CPU's losses, and runs in bf16."""

import math
from pathlib import Path

import pytest

from models.methods import METHODS
from tests.other_device import SET_UP
from tests.test_methods import small
from tests.test_other_device import losses, run_all
from tests.tiny_run import add_store_and_table, make_corpus

pytestmark = pytest.mark.skipif(SET_UP is None, reason="this PyTorch knows no devices written in Python (2.9 does)")
NAMES = [name for name in METHODS if name != "alice"]  # whose runs are those of test_other_device.py
RUNS = {"cpu": ("cpu", "fp32"), "other": ("cuda", "fp32"), "half": ("cuda", "bf16")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder of all runs, two steps each."""
    out = tmp_path_factory.mktemp("ran")
    corpus = add_store_and_table(make_corpus(out, 3, 0))
    runs = []
    for name in NAMES:
        for run, (device, precision) in RUNS.items():
            changed = {"device": device, "precision": precision, "epochs": 1, "warmup_epochs": 0}
            runs.append(("main_ddp", small(name, corpus, out / f"{name}_{run}", **changed)))
    run_all(runs, out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_the_cpus(ran, name):
    one, other = (losses(ran / f"{name}_{run}") for run in ("cpu", "other"))
    assert len(one) == 2 and other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_runs_with_the_casts_of_a_gpu(ran, name):
    in_half = losses(ran / f"{name}_half")
    assert len(in_half) == 2 and all(map(math.isfinite, in_half)) and in_half != losses(ran / f"{name}_other")
