"""One run with a fault: its two ranks, what is found wrong with it, and how its end is compared with a quiet run's."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks.fault_kinds.processes import HUNG, start_ranks, wait_for
from benchmarks.fault_kinds.toy import toy_flags
from engine.checkpoint import LATEST, load_checkpoint

LIMIT_S = 600.0  # a toy run takes seconds, on a machine that many share minutes
UNLIKE = {"flags", "commit"}  # entries of a checkpoint that name folders, and the state of the code
NOT_COMPARED = ("samples_per_s", "data_wait_share")
COMPARED_KINDS = ("train", "validation")


@dataclass(frozen=True)
class Plan:
    """What is drawn for one run.

    Attributes:
        number: of the run.
        kind: of the fault.
        method: --method of the run.
        step: at which the fault comes, from 0.
        rank: that it meets.
        chance: 0 to 1; decides what else a kind has to choose.
    """

    number: int
    kind: str
    method: str
    step: int
    rank: int
    chance: float

    def choose(self, options: tuple) -> object:
        """One of the options, by `chance`."""
        return options[min(int(self.chance * len(options)), len(options) - 1)]


@dataclass
class Trial:
    """A run into `folder / "run"` that meets a fault; `words` is the command that a user repeats."""

    plan: Plan
    corpus: Path
    folder: Path
    changed: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    def start(self, prepare: tuple[Callable[[], None] | None, ...] = (None, None), **flags: object) -> list:
        """Start the command, perhaps with other flags and with something done to its ranks."""
        given = {"output_dir": self.run_dir} | self.changed | flags
        return start_ranks(toy_flags(self.plan.method, self.corpus, **given), self.output, prepare)

    def on_one_rank(self, prepare: Callable[[], None], other: Callable[[], None] | None = None) -> tuple:
        """For `start`: `prepare` on the plan's rank, `other` on the other one."""
        return (prepare, other) if self.plan.rank == 0 else (other, prepare)

    def end(self, ranks: list[BaseProcess], *expected: tuple, what: str = "the run") -> list[int | str]:
        """Wait for the ranks to end; exit codes other than one of the `expected` pairs are a problem."""
        codes = wait_for(ranks, LIMIT_S)
        self.expect(HUNG not in codes, f"{what} hung: {codes}")
        self.expect(not expected or tuple(codes) in expected, f"{what} ended with {codes}, expected {expected}")
        return codes

    def wait_for_step(self, ranks: list[BaseProcess], step: int) -> None:
        """Wait until the log has this many steps, or the run is over."""
        ends = time.monotonic() + LIMIT_S
        while self.logged_step() < step and any(rank.is_alive() for rank in ranks) and time.monotonic() < ends:
            time.sleep(0.01)

    def logged_step(self) -> int:
        """The last step in log.txt."""
        return max((line["step"] for line in log_lines(self.run_dir)), default=0)

    def saved_step(self) -> int:
        """The step of the latest checkpoint; 0 without one."""
        path = self.run_dir / LATEST
        return load_checkpoint(path)["step"] if path.exists() else 0

    def expect(self, is_right: bool, problem: str) -> None:
        """Note a problem unless all is right."""
        if not is_right:
            self.problems.append(problem)

    def said(self, *texts: str) -> bool:
        """Whether the ranks have printed all these texts so far."""
        printed = self.output.read_text() if self.output.exists() else ""
        return all(text in printed for text in texts)


def log_lines(run_dir: Path) -> list[dict]:
    """The whole lines of log.txt; none without it."""
    path = run_dir / "log.txt"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # a line in the making
            continue
    return lines


def differences(run_dir: Path, reference: Path, limit: int = 3) -> list[str]:
    """Where two runs' last checkpoints and logs differ, bit for bit; none = they are equal."""
    ours, theirs = (flat(load_checkpoint(folder / LATEST), UNLIKE) for folder in (run_dir, reference))
    found = [f"only one has {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [name for name in ours.keys() & theirs.keys() if not is_equal(ours[name], theirs[name])]
    our_log, their_log = decisive_log(run_dir), decisive_log(reference)
    found += [f"log: {line}" for line in their_log if line not in our_log]
    found += [f"log: not in the reference: {line}" for line in our_log if line not in their_log]
    if not found and our_log != their_log:
        found = ["log: lines stand in another order, or twice"]
    return [text[:200] for text in found[:limit]] + ([f"{len(found) - limit} more"] if len(found) > limit else [])


def decisive_log(run_dir: Path) -> list[str]:
    """Losses and schedules of every step and validation, without speeds.

    Means over an epoch are left out: after a stop in its midst they are over the rest of it.
    """
    lines = [line for line in log_lines(run_dir) if line["kind"] in COMPARED_KINDS]
    return [json.dumps({name: value for name, value in line.items() if name not in NOT_COMPARED}) for line in lines]


def flat(state, without: set[str] = frozenset(), prefix: str = "") -> dict:
    """Nested dicts, lists and tuples -> {dotted name: leaf}."""
    if not isinstance(state, dict | list | tuple):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    parts = [flat(value, prefix=f"{prefix}.{key}") for key, value in items if key not in without]
    return {name: leaf for part in parts for name, leaf in part.items()}


def is_equal(one, other) -> bool:
    """Equal type, shape and bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other
