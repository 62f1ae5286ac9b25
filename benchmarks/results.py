"""What benchmarks share: their command, tables, timing, memory, and calls of other commands. Needs no PyTorch."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jsonargparse

from datasets.store.files import write_text
from engine.flags import REPOSITORY, RunInfo, add_switch, flags_as_dict, git_commit, make_parser, run_main

HEADER = ("what", "ours", "beside", "ratio", "wanted")
Rows = list[tuple[str, str, str, str, str]]  # lines under HEADER
PROCESS_STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def real_ct_dir() -> Path:
    """Where the tests look for real CT: `$ALICE_SHARED/ct`, or `shared/ct` beside the clone."""
    return Path(os.environ.get("ALICE_SHARED", REPOSITORY.parent / "shared")) / "ct"


# A benchmark's command


def benchmark_parser(
    description: str, quick: str = "", device: bool = False, num_threads: int = 0
) -> jsonargparse.ArgumentParser:
    """A parser with --output and --markdown, and where asked for --quick (with this help), --device, --num_threads."""
    parser = make_parser(description)
    add = parser.add_argument
    if quick:
        add_switch(parser, "--quick", False, quick)
    if device:
        add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA if any")
    if num_threads:
        add("--num_threads", type=int, default=num_threads, help="threads of PyTorch, for every way")
    add("--output", type=str | None, default=None, help="JSON file for the results")
    add("--markdown", type=str | None, default=None, help="file for what is printed at the end")
    return parser


def chosen(given: Iterable[str], known: Sequence[str], flag: str) -> list[str]:
    """The names given with a flag, in the order of `known`.

    Raises:
        ValueError: a name that is not known, or none.
    """
    given = [name.strip() for name in given if name.strip()]
    strangers = [name for name in given if name not in known]
    if strangers or not given:
        raise ValueError(f"{flag} names {', '.join(strangers) or 'nothing'}: expected some of {', '.join(known)}")
    return [name for name in known if name in given]


def command(
    module: str,
    make_flags: Callable[[], jsonargparse.ArgumentParser],
    run: Callable[[jsonargparse.Namespace], dict],
    describe: Callable[[dict], str],
) -> Callable[[list[str] | None], None]:
    """`main(argv)` of a benchmark: measure, print, and write what --output and --markdown name.

    Args:
        module: the benchmark's `__name__`; the one that `python -m` was asked for starts at once.
        run: flags -> figures; none = there was nothing to measure.
        describe: figures -> what is printed.
    """

    def main(argv: list[str] | None = None) -> None:
        flags = make_flags().parse_args(argv)
        found = run(flags)
        if not found:
            return
        text = describe(found)
        print(text)
        if flags.markdown:
            write_text(flags.markdown, text + "\n")
        if flags.output:
            write_text(flags.output, json.dumps(found | {"commit": git_commit()}, indent=1) + "\n")
            RunInfo.collect(flags).write_beside(flags.output)

    if module == "__main__":
        run_main(main)
    return main


def table(lines: Iterable[Sequence[object]], header: Sequence[str] = HEADER) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


# Other commands


def words(**flags: object) -> tuple[str, ...]:
    """Flags as words of a command line; lists and tuples as several words, None not at all."""
    made: list[str] = []
    for name, value in flags.items():
        if value is not None:
            made += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return tuple(made)


def run_command(module: str, arguments: Sequence[str], limit_s: float | None = None) -> None:
    """Run a module of this repository in a process of its own.

    Raises:
        RuntimeError: it failed, and the message ends with what it said last; or it took longer than `limit_s`.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{module} failed: {'; '.join(lines[-3:])}"[-600:])


def measure_apart(module: str, flags: jsonargparse.Namespace, limit_s: float | None = None, **changed: object) -> dict:
    """The figures of a benchmark that runs in a process of its own, with some flags changed."""
    with tempfile.TemporaryDirectory() as folder:
        changed |= {"output": f"{folder}/found.json", "markdown": None}
        run_command(module, words(**flags_as_dict(flags) | changed), limit_s)
        return json.loads(Path(changed["output"]).read_text())


# Time and memory


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


def reset_peak_resident() -> None:
    """Let the peak of this process's memory begin anew (Linux; elsewhere nothing happens)."""
    if PEAK_RESET.exists():
        PEAK_RESET.write_text("5")


def resident_bytes(peak: bool = False) -> int | None:
    """Memory of this process, now or its peak since the last reset, bytes; None where it cannot be known."""
    if not PROCESS_STATUS.exists():
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
