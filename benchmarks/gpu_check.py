"""All that only a GPU can show, in at most nine minutes on one: tests, speed, memory, data, every method.

    python -m benchmarks.gpu_check                       # all parts; scripts/gpu_check.sh finds the environment first
    python -m benchmarks.gpu_check --part 2              # one part, at most four minutes
    python -m benchmarks.gpu_check --rehearse            # toy sizes, on a CPU too: does everything run?

Part 1: the tests with the marker `gpu`; Alice's step with each speed flag beside MONAI's form, in one process (see
`benchmarks.pretrain_step`); the compiled step. Part 2: how long a step waits for data (see `benchmarks.data_wait`).
Part 3: 200 steps of every method in bf16 on phantoms, whose loss must fall, and a profile of its step.

Each item runs in a process of its own with a time limit. One that fails or takes too long is listed at the end, and the
others run; the exit code is then 1. OUTPUT_DIR receives NAME.log and NAME.json of each item, gpu_check.json with all
figures, and gpu_check.md, tables for RESULTS.md. Both are written after each item. A later call in the same folder adds
its items to those of the same commit and machine.
"""

import functools
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import jsonargparse
import torch

from benchmarks.gpu_parts import items, methods
from benchmarks.gpu_parts.apart import Item, run_apart
from benchmarks.gpu_parts.report import markdown
from datasets.store.files import write_text
from engine.flags import add_switch, git_commit, make_parser, run_main
from engine.signals import exiting_when_asked
from models.methods import METHODS

PARTS = (1, 2, 3)
PART_LIMIT_S, ALL_LIMIT_S = 230.0, 520.0  # some seconds less than promised, for the imports of this process
METHODS_LIMIT_S = 225.0  # of all methods together
REHEARSAL_LIMIT_S = 600.0  # of each item: a busy CPU is no mistake
MACHINE = Item("machine", 1, 60, items.machine)
TESTS_AND_STEP = (
    Item("gpu_tests", 1, 40, items.gpu_tests),
    Item("step", 1, 120, items.step),
    Item("compile", 1, 90, items.compiled_step),
)
CORPUS = Item("corpus", 2, 60, items.corpus)
DATA_WAIT = Item("data_wait", 2, 110, items.waiting)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--part", type=int | None, default=None, help="1 = tests and step, 2 = data, 3 = methods; unset = all")
    add("--output_dir", type=str, default="results/gpu_check", help="figures, tables and logs")
    add_switch(parser, "--rehearse", False, "toy sizes, on a CPU where there is no GPU")
    return parser


def plan(parts: Sequence[int]) -> list[Item]:
    """The items of some parts, in order. The machine comes first; trainings need the corpus."""
    limit_s = METHODS_LIMIT_S / len(METHODS)
    runs = [Item(f"method_{name}", 3, limit_s, functools.partial(methods.method_run, name)) for name in METHODS]
    by_part = {1: TESTS_AND_STEP, 2: (CORPUS, DATA_WAIT), 3: (CORPUS, *runs)}
    chosen = [item for part in parts for item in by_part[part]]
    return list(dict.fromkeys([MACHINE, *chosen]))


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if flags.part not in (None, *PARTS):
        raise ValueError(f"--part {flags.part}: expected one of {', '.join(map(str, PARTS))}, or nothing for all")
    if not flags.rehearse and not torch.cuda.is_available():
        raise ValueError(
            "PyTorch sees no CUDA device here, and this command measures one. Run it on a machine with a GPU, or add "
            "--rehearse to try everything at toy size on the CPU"
        )
    output_dir = Path(flags.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    parts, limit_s = ((flags.part,), PART_LIMIT_S) if flags.part else (PARTS, ALL_LIMIT_S)
    with exiting_when_asked():
        found = check(plan(parts), limit_s, flags.rehearse, output_dir)
    print(f"\n{markdown(found)}")
    failed = [name for name, item in found["items"].items() if item["error"]]
    if failed:
        logs = "\n".join(f"  {name}: {output_dir / name}.log" for name in failed)
        raise SystemExit(f"\n{len(failed)} of {len(found['items'])} items failed:\n{logs}")


def check(planned: Sequence[Item], limit_s: float, is_rehearsal: bool, output_dir: Path) -> dict:
    """Run the items one after the other; write the results after each.

    Args:
        limit_s: seconds of all items together; a rehearsal has no limits but `REHEARSAL_LIMIT_S` for each.

    Returns:
        `about`, and `items`: by name `part`, `seconds`, `figures`, `error`.
    """
    found: dict = {}
    ends, part_ends = time.monotonic() + limit_s, {}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for item in planned:
            now = time.monotonic()
            part_ends.setdefault(item.part, now + PART_LIMIT_S)
            left_s = REHEARSAL_LIMIT_S if is_rehearsal else min(item.limit_s, part_ends[item.part] - now, ends - now)
            result = {"part": item.part} | run_apart(item, left_s, Path(folder), is_rehearsal, output_dir)
            print(f"{result['seconds']:4.0f} s  {item.name}  {result['error'] or 'done'}", flush=True)
            if item.name == MACHINE.name:
                found = {"about": describe(result["figures"], is_rehearsal), "items": {}}
                found["items"] = earlier_items(output_dir / "gpu_check.json", found["about"])
            found["items"][item.name] = result
            write_text(output_dir / "gpu_check.json", json.dumps(found, indent=1) + "\n")
            write_text(output_dir / "gpu_check.md", markdown(found) + "\n")
    return found


def describe(machine: dict, is_rehearsal: bool) -> dict:
    """What the figures belong to.

    Args:
        machine: figures of the item of this name; empty where it failed.
    """
    unknown = dict.fromkeys(("device", "cuda", "torch", "python", "num_cpus"))
    today = datetime.now(timezone.utc).date().isoformat()
    return unknown | machine | {"commit": git_commit(), "is_rehearsal": is_rehearsal, "date": today}


def earlier_items(path: Path, about: dict) -> dict:
    """The items of an earlier call whose figures belong to the same commit and machine; else none."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text())
    is_same = all(earlier["about"].get(name) == value for name, value in about.items() if name != "date")
    return earlier["items"] if is_same else {}


if __name__ == "__main__":
    run_main(main)
