"""Where an entry point's volumes come from: a volume store, a data list, or simply a folder of CT files."""

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.ct.nifti import Volume, read_ct
from datasets.lists.data_list import Case, find_cases, load_data_list
from datasets.store.volumes import CaseRecord, VolumeStore

SECTIONS = ("training", "validation")


@dataclass(frozen=True)
class CaseSource:
    """Case names, how to read one's CT as a canonical int16 volume, and a text that changes when that CT does."""

    names: list[str]
    read: Callable[[str], Volume]
    identity: Callable[[str], str]


def open_cases(
    store_dir: str | None = None,
    data_dir: str | None = None,
    json_list: str | None = None,
    sections: Sequence[str] = SECTIONS,
    rank: int = 0,
) -> CaseSource:
    """The cases that the flags of the same names speak of; listed ones that the store lacks are left out.

    Args:
        store_dir: a volume store; with `json_list`, only the cases of its sections.
        data_dir: folder of the CT files; what the list's paths are relative to.
        json_list: data list; without one, every CT below `data_dir` is a case.
        sections: of the list.
        rank: 0 prints what is left out.

    Raises:
        ValueError: neither store nor folder, or no cases.
    """
    if store_dir is None and data_dir is None:
        raise ValueError("no volumes to read: pass --store_dir, or --data_dir (with --json_list or without)")
    listed = _listed_cases(data_dir or ".", json_list, sections, must_exist=store_dir is None) if json_list else None
    if listed == []:
        raise ValueError(f"{json_list}: no cases in {', '.join(sections)} (--sections)")
    if store_dir is not None:
        store = VolumeStore(store_dir)
        names = store.names if listed is None else _stored_cases(store, [case.name for case in listed], rank)
        return CaseSource(list(names), store.read, lambda name: record_identity(store.record(name)))
    cases = find_cases(data_dir) if listed is None else listed
    image_of = {case.name: case.image for case in cases}
    return CaseSource(list(image_of), lambda name: read_ct(image_of[name]), lambda name: _file_identity(image_of[name]))


def record_identity(record: CaseRecord) -> str:
    """Voxels and place of a stored case: a corrected header may move the same voxels elsewhere."""
    return f"store:{record.checksum}:{zlib.crc32(record.affine.tobytes()):08x}"


def _file_identity(path: Path) -> str:
    """Size and time of a file; empty where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"file:{stat.st_size}:{stat.st_mtime_ns}"


def _listed_cases(data_dir: str, json_list: str, sections: Sequence[str], must_exist: bool) -> list[Case]:
    """Cases of all sections, each once, in the list's order."""
    cases = {}
    for section in sections:
        for case in load_data_list(json_list, data_dir, section, must_exist=must_exist):
            cases[case.name] = case
    return list(cases.values())


def _stored_cases(store: VolumeStore, names: list[str], rank: int) -> list[str]:
    """Those of the listed cases that are stored: one file that nobody can read must not stop all others."""
    stored, absent = [name for name in names if name in store], [name for name in names if name not in store]
    told = (
        f"{store.store_dir}: {len(absent)} of {len(names)} listed cases are not in the store, first "
        f"{', '.join(absent[:5])}; scripts/prepare_volumes.py names the reasons in failures.json"
    )
    if not stored:
        raise ValueError(f"{told}. Do --store_dir and --json_list belong together?")
    if absent and rank == 0:
        print(f"left out: {told}", file=sys.stderr)
    return stored
