"""All benchmarks one after the other, in one table: what, ours, what users would run instead, the ratio, the target.

    python -m benchmarks.all --output results/benchmarks/all.json

With --quick every benchmark takes its small settings; figures for RESULTS.md come from the full ones.
"""

import importlib

import jsonargparse

from benchmarks.results import Rows, benchmark_parser, chosen, command, table

# Modules with make_flags() (with --quick), run(flags) -> figures, and rows(figures) -> lines of the table.
BENCHMARKS = (
    *("volume_store", "store_building", "matching", "pairing", "embedding_storage", "embedding_speed"),
    *("pretrain_step", "step_overheads", "method_steps", "data_wait"),
)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = benchmark_parser(__doc__, "the small settings of every benchmark")
    parser.add_argument("--only", type=list[str], default=list(BENCHMARKS), help="names of the benchmarks to run")
    return parser


def run(flags: jsonargparse.Namespace) -> dict:
    """The figures of each benchmark, by its name."""
    found = {}
    for name in chosen(flags.only, BENCHMARKS, "--only"):
        print(f"{name} ...", flush=True)
        benchmark = importlib.import_module(f"benchmarks.{name}")
        found[name] = benchmark.run(benchmark.make_flags().parse_args(["--quick"] if flags.quick else []))
    return found


def rows(found: dict) -> Rows:
    """The lines of all benchmarks."""
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in found}
    return [line for name, figures in found.items() for line in modules[name].rows(figures)]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))
