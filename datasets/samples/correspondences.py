"""The correspondence table: which point of one case is the same anatomical place as which point of another.

Alice (ICCV 2023, figure 2) crops its two views around points that an anatomical embedding matched across patients. The
matches are mined once and kept as one table for the whole corpus, so that training reads neither embeddings nor whole
volumes. A table is a folder with two files:

- `correspondences.npy`: a structured array (`ROW_DTYPE`, 40 bytes a row) sorted by query case, memory-mapped;
- `correspondences.json`: the case names that the rows' indices stand for, where each case's rows begin, and where the
  table came from (spacing, threshold, embedder: whatever the miner states under `provenance`).

Points are world millimetres (RAS+), scores lie in [-1, 1], `cycle_mm` is the distance between a point and the match of
its match (NaN where nobody measured it).
"""

import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.store.files import write_bytes, write_text
from datasets.store.format import checksum_of

ROWS_FILE = "correspondences.npy"
HEADER_FILE = "correspondences.json"
FORMAT_VERSION = 1
ROW_DTYPE = np.dtype(
    [
        ("query_case", "<i4"),
        ("key_case", "<i4"),
        ("query_mm", "<f4", (3,)),
        ("key_mm", "<f4", (3,)),
        ("score", "<f4"),
        ("cycle_mm", "<f4"),
    ]
)
_ROWS_PER_CHUNK = 1 << 18  # 10 MiB: one pass over a large table stays within bounded memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The rows of a table that pass the thresholds, grouped by query case.

    Attributes:
        rows: row indices into the table, sorted by query case.
        offsets: [num_cases + 1]; the rows of case c are `rows[offsets[c]:offsets[c + 1]]`.
    """

    rows: np.ndarray
    offsets: np.ndarray

    def of_case(self, case_index: int) -> np.ndarray:
        """Row indices of one query case (may be empty)."""
        return self.rows[self.offsets[case_index] : self.offsets[case_index + 1]]

    @property
    def num_per_case(self) -> np.ndarray:
        """Passing rows of each query case, int64 [num_cases]."""
        return np.diff(self.offsets)


@dataclass
class CorrespondenceTable:
    """One corpus-wide table of matched points, memory-mapped; make it with `load`, `write` or `from_rows`.

    Attributes:
        case_names: the names that `query_case` and `key_case` index.
        offsets: int64 [num_cases + 1]; rows `offsets[c]:offsets[c + 1]` have query case c.
        provenance: plain values stated by the miner (spacing_mm, min_score, seed, embedder, ...).
        path: the table's folder, or None for a table in memory only.
    """

    case_names: list[str]
    offsets: np.ndarray
    provenance: dict = field(default_factory=dict)
    path: Path | None = None
    _rows: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The rows (`ROW_DTYPE`), a read-only memory map opened on first use in each process."""
        if self._rows is None:
            self._rows = _map_rows(self.path / ROWS_FILE)
        return self._rows

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getstate__(self) -> dict:
        # A pickled memory map would carry every row to every worker.
        return {**self.__dict__, "_rows": None if self.path is not None else self._rows}

    @classmethod
    def from_rows(
        cls, case_names: Sequence[str], rows: np.ndarray, provenance: dict | None = None
    ) -> "CorrespondenceTable":
        """A table in memory; rows are sorted by query case (stable) and checked."""
        case_names = [str(name) for name in case_names]
        if not case_names or len(set(case_names)) != len(case_names):
            raise ValueError("correspondence table: case_names must be at least one name, none of them twice")
        if rows.dtype != ROW_DTYPE or rows.ndim != 1:
            raise ValueError(f"correspondence rows: expected a 1-D array of {ROW_DTYPE}, got {rows.dtype}")
        rows = rows[np.argsort(rows["query_case"], kind="stable")]
        offsets = np.searchsorted(rows["query_case"], np.arange(len(case_names) + 1)).astype(np.int64)
        _check_rows(rows, offsets, len(case_names), "correspondence rows")
        return cls(case_names, offsets, dict(provenance or {}), None, rows)

    @classmethod
    def load(cls, path: str | Path) -> "CorrespondenceTable":
        """Open a table and check it (one pass over the rows in bounded memory).

        Args:
            path: the folder that holds both files, or one of the two files.

        Raises:
            ValueError: a file is missing or damaged, or the two files do not belong together.
        """
        folder = Path(path)
        folder = folder.parent if folder.name in (ROWS_FILE, HEADER_FILE) else folder
        header = _read_header(folder)
        offsets = np.asarray(header["offsets"], dtype=np.int64)
        table = cls(list(header["case_names"]), offsets, dict(header["provenance"]), folder)
        if len(table.rows) != header["num_rows"] or _checksum(table.rows) != header["rows_crc32"]:
            raise ValueError(
                f"{folder / ROWS_FILE}: its {len(table.rows)} rows are not those that {HEADER_FILE} describes "
                f"({header['num_rows']} rows); mine the table again (scripts/mine_pairs.py)"
            )
        _check_rows(table.rows, offsets, len(table.case_names), str(folder / ROWS_FILE))
        return table

    @classmethod
    def write(
        cls, path: str | Path, case_names: Sequence[str], rows: np.ndarray, provenance: dict
    ) -> "CorrespondenceTable":
        """Write a table into the folder `path`, replacing an older one only once the new one is complete.

        Args:
            path: folder, made when missing.
            case_names: names that the rows' case indices stand for.
            rows: `ROW_DTYPE` rows in any order.
            provenance: plain values that say where the rows come from (`spacing_mm`, `min_score`, ...).

        Returns:
            the table, memory-mapped from the files just written.
        """
        table = cls.from_rows(case_names, rows, provenance)
        folder = Path(path)
        buffer = io.BytesIO()
        np.save(buffer, table.rows)
        header = {
            "format_version": FORMAT_VERSION,
            "num_rows": len(table),
            "rows_crc32": _checksum(table.rows),
            "case_names": table.case_names,
            "offsets": table.offsets.tolist(),
            "provenance": provenance,
        }
        text = json.dumps(header, indent=1) + "\n"  # fails before any file is touched
        write_bytes(folder / ROWS_FILE, buffer.getbuffer())
        write_text(folder / HEADER_FILE, text)
        return cls.load(folder)

    def digest(self) -> str:
        """Tables of the same cases and rows have the same, whatever their provenance."""
        return checksum_of(json.dumps([self.case_names, _checksum(self.rows)]).encode())

    def check_cases(self, known_names: Sequence[str], where: str = "the volume store") -> None:
        """Warn of cases that `known_names` lacks, naming up to five; raise where they are more than half of all.

        A few cannot be read or were taken out, and their rows need not be used; most means a table of other data.
        """
        known = set(known_names)
        strangers = [name for name in self.case_names if name not in known]
        if not strangers:
            return
        shown = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        message = (
            f"{self.path or 'correspondence table'}: {len(strangers)} of its {len(self.case_names)} cases are not in "
            f"{where} ({shown})"
        )
        if 2 * len(strangers) > len(self.case_names):
            raise ValueError(
                f"{message}; mine again from this store (scripts/mine_pairs.py) or change --store_dir / --embed_dir"
            )
        logger.warning("%s; their rows are not used", message)

    def select(
        self, min_score: float = -np.inf, max_cycle_mm: float = np.inf, allowed: np.ndarray | None = None
    ) -> Selection:
        """The rows good enough to crop around.

        Args:
            min_score: lowest score that passes (-inf = every row).
            max_cycle_mm: largest cycle error in mm that passes (inf = every row, also those never measured).
            allowed: bool [num_cases]; rows with either case outside of it are dropped. None = every case.
        """
        kept = []
        counts = np.zeros(len(self.case_names), dtype=np.int64)
        index_type = np.uint32 if len(self) < 2**32 else np.int64
        for start, chunk in _chunks(self.rows):
            passing = chunk["score"] >= min_score
            if not np.isposinf(max_cycle_mm):  # else also those never measured, whose error is NaN
                passing &= chunk["cycle_mm"] <= max_cycle_mm
            if allowed is not None:
                passing &= allowed[chunk["query_case"]] & allowed[chunk["key_case"]]
            kept.append((np.flatnonzero(passing) + start).astype(index_type))
            counts += np.bincount(chunk["query_case"][passing], minlength=len(counts))
        rows = np.concatenate(kept) if kept else np.zeros(0, index_type)
        return Selection(rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def summary(self) -> dict:
        """Plain counts for logs: rows, and how they spread over cases."""
        per_case = np.diff(self.offsets)
        return {
            "num_rows": len(self),
            "num_cases": len(self.case_names),
            "num_cases_without_rows": int((per_case == 0).sum()),
            "rows_per_case_min": int(per_case.min()),
            "rows_per_case_median": float(np.median(per_case)),
            "rows_per_case_max": int(per_case.max()),
            "mean_score": float(self.rows["score"].mean(dtype=np.float64)) if len(self) else 0.0,
        }


def _checksum(rows: np.ndarray) -> int:
    """CRC-32 of the rows' bytes: an older header beside newer rows, or a flipped bit, does not go unseen."""
    checksum = 0
    for _, chunk in _chunks(rows):
        checksum = zlib.crc32(np.ascontiguousarray(chunk).view(np.uint8), checksum)
    return checksum


def _chunks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row index, rows) pieces of bounded size."""
    for start in range(0, len(rows), _ROWS_PER_CHUNK):
        yield start, rows[start : start + _ROWS_PER_CHUNK]


def _read_header(folder: Path) -> dict:
    """The header's values, with every key that `load` needs."""
    path = folder / HEADER_FILE
    for file in (path, folder / ROWS_FILE):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; mine the table first (scripts/mine_pairs.py), or point --embed_dir at the "
                f"folder that holds {ROWS_FILE} and {HEADER_FILE}"
            )
    try:
        header = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); mine the table again") from error
    wanted = {"format_version", "num_rows", "rows_crc32", "case_names", "offsets", "provenance"}
    missing = sorted(wanted - set(header)) if isinstance(header, dict) else sorted(wanted)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; it is not a correspondence table's header")
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {header['format_version']}, this code reads {FORMAT_VERSION}; mine the table again"
        )
    return header


def _map_rows(path: Path) -> np.ndarray:
    """Memory-map the rows, refusing anything but `ROW_DTYPE` and files shorter than their own header says."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not readable as a NumPy array ({error}); mine the table again") from error
    if rows.dtype != ROW_DTYPE or rows.ndim != 1:
        raise ValueError(
            f"{path}: expected a 1-D array with the fields {', '.join(ROW_DTYPE.names)}, got {rows.dtype} of shape "
            f"{rows.shape}; mine the table again"
        )
    return rows


def _check_rows(rows: np.ndarray, offsets: np.ndarray, num_cases: int, where: str) -> None:
    """Raise unless the rows are sorted by query case as `offsets` says, index known cases, and hold finite points."""
    if len(offsets) != num_cases + 1 or offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise ValueError(f"{where}: rows and case names do not fit together ({num_cases} cases)")
    for start, chunk in _chunks(rows):
        position = np.arange(start, start + len(chunk))
        expected = np.searchsorted(offsets, position, side="right") - 1
        if (chunk["query_case"] != expected).any():
            raise ValueError(f"{where}: rows are not sorted by query case")
        if ((chunk["key_case"] < 0) | (chunk["key_case"] >= num_cases)).any():
            raise ValueError(f"{where}: a row's key_case lies outside of the {num_cases} cases")
        for name in ("query_mm", "key_mm", "score"):
            finite = np.isfinite(chunk[name]).reshape(len(chunk), -1).all(axis=1)
            if not finite.all():
                row = start + int(np.flatnonzero(~finite)[0])
                raise ValueError(f"{where}: row {row} holds a non-finite {name}")
