"""What benchmarks do with their figures at the end."""

import json
from types import ModuleType

from datasets.store.files import write_text


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
