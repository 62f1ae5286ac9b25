"""Faults on purpose, in their short version: runs end where a quiet one does, and bad inputs are refused by name."""

import json
import shutil

import pytest
import torch

from benchmarks import faults
from benchmarks.fault_kinds import inputs, runs
from benchmarks.fault_kinds.attempt import Attempt
from benchmarks.fault_kinds.toy import make_toy_corpus
from benchmarks.fault_kinds.trial import Plan, differences
from engine.checkpoint import LATEST

NUM_INPUTS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A work folder with the toy corpus."""
    folder = tmp_path_factory.mktemp("faults")
    make_toy_corpus(folder / "corpus")
    return folder


def test_a_run_with_a_fault_ends_with_the_bits_of_a_quiet_one(root):
    """A rank that dies in validation leaves the next process a look to catch up with."""
    plan = Plan(0, "dead rank in validation", "simsiam", 4, 1, 0.5)
    record = runs.run_plan(plan, root / "corpus", root / "runs")
    assert record["is_equal"] and record["problems"] == [], record


def test_one_bit_and_one_line_are_differences(root, tmp_path):
    quiet = runs.make_reference("simsiam", root / "corpus", root / "runs")
    for name in ("bit", "line", "nothing"):
        shutil.copytree(quiet, tmp_path / name)
    assert differences(tmp_path / "nothing", quiet) == []
    state = torch.load(tmp_path / "bit" / LATEST, weights_only=True)
    first = next(iter(state["student"]))
    state["student"][first].view(-1).view(torch.int32)[0] ^= 1
    torch.save(state, tmp_path / "bit" / LATEST)
    assert differences(tmp_path / "bit", quiet) == [f".student.{first}"]
    lines = (tmp_path / "line" / "log.txt").read_text().splitlines()
    last = next(number for number, line in enumerate(lines) if json.loads(line)["kind"] == "validation")
    (tmp_path / "line" / "log.txt").write_text("\n".join(lines[:last] + lines[last + 1 :]))
    found = differences(tmp_path / "line", quiet)
    assert len(found) == 1 and found[0].startswith('log: {"kind": "validation"')


def test_fifty_runs_hold_every_kind_three_times():
    plans = runs.draw_plans(50, seed=0)
    kinds = [plan.kind for plan in plans]
    assert min(kinds.count(kind) for kind in runs.KINDS) >= 3 and plans == runs.draw_plans(50, seed=0)
    assert len({plan.step for plan in plans}) > 5 and {plan.rank for plan in plans} == {0, 1}


def test_bad_inputs_are_refused_or_taken_for_what_they_are(root):
    drawn = inputs.draw_inputs(NUM_INPUTS, seed=0)
    assert {one.kind for one in drawn} == set(inputs.FAMILIES)
    records = [inputs.try_input(one, root / "corpus", root) for one in drawn]
    bad = [record for record in records if record["verdict"] not in inputs.GOOD_VERDICTS]
    assert bad == []
    assert sum(record["verdict"] == "refused" for record in records) > NUM_INPUTS / 2


@pytest.mark.parametrize(
    "code, printed, verdict",
    [
        (1, "error: a.nii.gz: truncated", "refused"),
        (1, "error: something is wrong", "unclear message"),
        (1, "error: a.nii.gz\n" + "more\n" * 30, "unclear message"),
        (1, "Traceback (most recent call last):\n  a.nii.gz\nKeyError", "traceback"),
        (-11, "a.nii.gz", "crash or hang"),
        ("hung", "a.nii.gz", "crash or hang"),
        (0, "", "silent"),
        (0, "it is right", "right"),
    ],
)
def test_verdicts(code, printed, verdict):
    attempt = Attempt("scripts.create_json", (), ("a.nii.gz",), lambda text: "right" in text)
    assert inputs.judge(attempt, code, printed) == verdict


def test_code_that_ran_counts_whatever_is_printed(tmp_path):
    (tmp_path / "ran").touch()
    assert inputs.judge(Attempt("x", (), ("a",), None, tmp_path / "ran"), 1, "error: a") == "code run"


def test_the_benchmark_counts_and_keeps_what_is_done(root, tmp_path, capsys):
    command = ["--num_runs=0", "--num_inputs=2", "--work_dir", str(root), "--output", str(tmp_path / "found.json")]
    faults.main(command)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_inputs"] == 2 and sum(found["verdicts"].values()) == 2 and found["num_runs"] == 0
    stamp = (root / "inputs/000.json").stat().st_mtime_ns
    faults.main(command)
    assert (root / "inputs/000.json").stat().st_mtime_ns == stamp
    counts = " | ".join(map(str, found["verdicts"].values()))
    assert capsys.readouterr().out.count(f"| all | {counts} |") == 2
