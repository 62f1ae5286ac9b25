"""Faults on purpose: runs that are killed, starved and lied to, and inputs that are damaged, wrong or hostile.

    python -m benchmarks.faults --output results/benchmarks/faults.json

Runs are real ones of main_ddp.py on two ranks, with toy networks and crops. Each meets a fault at a random step; the
damage is repaired as a user would repair it, and the same command is given again. It must end, on a CPU, with the very
bits of a run that nothing disturbed: weights, averages, optimiser, and the losses of all steps and validations.

Inputs are good files and command lines with one thing made wrong, given to the entry points that read them. A bad one
must be refused in a short message that names the file or the flag; whatever is taken must be taken for what it is. None
may run code.

What is done is kept in --work_dir, and is done again only for another commit. An hour on 2 CPU cores.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jsonargparse

from benchmarks.fault_kinds.inputs import GOOD_VERDICTS, VERDICTS, draw_inputs, try_input
from benchmarks.fault_kinds.runs import KINDS, draw_plans, run_plan
from benchmarks.fault_kinds.toy import make_toy_corpus
from benchmarks.results import benchmark_parser, command, table
from datasets.store.files import write_text
from engine.flags import git_commit

QUICK = {"num_runs": 3, "num_inputs": 40}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "three runs and forty inputs: to see that it runs")
    add = parser.add_argument
    add("--work_dir", type=str, default="results/faults", help="corpus, runs, and a record of each")
    add("--num_runs", type=int, default=50, help="runs with a fault; 0 = none")
    add("--num_inputs", type=int, default=500, help="bad inputs; 0 = none")
    add("--seed", type=int, default=0, help="draws faults, their steps, and inputs")
    return parser


def kept(path: Path, plan: dict, make: Callable[[], dict]) -> dict:
    """The record in a file, made first where it is of another plan or commit, or missing."""
    wanted = json.loads(json.dumps({"plan": plan, "commit": git_commit()}))
    found = json.loads(path.read_text()) if path.is_file() else {}
    if {name: found.get(name) for name in wanted} != wanted:
        found = wanted | {"record": make()}
        write_text(path, json.dumps(found, indent=1) + "\n")
    return found["record"]


def run(flags: jsonargparse.Namespace) -> dict:
    """Do what is missing, and count."""
    if flags.quick:
        for name, value in QUICK.items():
            setattr(flags, name, value)
    root = Path(flags.work_dir).resolve()
    corpus = make_toy_corpus(root / "corpus")
    runs, inputs = [], []
    for plan in draw_plans(flags.num_runs, flags.seed):
        record = kept(
            root / f"runs/{plan.number:03d}.json", asdict(plan), partial(run_plan, plan, corpus, root / "runs")
        )
        print(f"run {plan.number}: {plan.kind}, step {plan.step}: {describe_run(record)}", flush=True)
        runs.append(record)
    for given in draw_inputs(flags.num_inputs, flags.seed):
        record = kept(root / f"inputs/{given.number:03d}.json", asdict(given), partial(try_input, given, corpus, root))
        if record["verdict"] not in GOOD_VERDICTS:
            print(f"input {given.number}: {given.kind}: {record}", flush=True)
        inputs.append(record)
    return {
        "num_runs": len(runs),
        "num_equal": sum(record["is_equal"] for record in runs),
        "num_runs_with_problems": sum(bool(record["problems"]) for record in runs),
        "num_inputs": len(inputs),
        "verdicts": {verdict: sum(record["verdict"] == verdict for record in inputs) for verdict in VERDICTS},
        "runs": runs,
        "inputs": inputs,
    }


def describe_run(record: dict) -> str:
    """One line about a run."""
    end = "equal" if record["is_equal"] else f"NOT EQUAL ({'; '.join(record['differences'])})"
    problems = f"; PROBLEMS: {'; '.join(record['problems'])}" if record["problems"] else ""
    return f"{record['what']}; {end}, {record['seconds']:.0f} s{problems}"


def markdown(found: dict) -> str:
    """A line for each kind of fault, and one for each kind of input."""
    lines = []
    for kind in KINDS:
        of_kind = [record for record in found["runs"] if record["kind"] == kind]
        if of_kind:
            num_equal, num_bad = (sum(map(bool, (r[key] for r in of_kind))) for key in ("is_equal", "problems"))
            longest = max(record["seconds"] for record in of_kind)
            lines.append((kind, len(of_kind), num_equal, num_bad, f"{longest:.0f} s"))
    total = (found["num_runs"], found["num_equal"], found["num_runs_with_problems"], "")
    text = table([*lines, ("all", *total)], ("fault", "runs", "resumed run equal", "with problems", "longest"))
    kinds = sorted({record["kind"] for record in found["inputs"]})
    lines = [
        (kind, *(sum(r["kind"] == kind and r["verdict"] == verdict for r in found["inputs"]) for verdict in VERDICTS))
        for kind in kinds
    ]
    return f"{text}\n\n" + table([*lines, ("all", *found["verdicts"].values())], ("input", *VERDICTS))


main = command(__name__, make_flags, run, markdown)
