"""The two files of a correspondence table: what a row is, and how rows and header are read and checked.

- `correspondences.npy`: a structured array (`ROW_DTYPE`, 44 bytes a row) sorted by query case, memory-mapped;
- `correspondences.json`: the case names that the rows' indices stand for, the identity of the volume behind each case,
  where each case's rows begin, and where the table came from (`provenance`: whatever the miner states).

Format 2. Tables of format 1 know neither spreads nor identities; they are read with a warning.
"""

import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS_FILE = "correspondences.npy"
HEADER_FILE = "correspondences.json"
FORMAT_VERSION, OLD_FORMAT_VERSION = 2, 1
OLD_ROW_DTYPE = np.dtype(
    [
        ("query_case", "<i4"),
        ("key_case", "<i4"),
        ("query_mm", "<f4", (3,)),
        ("key_mm", "<f4", (3,)),
        ("score", "<f4"),
        ("cycle_mm", "<f4"),
    ]
)
ROW_DTYPE = np.dtype([*OLD_ROW_DTYPE.descr, ("spread_mm", "<f4")])
ROWS_PER_CHUNK = 1 << 18  # 11 MiB: one pass over a large table stays within bounded memory
MINE_AGAIN = "mine the table again (scripts/mine_pairs.py)"
# The type of each value in the header.
HEADER_TYPES = {
    "format_version": int,
    "num_rows": int,
    "rows_crc32": int,
    "case_names": list,
    "offsets": list,
    "provenance": dict,
}

logger = logging.getLogger(__name__)


def read_header(folder: Path) -> dict:
    """The header's values, each of the type that it should have; `sources` is empty in tables of format 1.

    Raises:
        ValueError: a file is missing, or the header is not one of a table.
    """
    path = folder / HEADER_FILE
    for file in (path, folder / ROWS_FILE):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; mine the table first (scripts/mine_pairs.py), or point --embed_dir at the "
                f"folder that holds {ROWS_FILE} and {HEADER_FILE}"
            )
    try:
        header = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); {MINE_AGAIN}") from error
    missing = sorted(set(HEADER_TYPES) - set(header)) if isinstance(header, dict) else sorted(HEADER_TYPES)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; it is not a correspondence table's header")
    version = header["format_version"]
    if version not in (FORMAT_VERSION, OLD_FORMAT_VERSION):
        raise ValueError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; {MINE_AGAIN}")
    if version == OLD_FORMAT_VERSION:
        header["sources"] = {}
        logger.warning(
            "%s: a table of format %d, which neither knows spreads (--max_spread_mm) nor the volumes that it was mined "
            "from; to have both, %s", path, version, MINE_AGAIN,
        )  # fmt: skip
    _check_types(header, path)
    return header


def _check_types(header: dict, path: Path) -> None:
    """Raise ValueError for values of another type than `HEADER_TYPES` says, and for names that stand there twice."""
    for name, wanted in {**HEADER_TYPES, "sources": dict}.items():
        if not isinstance(header.get(name), wanted):
            raise ValueError(
                f"{path}: {name} is {header.get(name)!r:.80}, expected {wanted.__name__}; {MINE_AGAIN}"
            )  # fmt: skip
    names, texts = header["case_names"], [*header["sources"].values()]
    if not all(isinstance(text, str) for text in names + texts):
        raise ValueError(f"{path}: case_names and sources must hold text; {MINE_AGAIN}")
    if not all(type(offset) is int for offset in header["offsets"]):
        raise ValueError(f"{path}: offsets must hold whole numbers; {MINE_AGAIN}")
    check_names(names, str(path))


def check_names(names: list[str], where: str) -> None:
    """Raise ValueError where there is no name, or one twice."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{where}: case_names must be at least one name, none of them twice")


def map_rows(path: Path) -> np.ndarray:
    """Memory-map the rows as they are in the file, of either format.

    Raises:
        ValueError: anything but rows of a table, or a file shorter than its own header says.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not readable as a NumPy array ({error}); {MINE_AGAIN}") from error
    if not isinstance(rows, np.ndarray):
        rows.close()
        raise ValueError(f"{path}: holds an archive of arrays (.npz), expected one array (.npy); {MINE_AGAIN}")
    if rows.dtype not in (ROW_DTYPE, OLD_ROW_DTYPE) or rows.ndim != 1:
        raise ValueError(
            f"{path}: expected a 1-D array with the fields {', '.join(ROW_DTYPE.names)}, got {rows.dtype} of shape "
            f"{rows.shape}; {MINE_AGAIN}"
        )
    return rows


def with_spread(rows: np.ndarray) -> np.ndarray:
    """Rows of format 1 as `ROW_DTYPE`, read into memory, their spread NaN; others as they are."""
    if rows.dtype == ROW_DTYPE:
        return rows
    wider = np.empty(len(rows), ROW_DTYPE)
    for name in OLD_ROW_DTYPE.names:
        wider[name] = rows[name]
    wider["spread_mm"] = np.nan
    wider.flags.writeable = False
    return wider


def checksum_of_rows(rows: np.ndarray) -> int:
    """CRC-32 of the rows' bytes: an older header beside newer rows, or a flipped bit, does not go unseen."""
    checksum = 0
    for _, chunk in chunks_of(rows):
        checksum = zlib.crc32(np.ascontiguousarray(chunk).view(np.uint8), checksum)
    return checksum


def chunks_of(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row index, rows) pieces of bounded size."""
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        yield start, rows[start : start + ROWS_PER_CHUNK]


def check_rows(rows: np.ndarray, offsets: np.ndarray, num_cases: int, where: str) -> None:
    """Raise unless rows are sorted by query case as `offsets` says, join two known cases and hold finite points."""
    if len(offsets) != num_cases + 1 or offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise ValueError(f"{where}: rows and case names do not fit together ({num_cases} cases)")
    for start, chunk in chunks_of(rows):
        position = np.arange(start, start + len(chunk))
        expected = np.searchsorted(offsets, position, side="right") - 1
        if (chunk["query_case"] != expected).any():
            raise ValueError(f"{where}: rows are not sorted by query case")
        if ((chunk["key_case"] < 0) | (chunk["key_case"] >= num_cases)).any():
            raise ValueError(f"{where}: a row's key_case lies outside of the {num_cases} cases")
        if (chunk["key_case"] == chunk["query_case"]).any():
            row = start + int(np.flatnonzero(chunk["key_case"] == chunk["query_case"])[0])
            raise ValueError(f"{where}: row {row} matches a case with itself")
        for name in ("query_mm", "key_mm", "score"):
            finite = np.isfinite(chunk[name]).reshape(len(chunk), -1).all(axis=1)
            if not finite.all():
                row = start + int(np.flatnonzero(~finite)[0])
                raise ValueError(f"{where}: row {row} holds a non-finite {name}")
