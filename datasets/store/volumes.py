"""The volume store: every case in one compressed, chunked file from which a random crop is read in milliseconds.

Nothing here keeps a file open, so a `VolumeStore` can be pickled, forked and shared by DataLoader workers freely, its
memory stays flat however many cases are read, and Blosc2 starts no threads for it. The layout on disk is in
`datasets.store.format`; `build_store` (from `datasets.store.build`) makes a store.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.ct.file_checks import SPACING_RANGE_MM
from datasets.ct.images import CT, MR, RADIOGRAPH
from datasets.ct.intensity import CT_WINDOW_HU, MR_RANGE, fill_ends
from datasets.ct.nifti import Volume
from datasets.lists.data_list import Case
from datasets.store.arrays import read_region
from datasets.store.build import BuildReport, build_store, kind_to_store
from datasets.store.format import (
    ARRAY,
    LABEL,
    CaseRecord,
    StoreError,
    case_file,
    check_kind,
    check_spacing,
    read_records,
    read_settings,
    spacing_text,
    stored_mr_percentiles,
)
from datasets.store.sources import clash_message, has_another_size, is_current, is_of_another_file

# Of a store of CT that an entry point starts, unless its user says otherwise. Radiographs keep their own.
DEFAULT_SPACING_MM = (2.0, 1.5, 1.5)
DEFAULT_WINDOW = {CT: CT_WINDOW_HU, RADIOGRAPH: (None, None), MR: MR_RANGE}


def parse_spacing(words: Sequence[str | float] | str | None) -> tuple[float, float, float] | None:
    """The value of a `--spacing_mm` flag: `native` -> None, one length -> isotropic, three -> (D, H, W) in mm."""
    words = [words] if isinstance(words, str | float | int) else list(words or ["native"])
    if [str(word) for word in words] == ["native"]:
        return None
    try:
        lengths = [float(word) for word in words]
    except ValueError:
        lengths = []
    low, high = SPACING_RANGE_MM
    if len(lengths) not in (1, 3) or not all(low <= length <= high for length in lengths):
        raise StoreError(
            f"--spacing_mm must be 'native', one length or three (D H W), each from {low:g} to {high:g} mm, e.g. "
            f"--spacing_mm 3 3 3; received {' '.join(map(str, words))!r}"
        )
    return tuple(lengths * 3 if len(lengths) == 1 else lengths)


class VolumeStore:
    """Random access to the volumes of a store: CT in HU, radiographs [1, H, W] in grey less 2^(bits - 1), or MR.

    Attributes:
        kind: CT, RADIOGRAPH or MR.
        spacing_mm: (D, H, W) of every case, or None where each keeps its own.
        mr_percentiles: of the intensity maps of MR; None = of another kind.

    Args:
        store_dir: a folder made by `build_store`.
        names: the cases to use, in this order; None for all, sorted by name.
        expected_spacing_mm: raise unless the store has this spacing: (D, H, W) in mm, or "native"; None for any.

    Raises:
        StoreError: no store there, a spacing other than expected, or names that are not in it.
    """

    def __init__(
        self,
        store_dir: str | Path,
        names: Sequence[str] | None = None,
        expected_spacing_mm: tuple[float, float, float] | str | None = None,
    ) -> None:
        self.store_dir = Path(store_dir)
        self.kind, self.spacing_mm, self.mr_percentiles = read_settings(self.store_dir)
        if expected_spacing_mm is not None:
            check_spacing(self.store_dir, parse_spacing(expected_spacing_mm))
        records = read_records(self.store_dir)
        self.names: list[str] = sorted(records) if names is None else list(names)
        missing = [name for name in self.names if name not in records]
        if missing:
            raise StoreError(
                f"{self.store_dir}: {len(missing)} of {len(self.names)} cases are not in the store, first "
                f"{', '.join(missing[:5])}. Run scripts/prepare_volumes.py; its failures.json names unreadable files."
            )
        self._records = {name: records[name] for name in self.names}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def record(self, name: str) -> CaseRecord:
        """Shape, spacing, affine, body box and provenance of a case, without reading voxels."""
        try:
            return self._records[name]
        except KeyError:
            raise StoreError(f"{self.store_dir}: no case called {name!r} among the {len(self)} in use") from None

    def window(self, low: float | None = None, high: float | None = None) -> tuple[float | None, float | None]:
        """What becomes 0 and 1 in all cases: the given ends, else those of the kind; None = each radiograph's own."""
        return fill_ends((low, high), DEFAULT_WINDOW[self.kind])

    def read(self, name: str) -> Volume:
        """The whole volume, int16 HU [D, H, W]; [C, D, H, W] of several channels."""
        return self._read(case_file(self.store_dir, name, ARRAY), self.record(name))

    def read_label(self, name: str) -> Volume:
        """The whole label map [D, H, W] on the grid of `read(name)`."""
        return self._read(self._label_file(name), self.record(name))

    def crop(self, name: str, start: Sequence[int], size: Sequence[int], fill: int | None = None) -> np.ndarray:
        """A part of a volume; only the chunks it touches are read.

        Args:
            name: the case.
            start: first voxel (d, h, w); may lie outside of the volume on any side.
            size: (D, H, W) of the result.
            fill: HU outside of the volume; None = `CaseRecord.outside`.

        Returns:
            int16 HU of shape `size`, or (C, *size) of several channels, contiguous and owned by the caller.
        """
        record = self.record(name)
        fill = record.outside if fill is None else fill
        return self._crop(case_file(self.store_dir, name, ARRAY), record, start, size, fill)

    def label_crop(self, name: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """The labels of `crop(name, start, size)`; 0 outside of the volume."""
        return self._crop(self._label_file(name), self.record(name), start, size, 0)

    def _label_file(self, name: str) -> Path:
        if not self.record(name).has_label:
            raise StoreError(f"{self.store_dir}: case {name} has no label")
        return case_file(self.store_dir, name, LABEL)

    def _read(self, path: Path, record: CaseRecord) -> Volume:
        return Volume(read_region(path, record), record.affine, str(path))

    def _crop(self, path: Path, record: CaseRecord, start: Sequence[int], size: Sequence[int], fill: int) -> np.ndarray:
        start, size, shape = (np.asarray(value, dtype=np.int64) for value in (start, size, record.shape))
        if start.shape != (3,) or size.shape != (3,) or (size < 1).any():
            raise ValueError(f"a crop needs start (d, h, w) and a size above zero, received {start} and {size}")
        low, high = np.maximum(start, 0), np.minimum(start + size, shape)
        is_label = path.name.endswith(LABEL)
        out_shape = (*(() if is_label else record.array_shape[:-3]), *size.tolist())
        if (low >= high).any():
            return np.full(out_shape, fill, dtype=np.uint8 if is_label else np.int16)
        inside = read_region(path, record, tuple(slice(int(a), int(b)) for a, b in zip(low, high)))
        if inside.shape == out_shape:
            return inside
        out = np.full(out_shape, fill, dtype=inside.dtype)
        out[(..., *(slice(a, b) for a, b in zip(low - start, high - start)))] = inside
        return out


def fill_store(
    cases: Sequence[Case],
    store_dir: str | Path,
    spacing_mm: Sequence[str | float] | str | None = None,
    num_workers: int = 1,
    renew: bool = False,
) -> BuildReport:
    """Store the cases that are not stored yet, or lack the label that they have now; print what is added and left out.

    What is added to a store of MR is read as MR; a new store is of CT or of radiographs.

    Args:
        spacing_mm: as of a `--spacing_mm` flag; None = the store's own; for a new one DEFAULT_SPACING_MM, and native if
            it is of radiographs.
        num_workers: processes; below 1 counts as 1.
        renew: also store again cases whose files have changed since.

    Returns:
        What was done; cases that were there are not in it.

    Raises:
        StoreError: the store has another spacing and lacks cases, or holds another kind of volumes; and as
            `build_store`.
    """
    store_dir = Path(store_dir)
    # A case may stand in two lists; the entry with a label counts.
    cases = list({(c.name, c.image): c for c in sorted(cases, key=lambda case: case.label is not None)}.values())
    mr_percentiles = stored_mr_percentiles(store_dir)
    kind = kind_to_store(cases, mr_percentiles)
    wanted_mm = parse_spacing(spacing_mm) if spacing_mm is not None else DEFAULT_SPACING_MM if kind == CT else None
    if (store_dir / "store.json").exists():
        check_kind(store_dir, kind, mr_percentiles)
        store = VolumeStore(store_dir)
        wanted_mm = store.spacing_mm if spacing_mm is None else wanted_mm
        cases = [case for case in cases if not _is_stored(case, store, renew)]
    if not cases:
        return BuildReport()
    print(f"volume store {store_dir}: {len(cases)} cases to add at {spacing_text(wanted_mm)}", flush=True)
    report = build_store(cases, store_dir, wanted_mm, max(1, num_workers), mr_percentiles=mr_percentiles)
    for name, reason in report.failed.items():
        print(f"left out: {name}: {reason}", flush=True)
    return report


def _is_stored(case: Case, store: VolumeStore, renew: bool) -> bool:
    if case.name not in store or (case.label is not None and not store.record(case.name).has_label):
        return False
    if is_of_another_file(case, store.record(case.name)) and has_another_size(case, store.record(case.name)):
        raise StoreError(clash_message(case, store.record(case.name)))
    return not renew or is_current(case, store.record(case.name), store.store_dir)
