"""Where an entry point's volumes come from: a volume store, a data list, or simply a folder of CT files."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from datasets.ct.images import CT, MR
from datasets.ct.mr import read_mr
from datasets.ct.nifti import CTReadError, Volume, read_ct
from datasets.lists.data_list import load_sections
from datasets.lists.search import find_cases
from datasets.store.format import check_kind
from datasets.store.sources import stamp_of
from datasets.store.volumes import VolumeStore

SECTIONS = ("training", "validation")


@dataclass(frozen=True)
class CaseOptions:
    """Which CT volumes an entry point works on; its fields are flags.

    Attributes:
        store_dir: volume store to read from; unset = the files are read
        data_dir: folder of the CT files, which the list's paths are relative to
        json_list: data list; unset = every CT of --data_dir, or of the store
        sections: sections of the list
    """

    store_dir: str | None = None
    data_dir: str | None = None
    json_list: str | None = None
    sections: tuple[str, ...] = SECTIONS


@dataclass(frozen=True)
class CaseSource:
    """Case names, how to read one's CT as a canonical int16 volume, and a text that changes when that CT does.

    The text is empty where it is not known.
    """

    names: list[str]
    read: Callable[[str], Volume]
    identity: Callable[[str], str] = lambda name: ""


def open_cases(options: CaseOptions, rank: int = 0, mr_percentiles: tuple[float, float] | None = None) -> CaseSource:
    """The cases that the options ask for; rank 0 prints which listed ones are left out, as the store lacks them.

    Args:
        mr_percentiles: the cases are MR, mapped by these percentiles (`datasets.ct.mr`); None = CT.

    Raises:
        ValueError: neither store nor folder, a store of another kind, or no cases.
    """
    if options.store_dir is None and options.data_dir is None:
        raise ValueError("no volumes to read: pass --store_dir, or --data_dir (with --json_list or without)")
    listed = None
    if options.json_list:  # files must exist only where they are read
        must_exist = options.store_dir is None
        listed = load_sections(options.json_list, options.data_dir or ".", options.sections, must_exist)
    if options.store_dir is not None:
        store = VolumeStore(options.store_dir)
        check_kind(store.store_dir, CT if mr_percentiles is None else MR, mr_percentiles)
        names = store.names if listed is None else _stored_cases(store, [case.name for case in listed], rank)
        if not names:
            raise ValueError(f"{options.store_dir}: the store holds no case; scripts/prepare_volumes.py fills it")
        return CaseSource(list(names), store.read, lambda name: store.record(name).identity)
    cases = find_cases(options.data_dir) if listed is None else listed
    image_of = {case.name: case.image for case in cases}

    def identity(name: str) -> str:
        try:
            return f"file:{stamp_of([image_of[name]])}"
        except CTReadError:
            return ""

    read = read_ct if mr_percentiles is None else partial(read_mr, percentiles=mr_percentiles)
    return CaseSource(list(image_of), lambda name: read(image_of[name]), identity)


def _stored_cases(store: VolumeStore, names: list[str], rank: int) -> list[str]:
    """Those of the listed cases that are stored: one file that nobody can read must not stop all others."""
    stored, absent = [name for name in names if name in store], [name for name in names if name not in store]
    message = (
        f"{store.store_dir}: {len(absent)} of {len(names)} listed cases are not in the store, first "
        f"{', '.join(absent[:5])}; scripts/prepare_volumes.py names the reasons in failures.json"
    )
    if not stored:
        raise ValueError(f"{message}. Do --store_dir and --json_list belong together?")
    if absent and rank == 0:
        print(f"left out: {message}", file=sys.stderr)
    return stored
