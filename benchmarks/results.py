"""What benchmarks share: where real CT lies, timing, and what is done with the figures at the end."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jsonargparse

from datasets.store.files import write_text
from engine.flags import REPOSITORY, add_switch, make_parser


def real_ct_dir() -> Path:
    """Where the tests look for real CT: `$ALICE_SHARED/ct`, or `shared/ct` beside the clone."""
    return Path(os.environ.get("ALICE_SHARED", REPOSITORY.parent / "shared")) / "ct"


class Timed(NamedTuple):
    """Results of several calls, and the medians of their wall and CPU seconds."""

    results: list
    wall_s: float
    cpu_s: float


def timed(run: Callable, arguments: Sequence) -> Timed:
    """One call for each argument. CPU time (all threads) shows what a busy machine hides."""
    results, wall_s, cpu_s = [], [], []
    for argument in arguments:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        results.append(run(argument))
        wall_s.append(time.perf_counter() - begin)
        cpu_s.append(time.process_time() - begin_cpu)
    return Timed(results, statistics.median(wall_s), statistics.median(cpu_s))


def benchmark_parser(description: str, quick: str) -> jsonargparse.ArgumentParser:
    """A parser with --output and --quick, whose help is `quick`; add a benchmark's own flags."""
    parser = make_parser(description)
    add_switch(parser, "--quick", False, quick)
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for the results")
    return parser


def save(found: dict, output: str | None) -> None:
    """Write the figures to `--output`, where it is given."""
    if output:
        write_text(output, json.dumps(found, indent=1) + "\n")


def show_and_save(found: dict, rows: list[tuple[str, ...]], output: str | None) -> None:
    """Print the lines of the table, and save the figures."""
    for row in rows:
        print(" | ".join(row))
    save(found, output)


def measure_and_show(benchmark: ModuleType, argv: list[str] | None) -> None:
    """All of a benchmark's command, by its `make_flags`, `run` and `rows`."""
    flags = benchmark.make_flags().parse_args(argv)
    found = benchmark.run(flags)
    show_and_save(found, benchmark.rows(found), flags.output)
