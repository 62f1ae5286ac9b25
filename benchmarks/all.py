"""All benchmarks one after the other, in one table: what, ours, what users would run instead, the ratio, the target.

    python -m benchmarks.all --quick
    python -m benchmarks.all --output results/benchmarks/all.json

With --quick every benchmark takes its small settings; figures for RESULTS.md come from the full ones.
"""

import jsonargparse

from benchmarks import (
    data_wait,
    embedding_speed,
    embedding_storage,
    matching,
    pairing,
    pretrain_step,
    step_overheads,
    store_building,
    volume_store,
)
from benchmarks.results import save
from engine.flags import add_switch, make_parser, run_main

# A benchmark is a module with make_flags() (with --quick), run(flags) -> figures, and rows(figures) -> table lines.
BENCHMARKS = {
    "volume_store": volume_store,
    "store_building": store_building,
    "matching": matching,
    "pairing": pairing,
    "embedding_storage": embedding_storage,
    "embedding_speed": embedding_speed,
    "pretrain_step": pretrain_step,
    "step_overheads": step_overheads,
    "data_wait": data_wait,
}
HEADER = ("what", "ours", "beside", "ratio", "wanted")


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_switch(parser, "--quick", False, "the small settings of every benchmark")
    parser.add_argument("--only", type=list[str], default=list(BENCHMARKS), help="names of the benchmarks to run")
    parser.add_argument("--output", type=str, default=None, help="JSON file for the results, one entry a benchmark")
    return parser


def table(lines: list[tuple[str, ...]]) -> str:
    """Lines in columns as wide as their longest entry, first line = header."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ["  ".join(entry.ljust(width) for entry, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *padded[1:]])


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    strangers = sorted(set(flags.only) - set(BENCHMARKS))
    if strangers:
        raise ValueError(f"--only names {', '.join(strangers)}; choose from {', '.join(BENCHMARKS)}")
    found, lines = {}, [HEADER]
    for name in flags.only:
        print(f"{name} ...", flush=True)
        benchmark = BENCHMARKS[name]
        found[name] = benchmark.run(benchmark.make_flags().parse_args(["--quick"] if flags.quick else []))
        lines += benchmark.rows(found[name])
    print(table(lines))
    save(found, flags.output)


if __name__ == "__main__":
    run_main(main)
