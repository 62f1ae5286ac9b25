"""Where an entry point's volumes come from: a volume store, a data list, or simply a folder of CT files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets.data_list import Case, find_cases, load_data_list
from datasets.nifti import Volume, read_ct
from datasets.volume_store import VolumeStore

SECTIONS = ("training", "validation")


@dataclass(frozen=True)
class CaseSource:
    """Case names, and how to read one's CT as a canonical int16 volume."""

    names: list[str]
    read: Callable[[str], Volume]


def open_cases(
    store_dir: str | None = None,
    data_dir: str | None = None,
    json_list: str | None = None,
    sections: Sequence[str] = SECTIONS,
) -> CaseSource:
    """The cases that the flags of the same names speak of.

    Args:
        store_dir: a volume store; with `json_list`, only the cases of its sections.
        data_dir: folder of the CT files; what the list's paths are relative to.
        json_list: data list; without one, every CT below `data_dir` is a case.
        sections: of the list.

    Raises:
        ValueError: neither store nor folder, or no cases.
    """
    if store_dir is None and data_dir is None:
        raise ValueError("no volumes to read: pass --store_dir, or --data_dir (with --json_list or without)")
    listed = _listed_cases(data_dir or ".", json_list, sections, must_exist=store_dir is None) if json_list else None
    if store_dir is not None:
        store = VolumeStore(store_dir, None if listed is None else [case.name for case in listed])
        return CaseSource(list(store.names), store.read)
    cases = find_cases(data_dir) if listed is None else listed
    image_of = {case.name: case.image for case in cases}
    if not image_of:
        raise ValueError(f"{json_list or data_dir}: no cases in {', '.join(sections)} (--sections)")
    return CaseSource(list(image_of), lambda name: read_ct(image_of[name]))


def _listed_cases(data_dir: str, json_list: str, sections: Sequence[str], must_exist: bool) -> list[Case]:
    """Cases of all sections, each once, in the list's order."""
    cases = {}
    for section in sections:
        for case in load_data_list(json_list, data_dir, section, must_exist=must_exist):
            cases[case.name] = case
    return list(cases.values())
