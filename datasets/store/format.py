"""What a volume store is on disk, and how its files are written and read.

<store>/store.json            format version, kind of volumes, spacing, chunk and block size, percentiles of MR
<store>/cases/<name>.b2nd     int16 HU [D, H, W], Blosc2 NDArray: zstd level 5, byte shuffle, chunks 64³, blocks 32³;
                              of a radiograph its grey [1, H, W], chunks 512², blocks 128²;
                              of an MR its mapped values (`datasets.ct.mr`) in -1000 to 1000;
                              of several channels [C, D, H, W], a chunk holds one channel
<store>/cases/<name>.label.b2nd   labels on the same grid, where there are any
<store>/cases/<name>.json     manifest, written last: a case without it does not exist
<store>/index.json            all manifests in one file, only to open quickly; whatever is outdated in it is re-read
<store>/failures.json         cases that could not be stored, with the reason
"""

import hashlib
import json
import zlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.ct.images import CT, MR, NAMES, RADIOGRAPH
from datasets.ct.intensity import AIR_HU, CT_WINDOW_HU, fill_ends
from datasets.store.files import exclusive, write_text

FORMAT, VERSION = "alice volume store", 1
ARRAY, LABEL, MANIFEST = ".b2nd", ".label.b2nd", ".json"
CHUNK_VOX, BLOCK_VOX, ZSTD_LEVEL = 64, 32, 5
FLAT_CHUNK_VOX, FLAT_BLOCK_VOX = (1, 512, 512), (1, 128, 128)  # of volumes of depth 1


class StoreError(ValueError):
    """A store, or a case in it, cannot be used as asked; the message says which file, why, and what to change."""


@dataclass(frozen=True, eq=False)
class CaseRecord:
    """What the store knows of a case without touching its voxels.

    Attributes:
        name: unique in the store.
        shape: (D, H, W).
        spacing_mm: voxel size (D, H, W).
        affine: float64 [4, 4], array index -> world RAS+ mm.
        body_start, body_stop: int [3], the box around the patient: first voxel and one past the last.
        source: the file it was made from.
        source_stamp: size and time of the image, then of the label where one is stored, to see whether they changed.
        checksum, label_checksum: BLAKE2b of the compressed files; the latter is empty without labels.
        chunk_crc32, label_chunk_crc32: CRC-32 in 8 hexadecimal digits each, first of the array's layout, then of its
            compressed chunks, to notice damage when a crop is read; empty in older stores.
        source_digest: BLAKE2b of the image file, then of the label file where one is stored; empty in older stores.
        kind: CT, RADIOGRAPH or MR.
        bits: of a radiograph's file; its grey is the stored value + 2^(bits - 1).
        value_range: smallest and largest stored value of a radiograph; MR_RANGE of an MR; None of a CT.
        intensity_maps: of an MR, for each channel the file's intensities that became -800 and 800 (`IntensityMap`).
    """

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    body_start: np.ndarray
    body_stop: np.ndarray
    source: str
    source_stamp: str
    checksum: str
    label_checksum: str = ""
    source_digest: str = ""
    chunk_crc32: str = ""
    label_chunk_crc32: str = ""
    kind: str = CT
    bits: int | None = None
    value_range: tuple[int, int] | None = None
    intensity_maps: tuple[tuple[float, float], ...] | None = None

    @property
    def has_label(self) -> bool:
        return bool(self.label_checksum)

    @property
    def num_channels(self) -> int:
        return 1 if self.intensity_maps is None else len(self.intensity_maps)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Of the stored image: (D, H, W), or (C, D, H, W) of several channels."""
        return self.shape if self.num_channels == 1 else (self.num_channels, *self.shape)

    @property
    def identity(self) -> str:
        """Voxels and place of the volume, and the file it was made from: `store:CHECKSUM:AFFINE` and `:DIGEST`.

        A corrected header may move the same voxels elsewhere. Compare two of them with `is_same_volume`.
        """
        text = f"store:{self.checksum}:{zlib.crc32(self.affine.tobytes()):08x}"
        return f"{text}:{self.source_digest.split()[0]}" if self.source_digest else text

    @property
    def outside(self) -> int:
        """What lies outside of the volume: air, the darkest value of the radiograph, or the lowest of MR."""
        return AIR_HU if self.value_range is None else self.value_range[0]

    def window(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        """The values that become 0 and 1; None = CT's default ends, or those of `value_range`.

        Raises:
            StoreError: the ends are swapped.
        """
        low, high = fill_ends((low, high), CT_WINDOW_HU if self.value_range is None else self.value_range)
        if low >= high:
            raise StoreError(
                f"case {self.name}: --a_min {low:g}, --a_max {high:g}: expected a low end below the high end"
            )
        return low, high

    def to_json(self) -> dict:
        """Plain values for the manifest; what a CT does not have is left out."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: value for name, value in plain.items() if value is not None}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, plain: dict) -> "CaseRecord":
        """The record of a manifest; older ones lack fields that came later.

        Raises:
            ValueError, TypeError, KeyError: a field is missing, or not of its type.
        """
        known = {one.name: plain[one.name] for one in fields(cls) if one.name in plain or one.default is MISSING}
        for key in ("shape", "spacing_mm", "value_range"):
            if key in known:
                known[key] = tuple(known[key])
        if "intensity_maps" in known:
            known["intensity_maps"] = tuple((float(low), float(high)) for low, high in known["intensity_maps"])
        for key, dtype in (("affine", np.float64), ("body_start", np.int64), ("body_stop", np.int64)):
            known[key] = np.array(known[key], dtype=dtype)
        record = cls(**known)
        sizes = [len(record.shape), len(record.spacing_mm), *record.affine.shape, *record.body_start.shape]
        texts = [getattr(record, one.name) for one in fields(cls) if one.type is str]
        if sizes != [3, 3, 4, 4, 3] or not all(isinstance(text, str) for text in texts):
            raise ValueError("a manifest's fields are not of the expected types")
        return record


def is_same_volume(one: str, other: str) -> bool | None:
    """Whether two identities (`CaseRecord.identity`) are of one scan, perhaps at two spacings; None if not known.

    Volumes made from one file are of one scan. Older stores do not state the file: they can only be equal.
    """
    if one == other and one:
        return True
    digests = [text.split(":")[3:] for text in (one, other)]
    return digests[0] == digests[1] if all(digests) else None


def case_file(store_dir: Path, name: str, suffix: str) -> Path:
    """A file of a case: its ARRAY, LABEL or MANIFEST."""
    return store_dir / "cases" / f"{name}{suffix}"


def checksum_of(content: bytes) -> str:
    """A digest of a file's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def spacing_text(spacing_mm: tuple[float, float, float] | None) -> str:
    """For messages: `1.5 x 1.5 x 2 mm (D, H, W)`, or `native`."""
    return "native" if spacing_mm is None else " x ".join(f"{value:g}" for value in spacing_mm) + " mm (D, H, W)"


class StoreSettings(NamedTuple):
    """What all cases of a store have in common.

    Attributes:
        kind: CT, RADIOGRAPH or MR.
        spacing_mm: (D, H, W); None = native.
        mr_percentiles: of the intensity maps of MR; None = of another kind.
    """

    kind: str
    spacing_mm: tuple[float, float, float] | None
    mr_percentiles: tuple[float, float] | None = None


def read_settings(store_dir: Path) -> StoreSettings:
    """The settings of a store.

    Raises:
        StoreError: no store there, or one of another format version.
    """
    path = store_dir / "store.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StoreError(f"{store_dir}: no volume store there. Make one with scripts/prepare_volumes.py.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise StoreError(f"{path}: holds a {type(settings).__name__}, expected the settings of a store")
    if (settings.get("format"), settings.get("version")) != (FORMAT, VERSION):
        raise StoreError(
            f"{path}: holds {settings.get('format')!r} version {settings.get('version')}, expected {FORMAT!r} version "
            f"{VERSION}. Make a new store with scripts/prepare_volumes.py in another --store_dir."
        )
    spacing = settings.get("spacing_mm")
    kind = settings.get("kind", CT)  # stores made before there were radiographs do not say
    lengths = spacing if isinstance(spacing, list) else []
    is_spacing = spacing == "native" or (len(lengths) == 3 and all(isinstance(one, int | float) for one in lengths))
    percentiles = settings.get("mr_percentiles") if kind == MR else None
    is_mr = isinstance(percentiles, list) and len(percentiles) == 2
    if not is_spacing or kind not in NAMES or is_mr != (kind == MR):
        raise StoreError(
            f"{path}: damaged; spacing_mm is {spacing!r}, kind {kind!r} and mr_percentiles {percentiles!r}"
        )
    return StoreSettings(kind, tuple(lengths) or None, tuple(percentiles) if is_mr else None)


def stored_mr_percentiles(store_dir: str | Path | None) -> tuple[float, float] | None:
    """The percentiles of a store of MR; None where there is no store, or one of another kind."""
    if store_dir is None or not (Path(store_dir) / "store.json").exists():
        return None
    return read_settings(Path(store_dir)).mr_percentiles


def check_spacing(store_dir: Path, wanted_mm: tuple[float, float, float] | None) -> None:
    """Raise StoreError unless the store has the wanted spacing (None: native)."""
    found_mm = read_settings(store_dir).spacing_mm
    same = found_mm == wanted_mm or (found_mm and wanted_mm and np.allclose(found_mm, wanted_mm, rtol=0, atol=1e-6))
    if not same:
        raise StoreError(
            f"{store_dir}: the store's spacing is {spacing_text(found_mm)}, but {spacing_text(wanted_mm)} was asked "
            "for. Change --spacing_mm, or give another --store_dir."
        )


def check_kind(store_dir: Path, wanted: str, mr_percentiles: tuple[float, float] | None = None) -> None:
    """Raise StoreError unless the store holds the wanted kind of volumes; of MR, with these percentiles."""
    found = read_settings(store_dir)
    if found.kind != wanted:
        raise StoreError(
            f"{store_dir}: the store holds {NAMES[found.kind]}, expected {NAMES[wanted]}; a store holds one kind. Give "
            "another --store_dir."
        )
    if found.mr_percentiles != mr_percentiles:
        received, stored = (" ".join(f"{p:g}" for p in pair) for pair in (mr_percentiles, found.mr_percentiles))
        raise StoreError(
            f"{store_dir}: its MR was mapped by the percentiles {stored}, but {received} were asked for. Change "
            "--mr_percentiles, or give another --store_dir."
        )


def create_settings(
    store_dir: Path,
    spacing_mm: tuple[float, float, float] | None,
    kind: str = CT,
    mr_percentiles: tuple[float, float] | None = None,
) -> None:
    """Start a store, or check that the one that is there has these settings. Safe for several processes."""
    path = store_dir / "store.json"
    if _is_empty(store_dir):  # a finished store may lie in a folder that cannot be written to: no lock for it
        with exclusive(store_dir / "locks" / "store"):
            wanted = StoreSettings(kind, spacing_mm, mr_percentiles)
            # Another process may have been first; without cases, a first try with other settings counts for nothing.
            if not path.exists() or (_is_empty(store_dir) and read_settings(store_dir) != wanted):
                settings = {"format": FORMAT, "version": VERSION, "axcodes": "SPL", "kind": kind}
                settings["spacing_mm"] = "native" if spacing_mm is None else list(spacing_mm)
                is_flat = kind == RADIOGRAPH
                settings["chunk_vox"] = FLAT_CHUNK_VOX if is_flat else CHUNK_VOX
                settings["block_vox"] = FLAT_BLOCK_VOX if is_flat else BLOCK_VOX
                if mr_percentiles is not None:
                    settings["mr_percentiles"] = list(mr_percentiles)
                write_text(path, json.dumps(settings, indent=1) + "\n")
    check_kind(store_dir, kind, mr_percentiles)
    check_spacing(store_dir, spacing_mm)


def _is_empty(store_dir: Path) -> bool:
    """Whether no case has been stored yet."""
    return not any((store_dir / "cases").glob(f"[!.]*{MANIFEST}"))


def read_manifest(path: Path) -> CaseRecord | None:
    """The record in a manifest; None when it is missing or of no use (then the case has to be stored again)."""
    try:
        return CaseRecord.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_manifest(record: CaseRecord, store_dir: Path) -> None:
    """Write a case's manifest, which makes the case exist."""
    write_text(case_file(store_dir, record.name, MANIFEST), json.dumps(record.to_json(), indent=1) + "\n")


def read_records(store_dir: Path) -> dict[str, CaseRecord]:
    """All finished cases by name, sorted; from the index where it is up to date."""
    return {name: record for name, (_, record) in sorted(_collect(store_dir).items())}


def write_index(store_dir: Path) -> None:
    """Gather all manifests into `index.json`."""
    with exclusive(store_dir / "locks" / "index"):
        entries = {name: (stamp, record.to_json()) for name, (stamp, record) in _collect(store_dir).items()}
        write_text(store_dir / "index.json", json.dumps({"version": VERSION, "cases": entries}))


def _collect(store_dir: Path) -> dict[str, tuple[list[int], CaseRecord]]:
    """Name -> (size and time of the manifest, its record). Manifests newer than the index are opened one by one."""
    indexed = _read_index(store_dir / "index.json")
    entries = {}
    for path in (store_dir / "cases").glob(f"[!.]*{MANIFEST}"):
        name = path.name.removesuffix(MANIFEST)
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process is storing this case anew
            continue
        stamp = [stat.st_size, stat.st_mtime_ns]
        if name in indexed and indexed[name][0] == stamp:
            entries[name] = indexed[name]
        elif record := read_manifest(path):
            entries[name] = (stamp, record)
    return entries


def _read_index(path: Path) -> dict[str, tuple[list[int], CaseRecord]]:
    """The entries of an index; nothing of one that is missing, damaged or of another version."""
    try:
        index = json.loads(path.read_text())
        if index["version"] != VERSION:
            return {}
        return {name: (stamp, CaseRecord.from_json(plain)) for name, (stamp, plain) in index["cases"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
