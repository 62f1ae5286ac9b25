"""An entry point of milliseconds, for the tests of jobs: writes its words to a file, or fails when told to."""

import multiprocessing
import os
from pathlib import Path


def main(argv: list[str]) -> None:
    output, told = argv
    print(f"told {told}")
    if told == "fail":
        raise ValueError("it was told to fail")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with Path(output).open("a") as file:
        file.write(f"{told} {os.environ.get('COLOUR', 'none')} {os.getpid()} {multiprocessing.get_start_method()}\n")
