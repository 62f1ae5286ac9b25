"""Building a volume store from image files: in parallel, resumable, safe to kill and to run several times at once.

Every case is made under its own lock (on file systems without locks two builders may both make it, with one result);
its files are written aside and renamed, its manifest comes last. So whatever ends the run, the next one keeps the
finished cases and makes the others. Cases are taken in another order by every process that builds, so that several of
them share the work instead of waiting for each other.
"""

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.ct.geometry import BODY_HU, body_mask, mask_box, resample, spacing_of
from datasets.ct.images import CT, MR, RADIOGRAPH, read_image, read_labels_of
from datasets.ct.intensity import MR_RANGE
from datasets.ct.mr import MRVolume
from datasets.ct.nifti import CTReadError, Volume
from datasets.ct.radiograph import Radiograph
from datasets.lists.data_list import Case, DataListError, is_file_name, kind_of_cases
from datasets.store.arrays import check_file, chunk_checksums, compress, files_of
from datasets.store.files import FileWriteError, exclusive, remove_asides, write_bytes, write_text
from datasets.store.format import (
    ARRAY,
    LABEL,
    MANIFEST,
    CaseRecord,
    StoreError,
    case_file,
    checksum_of,
    create_settings,
    read_manifest,
    read_records,
    write_index,
    write_manifest,
)
from datasets.store.sources import (
    clash_message,
    digest_of,
    is_current,
    is_of_another_file,
    keeps_label,
    sources_of,
    stamp_of,
    with_new_stamp,
)


@dataclass
class BuildReport:
    """What a build did: names of the cases stored now, those found finished, and reasons of those that failed."""

    built: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def build_store(
    cases: Sequence[Case],
    store_dir: str | Path,
    spacing_mm: tuple[float, float, float] | None = None,
    num_workers: int = 1,
    verify: bool = False,
    progress: bool = True,
    mr_percentiles: tuple[float, float] | None = None,
) -> BuildReport:
    """Store every case that is not stored yet.

    Args:
        cases: what to store; names become file names.
        store_dir: made if missing.
        spacing_mm: (D, H, W) in mm that all volumes are resampled to; None keeps each one's own.
        num_workers: processes; 1 does it in this one.
        verify: compare finished cases with their checksums, and store damaged ones again.
        progress: show a bar.
        mr_percentiles: the cases are MR, whose intensities are mapped by these percentiles (`datasets.ct.mr`); None =
            CT or radiographs.

    Returns:
        What was done. A case that cannot be read does not stop the others: it is in `failed` and in failures.json.

    Raises:
        DataListError: CT and radiographs in one list, or radiographs given out as MR.
        StoreError: the store has another spacing or percentiles, or holds another kind of volumes, names clash or are
            no file names, or a worker was killed.
        FileWriteError: the folder cannot be written to, or is full; what is finished stays.
    """
    store_dir = Path(store_dir)
    _check_names([case.name for case in cases])
    create_settings(store_dir, spacing_mm, kind_to_store(cases, mr_percentiles), mr_percentiles)
    report, order = BuildReport(), list(cases)
    if not verify:
        records = read_records(store_dir)
        report.reused = [case.name for case in cases if is_current(case, records.get(case.name), store_dir)]
        finished = set(report.reused)
        order = [case for case in cases if case.name not in finished]
    if not order and (store_dir / "index.json").exists():
        return report  # nothing to write, so a finished store may lie in a folder that cannot be written to
    random.Random(os.getpid()).shuffle(order)
    try:
        recipe = Recipe(store_dir, spacing_mm, mr_percentiles)
        results = _run(order, recipe, num_workers, verify)
        for name, reason in tqdm(
            results, total=len(order), desc="volumes", unit="case", disable=not (progress and order)
        ):
            if reason in ("built", "reused"):
                getattr(report, reason).append(name)
            else:
                report.failed[name] = reason
    finally:
        write_index(store_dir)
    _write_failures(store_dir, cases, report.failed)
    for names in (report.built, report.reused):
        names.sort()
    return report


def kind_to_store(cases: Sequence[Case], mr_percentiles: tuple[float, float] | None) -> str:
    """The kind of volumes that the cases are: MR where percentiles are given, else by the files' names.

    Raises:
        DataListError: CT and radiographs in one list, or radiographs where MR is expected.
    """
    kind = kind_of_cases(cases)
    if mr_percentiles is None:
        return kind
    if kind != CT:
        raise DataListError(f"{cases[0].image} is a radiograph, expected MR (--modality mr, or a --store_dir of MR)")
    return MR


@dataclass(frozen=True)
class Recipe:
    """How and where cases are stored; fields as the arguments of `build_store`."""

    store_dir: Path
    spacing_mm: tuple[float, float, float] | None
    mr_percentiles: tuple[float, float] | None


def _check_names(names: list[str]) -> None:
    """File names that no two cases share, and that no other file of the store can have."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise StoreError(f"case names must be unique, received several of: {', '.join(twice[:5])}")
    for name in names:
        if not is_file_name(name) or name.endswith(".label"):
            raise StoreError(f"case name {name!r} cannot be a file name in a store (no / or leading . or final .label)")


def _run(cases: list[Case], recipe: Recipe, num_workers: int, verify: bool) -> Iterator[tuple[str, str]]:
    """Pairs (name, outcome) as the cases finish."""
    if num_workers <= 1 or len(cases) <= 1:
        for case in cases:
            yield case.name, _store_case(case, recipe, verify)
        return
    # Spawned, not forked: the caller may hold threads, CUDA or a process group.
    context = multiprocessing.get_context("spawn")
    # Workers leave Ctrl-C to the parent, which then lets the cases in work finish.
    ignored = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(min(num_workers, len(cases)), mp_context=context, **ignored)
    try:
        waiting = {pool.submit(_store_case, case, recipe, verify): case.name for case in cases}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise StoreError(
            f"{recipe.store_dir}: a worker process was killed, most likely because memory ran out. Run the same "
            f"command again with a lower --num_workers (it was {num_workers}); finished cases are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _store_case(case: Case, recipe: Recipe, verify: bool) -> str:
    """Store one case unless it is there; returns "built", "reused" or the reason of the failure."""
    store_dir = recipe.store_dir
    with exclusive(store_dir / "locks" / "cases" / case.name) as locked:
        try:
            record = with_new_stamp(case, read_manifest(case_file(store_dir, case.name, MANIFEST)), store_dir)
            is_stored = is_current(case, record, store_dir)
            if is_stored and not (verify and _is_damaged(record, store_dir)):
                return "reused"
            if record is not None and not is_stored and is_of_another_file(case, record):
                return clash_message(case, record)
            _make_case(case, recipe, record, locked)
            return "built"
        except CTReadError as error:
            return str(error)
        except MemoryError:
            return f"{case.image}: not enough memory to read and resample this volume"
        except FileWriteError:  # the store's trouble, not this case's
            raise
        except Exception as error:  # whatever one strange file does, thousands of others wait behind it
            return f"{case.image}: unexpected {type(error).__name__} while storing it ({error})"


def _is_damaged(record: CaseRecord, store_dir: Path) -> bool:
    """Whether a file of the case differs from its checksum."""
    try:
        for path, checksum in files_of(record, store_dir):
            check_file(path, checksum)
    except StoreError:
        return True
    return False


def _make_case(case: Case, recipe: Recipe, stored: CaseRecord | None, locked: bool) -> None:
    """Read, resample, compress and write one case; its manifest disappears first and comes back last.

    Args:
        case: what to store.
        stored: what the store knew of the case.
        locked: whether no other process makes this case now.
    """
    store_dir, spacing_mm = recipe.store_dir, recipe.spacing_mm
    paths = [case_file(store_dir, case.name, suffix) for suffix in (ARRAY, LABEL, MANIFEST)]
    has_kept_label = keeps_label(case, stored, store_dir)
    # A missing file ends it here, at no loss.
    stamp, digest = stamp_of(sources_of(case)), digest_of(sources_of(case))
    if has_kept_label:
        stamp, digest = stored.source_stamp, " ".join([digest, *stored.source_digest.split()[1:]])
    paths[2].unlink(missing_ok=True)
    if locked:  # else they may be another builder's, in work
        for path in paths:
            remove_asides(path)
    image = read_image(case.source, recipe.mr_percentiles)
    label = None if case.label is None else read_labels_of(image, case.label).array
    array, affine = image.array, image.affine
    if spacing_mm is not None:
        array, affine = resample(array, image.affine, spacing_mm)
        label = None if label is None else resample(label, image.affine, spacing_mm, order=0)[0]
    body_start, body_stop = mask_box(_body_of(image, array, affine))
    checksums, chunk_crc32 = [], []
    for path, content in zip(paths, (array, label)):
        if content is not None:
            packed = compress(content)
            write_bytes(path, packed)
            checksums.append(checksum_of(packed))
            chunk_crc32.append(chunk_checksums(packed))
        elif has_kept_label:
            checksums.append(stored.label_checksum)
            chunk_crc32.append(stored.label_chunk_crc32)
        else:
            path.unlink(missing_ok=True)
            checksums.append("")
            chunk_crc32.append("")
    place = array.shape[-3:], spacing_of(affine), affine, body_start, body_stop
    facts = _facts_of(image, array)
    record = CaseRecord(case.name, *place, str(case.image), stamp, *checksums, digest, *chunk_crc32, **facts)
    write_manifest(record, store_dir)


def _body_of(image: Volume, array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The mask of the patient in an image's array as it is stored; of a radiograph all but black borders."""
    if isinstance(image, Radiograph):
        return array > array.min()
    if isinstance(image, MRVolume):
        # What is above the background in any channel is denser than air.
        channels = array.reshape(-1, *array.shape[-3:])
        array = np.max([one - above + BODY_HU for one, above in zip(channels, image.body_above)], axis=0)
    return body_mask(array, spacing_of(affine))


def _facts_of(image: Volume, array: np.ndarray) -> dict:
    """What a record says of a radiograph or an MR; nothing of a CT."""
    if isinstance(image, Radiograph):
        return {"kind": RADIOGRAPH, "bits": image.bits, "value_range": (int(array.min()), int(array.max()))}
    if isinstance(image, MRVolume):
        maps = tuple(map(tuple, image.maps))
        return {"kind": MR, "value_range": MR_RANGE, "intensity_maps": maps}
    return {}


def _write_failures(store_dir: Path, cases: Sequence[Case], failed: dict[str, str]) -> None:
    """Keep failures.json: the reasons of this run, and those of cases that this run did not try."""
    path = store_dir / "failures.json"
    with exclusive(store_dir / "locks" / "failures"):
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        tried = {case.name for case in cases}
        known = {name: reason for name, reason in known.items() if name not in tried} | failed
        if known or path.exists():
            write_text(path, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
