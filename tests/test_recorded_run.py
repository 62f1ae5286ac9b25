"""The loss curve of a seeded CPU run, against the one that is recorded in recorded_run.json.

A change that should not change training leaves it alone. After a change that should, record anew, and say why in the
commit:

    OMP_NUM_THREADS=1 python -m tests.test_recorded_run

The record holds the value of every flag, so that other defaults change nothing here.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

import main_ddp
from engine.flags import flags_as_dict, git_commit
from tests.launched import SMALLEST
from tests.tiny_run import TINY, add_store_and_table, arguments, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
RECORD = Path(__file__).with_name("recorded_run.json")
TERMS = ("loss", "loss_cls", "loss_tokens", "loss_recon")
PATHS = ("data_dir", "json_list", "embed_dir", "table_file", "store_dir", "output_dir", "checkpoint_file")
# What the run is: every objective on, two parts a step, two epochs. The rate is low, so that rounding stays rounding.
CHANGED = {
    **{"method": "alice", "pairing": "sam", "epochs": 2, "steps_per_epoch": 3, "batch_size": 2, "accumulate_steps": 2},
    **{"lambda1": 1.0, "lambda2": 1.0, "lambda3": 10.0, "freeze_last_layer": 0.34, "lr": 1e-4},
}
RTOL = 1e-5


def flags_to_record() -> dict:
    """Every flag of main_ddp.py with its value today, but for the paths."""
    words = [f"--{name}={value}" for name, value in (TINY | SMALLEST | CHANGED).items()]
    flags = flags_as_dict(main_ddp.make_flags("alice").parse_args(words))
    return {name: value for name, value in flags.items() if name not in PATHS}


def losses(flags: dict, folder: Path) -> list[dict[str, float]]:
    """The terms of each step of a run with these flags on its own few volumes."""
    corpus = add_store_and_table(make_corpus(folder))
    (folder / "run.yaml").write_text(json.dumps(flags))  # JSON is YAML
    paths = arguments(corpus, folder / "run")[len(TINY) :]
    main_ddp.main(["--config", str(folder / "run.yaml"), *paths])
    return [{name: line[name] for name in TERMS} for line in log_of(folder / "run")]


def test_the_loss_curve_is_the_recorded_one(tmp_path):
    record = json.loads(RECORD.read_text())
    curve = losses(record["flags"], tmp_path)
    assert len(curve) == len(record["steps"]) == 6
    for step, (ours, expected) in enumerate(zip(curve, record["steps"]), start=1):
        assert ours == pytest.approx(expected, rel=RTOL), f"step {step}; see this file's docstring"


def test_the_record_is_of_a_run_that_trains_every_objective():
    record = json.loads(RECORD.read_text())
    assert {name: record["flags"][name] for name in CHANGED} == CHANGED
    assert record["commit"] and "tests.test_recorded_run" in record["record_anew"]
    curves = {name: [step[name] for step in record["steps"]] for name in TERMS}
    assert all(len(set(values)) == len(values) for values in curves.values())
    assert curves["loss_recon"][-1] < curves["loss_recon"][0]


def record() -> None:
    """Write recorded_run.json anew."""
    torch.set_num_threads(1)
    flags = flags_to_record()
    with tempfile.TemporaryDirectory() as folder:
        curve = losses(flags, Path(folder))
    content = {
        "commit": git_commit(),
        "record_anew": "OMP_NUM_THREADS=1 python -m tests.test_recorded_run",
        "flags": flags,
        "steps": curve,
    }
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
