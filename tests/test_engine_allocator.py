"""The allocator's thresholds, in processes of their own: they cannot be lowered again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device import SET_BY_USER

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAM = """
import resource, sys, torch
from engine.device import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "raised" else "left")
def faults(rounds, blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        [torch.ones(2**24) for _ in range(blocks)]  # 64 MiB each, freed together and at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for rounds, blocks in ((10, 1), (1, 20)):
    faults(rounds, blocks)
    print(faults(rounds, blocks))
"""


def answers(word: str, **variables: str) -> list[str]:
    """What the program prints: whether thresholds were raised, page faults of ten large tensors and of 20 at once."""
    kept = {name: value for name, value in os.environ.items() if name not in SET_BY_USER}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], cwd=REPOSITORY, env=kept | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_freed_block_is_used_again_without_page_faults():
    is_raised, again, together = answers("raised")
    _, anew, _ = answers("left")
    assert is_raised == "True"
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones where the kernel gives those.
    assert int(again) < 100 < int(anew)
    assert int(together) < 100, "what a step frees at its end was given back to the kernel"


def test_what_the_user_has_set_is_left_alone():
    assert answers("raised", MALLOC_TRIM_THRESHOLD_="65536")[0] == "False"
