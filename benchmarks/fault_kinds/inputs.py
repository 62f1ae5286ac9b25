"""Bad inputs, drawn from all families, given to their entry points and judged."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_kinds import bad_checkpoints, bad_flags, bad_lists, bad_pickles, bad_tables, bad_volumes
from benchmarks.fault_kinds.attempt import LIMIT_S, Attempt, Faults, Good
from benchmarks.fault_kinds.processes import HUNG, start, wait_for

FAMILIES: dict[str, Faults] = {
    "CT file": bad_volumes.CT_FAULTS,
    "radiograph": bad_volumes.RADIOGRAPH_FAULTS,
    "data list": bad_lists.FAULTS,
    "table of pairs": bad_tables.TABLE_FAULTS,
    "embedding": bad_tables.EMBEDDING_FAULTS,
    "pickle": bad_pickles.FAULTS,
    "checkpoint": bad_checkpoints.FAULTS,
    "flag": bad_flags.FAULTS,
}
# refused: in a short message that names the file or the flag; right: taken for what it is. The others are faults.
GOOD_VERDICTS = ("refused", "right")
VERDICTS = (*GOOD_VERDICTS, "unclear message", "silent", "traceback", "crash or hang", "code run")
MOST_LINES = 12  # of a message


@dataclass(frozen=True)
class Drawn:
    """One bad input as it is drawn: its family, what is wrong with it, and the seed of how."""

    number: int
    kind: str
    fault: str
    seed: int


def draw_inputs(num_inputs: int, seed: int) -> list[Drawn]:
    """Families in turn, the faults of each in turn and in random order; a new fault changes its own family only."""
    rngs = {kind: random.Random(f"{seed} {kind}") for kind in FAMILIES}
    orders = {kind: rngs[kind].sample(list(faults), len(faults)) for kind, faults in FAMILIES.items()}
    drawn = []
    for number in range(num_inputs):
        kind = list(FAMILIES)[number % len(FAMILIES)]
        order = orders[kind]
        drawn.append(Drawn(number, kind, order[number // len(FAMILIES) % len(order)], rngs[kind].randrange(2**32)))
    return drawn


def try_input(drawn: Drawn, corpus: Path, root: Path) -> dict:
    """Make one bad input, give it to its entry point, and judge what happens; the record of it."""
    good, folder = Good.make(corpus, root / "good"), root / f"inputs/{drawn.number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attempt = FAMILIES[drawn.kind][drawn.fault](good, folder, random.Random(drawn.seed))
    output = folder / "output.txt"
    [code] = wait_for([start(attempt.module, attempt.words, output)], LIMIT_S)
    printed = output.read_text(errors="replace") if output.exists() else ""
    verdict = judge(attempt, code, printed)
    if verdict in GOOD_VERDICTS:
        shutil.rmtree(folder)
    return {
        "kind": drawn.kind,
        "fault": drawn.fault,
        "command": " ".join([attempt.module, *attempt.words]),
        "exit_code": code,
        "verdict": verdict,
        "printed": printed[-600:],
    }


def judge(attempt: Attempt, code: int | str, printed: str) -> str:
    """One of `VERDICTS`."""
    if attempt.marker is not None and attempt.marker.exists():
        return "code run"
    if code == HUNG or code < 0:
        return "crash or hang"
    if "Traceback (most recent call last)" in printed:
        return "traceback"
    if code == 0:
        return "right" if is_taken_right(attempt, printed) else "silent"
    is_named = any(name in printed for name in attempt.names)
    return "refused" if is_named and len(message_lines(printed.splitlines())) <= MOST_LINES else "unclear message"


def is_taken_right(attempt: Attempt, printed: str) -> bool:
    """Whether a command that refused nothing took its input for what it is, and wrote what can be read."""
    try:
        return attempt.is_right is not None and attempt.is_right(printed)
    except (ValueError, OSError, LookupError):
        return False


def message_lines(lines: Sequence[str]) -> list[str]:
    """Lines of a message: those from the first that speaks of an error on."""
    first = next((number for number, line in enumerate(lines) if "error" in line.lower()), 0)
    return list(lines[first:])
