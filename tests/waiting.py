"""Where the host waits for its device while it pretrains: in a process of its own, on `tests.other_device`.

    python -m tests.waiting RUNS.json WAITS.json

RUNS.json: [[argument of main_ddp.py, ...], ...]. WAITS.json: of each run, of each of its steps the places that waited.
"""

import json
import sys
from pathlib import Path

from tests import other_device


def main(runs: str, out: str) -> None:
    """Run them, and write down what each step waited for."""
    other_device.take_for_cuda()
    import engine.loop
    import main_ddp

    plain, found = engine.loop.seed_step, []

    def seed_and_split(*place: int) -> None:
        plain(*place)
        found[-1].append([])
        other_device.WAITS = found[-1][-1]

    engine.loop.seed_step = seed_and_split
    for words in json.loads(Path(runs).read_text()):
        print(" ".join(words), flush=True)
        found.append([])
        with other_device.Factories():
            main_ddp.main(words)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
