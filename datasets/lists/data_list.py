"""Decathlon data lists (JSON): which cases there are.

A list has `training` and `validation` sections of {"image": ..., "label": ..., "name": ..., "group": ...}, paths
relative to the data folder; MONAI reads it too. Scans of one patient have the same "group". A case whose labels are
less sure may have a "weight" below 1. In unlabelled lists an entry may also be just the image's path. The "image" of an
MR may be a list of files, one for each channel.
"""

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from datasets.ct.images import CT, MR, RADIOGRAPH
from datasets.lists.cases import MAX_NAME_BYTES, Case, DataListError, is_file_name, kind_of_cases
from datasets.lists.names import unique_names
from datasets.store.files import write_text

MODALITIES = {CT: "CT", RADIOGRAPH: "X-ray", MR: "MRI"}


def write_data_list(
    path: str | Path,
    data_dir: str | Path,
    training: Sequence[Case],
    validation: Sequence[Case] = (),
    labels: dict[str, str] | None = None,
    unreadable: dict[str, str] | None = None,
    name: str = "",
    is_mr: bool = False,
) -> None:
    """Write a Decathlon list.

    Args:
        path: the JSON file.
        data_dir: what image and label paths are made relative to; files outside of it keep their absolute path.
        training, validation: the two sections.
        labels: label value -> what it is.
        unreadable: file -> reason, for files that were left out.
        name: of the data set; empty takes the folder's.
        is_mr: whether volumes are MR, which their names do not say.
    """
    kind = kind_of_cases([*training, *validation])
    content = {
        "name": name or Path(data_dir).resolve().name,
        "description": f"{len(training)} training and {len(validation)} validation cases",
        "modality": {"0": MODALITIES[MR if is_mr and kind == CT else kind]},
        "labels": labels or {"0": "background"},
        "training": [_entry(case, Path(data_dir)) for case in training],
        "validation": [_entry(case, Path(data_dir)) for case in validation],
        "unreadable": unreadable or {},
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_data_list(
    json_list: str | Path, data_dir: str | Path, section: str = "training", must_exist: bool = True
) -> list[Case]:
    """The cases of one section, in the list's order.

    Args:
        json_list: a Decathlon list.
        data_dir: what its paths are relative to.
        section: "training", "validation" or another key; a list without "validation" has no such cases.
        must_exist: check that every file is there.

    Raises:
        DataListError: no such list or section, an entry without image, clashing names, or missing files.
    """
    json_list, data_dir = Path(json_list), Path(data_dir)
    content = read_json_list(json_list)
    for key in {"training", "validation", section} & content.keys():
        if not isinstance(content[key], list):
            raise DataListError(f"{json_list}: {key!r} is a {type(content[key]).__name__}, expected a list of cases")
    sections = {key: value for key, value in content.items() if isinstance(value, list)}
    if section not in sections and section != "validation":
        raise DataListError(f"{json_list}: no section {section!r}; it has {', '.join(sorted(sections)) or 'none'}")
    cases = _named_cases(sections, section, json_list, data_dir)
    if must_exist:
        files = [
            file for case in cases for file in (case.image, *case.further_channels, case.label) if file is not None
        ]
        missing = [str(file) for file in files if not file.exists()]
        if missing:
            raise DataListError(
                f"{json_list}: {len(missing)} of {len(files)} files are missing, first {', '.join(missing[:3])}. Paths "
                f"are relative to --data_dir, which is {data_dir}."
            )
    return cases


def load_sections(
    json_list: str | Path, data_dir: str | Path, sections: Sequence[str], must_exist: bool = True
) -> list[Case]:
    """The cases of several sections, each once; as `load_data_list`, with an error where there is no case at all."""
    listed = (load_data_list(json_list, data_dir, section, must_exist) for section in sections)
    cases = list({case.name: case for part in listed for case in part}.values())
    if not cases:
        raise DataListError(f"{json_list}: no cases in {', '.join(sections)} (--sections)")
    return cases


def _entry(case: Case, data_dir: Path) -> dict[str, str | float | list[str]]:
    """A list entry; keys that do not apply are left out."""
    files = {"image": case.image, "label": case.label}
    entry = {key: _relative(file, data_dir) for key, file in files.items() if file is not None} | {"name": case.name}
    if case.further_channels:
        entry["image"] = [_relative(file, data_dir) for file in case.source]
    entry |= {"group": case.group} if case.group else {}
    return entry | ({"weight": case.weight} if case.weight != 1 else {})


def _relative(file: Path, data_dir: Path) -> str:
    try:
        return file.relative_to(data_dir).as_posix()
    except ValueError:
        return str(file.resolve())


def read_json_list(json_list: str | Path) -> dict:
    """The content of a data list; DataListError where there is none, or it is no JSON object."""
    try:
        content = json.loads(Path(json_list).read_text())
    except FileNotFoundError as error:
        raise DataListError(f"{json_list}: no such data list. Write one with scripts/create_json.py.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataListError(f"{json_list}: not a JSON data list ({error})") from error
    if not isinstance(content, dict):
        raise DataListError(
            f"{json_list}: expected an object with a 'training' section, received a {type(content).__name__}"
        )
    return content


def _named_cases(sections: dict[str, list], section: str, json_list: Path, data_dir: Path) -> list[Case]:
    """The cases of a section; entries without a name get one that is unique among all sections."""
    entries = [(key, entry) for key in sorted(sections) for entry in sections[key]]
    plain = [entry if isinstance(entry, dict) else {"image": entry} for _, entry in entries]
    further = []
    for entry, (key, received) in zip(plain, entries):
        files = entry.get("image")
        files = files if isinstance(files, list) and files else [files]
        if not all(isinstance(file, str) and "\0" not in file for file in files):
            raise DataListError(f"{json_list}: an entry of {key!r} has no 'image' path: {received!r}")
        further.append(files[1:])
    plain = [entry | {"image": entry["image"][0]} if isinstance(entry["image"], list) else entry for entry in plain]
    unnamed = [entry["image"] for entry in plain if entry.get("name") in (None, "")]
    unnamed = list(dict.fromkeys(unnamed))  # an image may stand in two sections
    given = dict(zip(unnamed, unique_names(unnamed)))
    cases, image_of, groups = [], {}, defaultdict(set)
    for entry, (key, _), channels in zip(plain, entries, further):
        label, name = entry.get("label"), entry.get("name")
        name = given[entry["image"]] if name in (None, "") else name
        if not is_file_name(name):
            raise DataListError(
                f"{json_list}: the entry of {entry['image']} is called {name!r:.80}, which cannot be the name of its "
                f"files (text without / or a leading ., of at most {MAX_NAME_BYTES} bytes)"
            )
        if image_of.setdefault(name, entry["image"]) != entry["image"]:
            raise DataListError(f"{json_list}: {image_of[name]} and {entry['image']} are both called {name!r}")
        if not isinstance(label, str | None):
            raise DataListError(f"{json_list}: the label of {name} is {label!r}, expected a path")
        if not isinstance(group := entry.get("group", ""), str):
            raise DataListError(f"{json_list}: the group of {name} is {group!r}, expected text")
        groups[key].add(group)
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise DataListError(f"{json_list}: the weight of {name} is {weight!r}, expected a number more than 0")
        if key == section:
            files = data_dir / entry["image"], data_dir / label if label else None
            further = tuple(data_dir / file for file in channels)
            cases.append(Case(name, *files, group, further, float(weight)))
    if on_both_sides := sorted(groups["training"] & groups["validation"] - {""}):
        warnings.warn(
            f"{json_list}: 'training' and 'validation' both hold scans of {len(on_both_sides)} patients ('group'): "
            f"{', '.join(on_both_sides[:3])}. What is held out is then not new; scripts/create_json.py keeps "
            "patients apart",
            stacklevel=3,
        )
    if min(len({case.name for case in cases}), len({case.image for case in cases})) < len(cases):
        raise DataListError(f"{json_list}: two entries of {section!r} have the same name or image")
    return cases
