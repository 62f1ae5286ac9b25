"""Whether a stored case is still the one of its source files: by size and time, and by content where these differ."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets.ct import formats
from datasets.ct.nifti import CTReadError
from datasets.lists.data_list import Case
from datasets.store.arrays import check_file, files_of
from datasets.store.format import LABEL, CaseRecord, StoreError, case_file, checksum_of, write_manifest

Source = Path | tuple[Path, ...]  # a file, a folder of a DICOM series, or the files of several channels


def sources_of(case: Case) -> list[Source]:
    """What a case is made of, the image first."""
    return [source for source in (case.source, case.label) if source is not None]


def _files_of(source: Source) -> list[Path]:
    return [file for path in (source if isinstance(source, tuple) else [source]) for file in formats.files_of(path)]


def stamp_of(sources: Sequence[Source]) -> str:
    """Size and time of each source, a word each: another word means another content.

    Of a source in several files: their sizes together, and the latest time.
    """
    try:
        parts = [[file.stat() for file in _files_of(source)] for source in sources]
    except OSError as error:
        raise CTReadError(f"{error.filename}: {error.strerror}") from error
    return " ".join(
        f"{sum(stat.st_size for stat in stats)}:{max((stat.st_mtime_ns for stat in stats), default=0)}"
        for stats in parts
    )


def digest_of(sources: Sequence[Source]) -> str:
    """BLAKE2b of each source, a word each; several files count as one after the other."""
    return " ".join(checksum_of(b"".join(file.read_bytes() for file in _files_of(source))) for source in sources)


def is_current(case: Case, record: CaseRecord | None, store_dir: Path) -> bool:
    """Whether the case is stored, from its source files as they are now; once they are gone, the store stands alone."""
    if record is None:
        return False
    sources, stamps = sources_of(case), record.source_stamp.split()
    try:
        # Fewer sources than stamps: another list had a label stored, which this one neither needs nor removes.
        if case.image.exists() and stamp_of(sources).split() != stamps[: len(sources)]:
            return False
    except CTReadError:
        return False
    return all(path.exists() for path, _ in files_of(record, store_dir))


def with_new_stamp(case: Case, record: CaseRecord | None, store_dir: Path) -> CaseRecord | None:
    """The record; its manifest takes the files' new time where they were copied or touched, but hold the same bytes."""
    if record is None or not record.source_digest or is_current(case, record, store_dir):
        return record
    sources = sources_of(case)
    num = len(sources)
    stamp, digest = stamp_of(sources).split(), record.source_digest.split()
    sizes, stored_sizes = (
        [word.split(":")[0] for word in words[:num]] for words in (stamp, record.source_stamp.split())
    )
    if sizes != stored_sizes or digest_of(sources).split() != digest[:num]:
        return record
    stamp += record.source_stamp.split()[num:]  # of a label that this list does not name
    record = replace(record, source=str(case.image), source_stamp=" ".join(stamp))
    write_manifest(record, store_dir)
    return record


def keeps_label(case: Case, record: CaseRecord | None, store_dir: Path) -> bool:
    """Whether a case listed without label has one in the store that still fits: of this image, and undamaged."""
    if case.label is not None or record is None or not record.has_label:
        return False
    try:
        check_file(case_file(store_dir, case.name, LABEL), record.label_checksum)
        return stamp_of([case.source]) == record.source_stamp.split()[0]
    except (StoreError, CTReadError):
        return False


def is_of_another_file(case: Case, record: CaseRecord) -> bool:
    """Whether the case of this name was stored from another file, and both files are there."""
    stored = Path(record.source)
    return stored != case.image and stored.exists() and case.image.exists() and not stored.samefile(case.image)


def has_another_size(case: Case, record: CaseRecord) -> bool:
    """Whether the image's size in bytes differs from that of the file the case was stored from."""
    return stamp_of([case.source]).split(":")[0] != record.source_stamp.split(":")[0]


def clash_message(case: Case, record: CaseRecord) -> str:
    """For a case that is another file than the one stored by its name."""
    return (
        f"{case.image}: the store holds a case {case.name} of another file, {record.source}, which still exists. "
        "Rename one of the two cases in its data list, or choose another --store_dir."
    )
