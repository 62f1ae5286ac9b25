"""The correspondence table: which point of one case is the same anatomical place as which point of another.

Alice (ICCV 2023, figure 2) crops its two views around points that an anatomical embedding matched across patients. The
matches are mined once and kept as one table for the whole corpus, so that training reads neither embeddings nor whole
volumes. A table is a folder with two files (`datasets.samples.correspondence_files`).

Points are world millimetres (RAS+), scores lie in [-1, 1]. `cycle_mm` is the distance between a point and the match of
its match. `spread_mm` is how far the matches of the point's neighbours lie from where they should (median). Both are
NaN where nobody measured them.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.samples.correspondence_files import (
    FORMAT_VERSION,
    HEADER_FILE,
    MINE_AGAIN,
    ROW_DTYPE,
    ROWS_FILE,
    check_names,
    check_rows,
    checksum_of_rows,
    chunks_of,
    map_rows,
    read_header,
    with_spread,
)
from datasets.store.files import write_bytes, write_text
from datasets.store.format import checksum_of, is_same_volume

ANY_MM = 1e6  # a limit this large is off: it passes every row, also one that was not measured

logger = logging.getLogger(__name__)


def within(values_mm: np.ndarray, limit_mm: float) -> np.ndarray:
    """bool [N]: which values pass an upper limit. NaN (not measured) passes only a limit that is off (`ANY_MM`)."""
    return np.full(np.shape(values_mm), True) if limit_mm >= ANY_MM else np.asarray(values_mm) <= limit_mm


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
        sources: case name -> identity of the volume that its points were found in; without those not known.
        path: the table's folder, or None for a table in memory only.
    """

    case_names: list[str]
    offsets: np.ndarray
    provenance: dict = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    _rows: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The rows (`ROW_DTYPE`), a read-only memory map opened on first use in each process."""
        if self._rows is None:
            self._rows = with_spread(map_rows(self.path / ROWS_FILE))
        return self._rows

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getstate__(self) -> dict:
        # A pickled memory map would carry every row to every worker.
        return {**self.__dict__, "_rows": None if self.path is not None else self._rows}

    @classmethod
    def from_rows(
        cls,
        case_names: Sequence[str],
        rows: np.ndarray,
        provenance: dict | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> "CorrespondenceTable":
        """A table in memory; rows are sorted by query case (stable) and checked."""
        case_names = [str(name) for name in case_names]
        check_names(case_names, "correspondence table")
        if rows.dtype != ROW_DTYPE or rows.ndim != 1:
            raise ValueError(f"correspondence rows: expected a 1-D array of {ROW_DTYPE}, got {rows.dtype}")
        rows = rows[np.argsort(rows["query_case"], kind="stable")]
        offsets = np.searchsorted(rows["query_case"], np.arange(len(case_names) + 1)).astype(np.int64)
        check_rows(rows, offsets, len(case_names), "correspondence rows")
        known = {name: source for name, source in (sources or {}).items() if source}
        return cls(case_names, offsets, dict(provenance or {}), known, None, rows)

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
        header = read_header(folder)
        rows, offsets = map_rows(folder / ROWS_FILE), np.asarray(header["offsets"], dtype=np.int64)
        if len(rows) != header["num_rows"] or checksum_of_rows(rows) != header["rows_crc32"]:
            raise ValueError(
                f"{folder / ROWS_FILE}: its {len(rows)} rows are not those that {HEADER_FILE} describes "
                f"({header['num_rows']} rows); {MINE_AGAIN}"
            )
        check_rows(rows, offsets, len(header["case_names"]), str(folder / ROWS_FILE))
        return cls(header["case_names"], offsets, header["provenance"], header["sources"], folder, with_spread(rows))

    @classmethod
    def write(
        cls,
        path: str | Path,
        case_names: Sequence[str],
        rows: np.ndarray,
        provenance: dict,
        sources: Mapping[str, str] | None = None,
    ) -> "CorrespondenceTable":
        """Write a table into the folder `path`, replacing an older one only once the new one is complete.

        Args:
            path: folder, made when missing.
            case_names: names that the rows' case indices stand for.
            rows: `ROW_DTYPE` rows in any order.
            provenance: plain values that say where the rows come from (`spacing_mm`, `min_score`, ...).
            sources: case name -> identity of its volume (`CaseRecord.identity`), as far as known.

        Returns:
            the table, memory-mapped from the files just written.
        """
        table = cls.from_rows(case_names, rows, provenance, sources)
        folder = Path(path)
        buffer = io.BytesIO()
        np.save(buffer, table.rows)
        header = {
            "format_version": FORMAT_VERSION,
            "num_rows": len(table),
            "rows_crc32": checksum_of_rows(table.rows),
            "case_names": table.case_names,
            "sources": table.sources,
            "offsets": table.offsets.tolist(),
            "provenance": provenance,
        }
        text = json.dumps(header, indent=1) + "\n"  # fails before any file is touched
        write_bytes(folder / ROWS_FILE, buffer.getbuffer())
        write_text(folder / HEADER_FILE, text)
        return cls.load(folder)

    def digest(self) -> str:
        """Tables of the same cases and rows have the same, whatever their provenance."""
        return checksum_of(json.dumps([self.case_names, checksum_of_rows(self.rows)]).encode())

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

    def check_sources(self, identities: Mapping[str, str]) -> None:
        """Raise where the points of a case were found in another volume than the one that it has now.

        A corrected header or a swapped file moves the patient, and points inside of the volume need not show it.

        Args:
            identities: case name -> identity of its volume now (`CaseRecord.identity`).
        """
        same = {
            name: is_same_volume(self.sources[name], identity)
            for name, identity in identities.items()
            if name in self.sources
        }
        where = self.path or "correspondence table"
        if differ := [name for name, is_same in same.items() if is_same is False]:
            raise ValueError(
                f"{where}: {len(differ)} of its {len(self.case_names)} cases were mined from other files than the "
                f"store's, first {', '.join(differ[:5])}; embed and mine again from this --store_dir "
                "(scripts/generate_sam_embeddings.py, scripts/mine_pairs.py)"
            )

    def select(
        self,
        min_score: float = -np.inf,
        max_cycle_mm: float = ANY_MM,
        max_spread_mm: float = ANY_MM,
        allowed: np.ndarray | None = None,
        patients: np.ndarray | None = None,
    ) -> Selection:
        """The rows good enough to crop around.

        Args:
            min_score: lowest score that passes (-inf = every row).
            max_cycle_mm: largest cycle error in mm that passes (`ANY_MM` = every row, also those never measured).
            max_spread_mm: largest spread in mm that passes, likewise.
            allowed: bool [num_cases]; rows with either case outside of it are dropped. None = every case.
            patients: int [num_cases], a number for each case's patient; rows within one patient are dropped.
        """
        kept = []
        counts = np.zeros(len(self.case_names), dtype=np.int64)
        index_type = np.uint32 if len(self) < 2**32 else np.int64
        for start, chunk in chunks_of(self.rows):
            passing = chunk["score"] >= min_score
            passing &= within(chunk["cycle_mm"], max_cycle_mm) & within(chunk["spread_mm"], max_spread_mm)
            if allowed is not None:
                passing &= allowed[chunk["query_case"]] & allowed[chunk["key_case"]]
            if patients is not None:
                passing &= patients[chunk["query_case"]] != patients[chunk["key_case"]]
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
