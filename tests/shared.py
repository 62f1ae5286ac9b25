"""Where reference data (golden numbers, real CT) lie: `$ALICE_SHARED`, or `shared/` beside the clone. Optional."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ALICE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_file(*parts: str) -> Path:
    """The path of one reference file; the calling test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference file {'/'.join(parts)} is not here (set ALICE_SHARED)")
    return path


needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="reference data are not here (set ALICE_SHARED)")
