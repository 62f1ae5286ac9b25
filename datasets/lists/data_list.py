"""Which cases there are: finding CT or radiographs in the layouts people have, and Decathlon data lists (JSON).

A list has `training` and `validation` sections of {"image": ..., "label": ..., "name": ..., "group": ...}, paths
relative to the data folder; MONAI reads it too. Scans of one patient have the same "group". In unlabelled lists an
entry may also be just the image's path.
"""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.ct.images import CT, RADIOGRAPH, kind_of
from datasets.store.files import write_text

SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png",)
MODALITIES = {CT: "CT", RADIOGRAPH: "X-ray"}
CHANNEL_SUFFIX = "_0000"  # nnU-Net and FLARE name the first channel of an image so, and the label without it
# File names that say what a file is, not whose: the case is then named after its folder.
IMAGE_STEMS = ("ct", "image", "imaging", "img", "volume", "scan")
LABEL_STEMS = ("label", "labels", "seg", "segmentation", "mask")
LABEL_ENDINGS = tuple(f"{joint}{stem}" for stem in LABEL_STEMS for joint in "_-.")
LABEL_FOLDERS = ("seg", "segs", "segmentation", "segmentations", "mask", "masks", "annotations", "gt")
IMAGE_FOLDERS = (*IMAGE_STEMS, "imgs", "volumes", "scans")
# Numbered by kind, as `volume-0` and `segmentation-0` (LiTS), `labels-1` (CT-ORG) or `img0001` and `label0001` (BTCV).
IMAGE_START = re.compile(rf"(?:{'|'.join(IMAGE_STEMS)})(?:[-_. ]+(?=.)|(?=\d))", re.IGNORECASE)
LABEL_START = re.compile(rf"(?:{'|'.join(LABEL_STEMS)})(?:[-_. ]+(?=.)|(?=\d))", re.IGNORECASE)

MAX_NAME_BYTES = 180  # file systems take 255, endings included


class DataListError(ValueError):
    """A data folder or data list that cannot be used; the message names it and says what to change."""


@dataclass(frozen=True)
class Case:
    """One CT or radiograph.

    Attributes:
        name: unique in its list.
        image: its file.
        label: its label file, if there is one.
        group: the patient. Scans of one group stay on one side of a split and are no pairs. Empty = one of its own.
    """

    name: str
    image: Path
    label: Path | None = None
    group: str = ""

    @property
    def patient(self) -> str:
        """The group, or else the name: equal for scans of one patient."""
        return self.group or self.name


def is_file_name(name: object) -> bool:
    """Whether a case may be called so: its files then lie in the folder that they are meant for."""
    if not isinstance(name, str) or "\0" in name or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        return False
    return bool(name) and not name.startswith(".") and Path(name).name == name


def kind_of_cases(cases: Sequence[Case]) -> str:
    """CT or RADIOGRAPH, by the files' names; CT where there are none.

    Raises:
        DataListError: some are one and some the other.
    """
    first = {kind_of(case.image): case for case in reversed(cases)}
    if len(first) > 1:
        raise DataListError(
            f"{first[CT].image} is a CT and {first[RADIOGRAPH].image} a radiograph; give each kind its own data list"
        )
    return next(iter(first), CT)


def find_cases(data_dir: str | Path) -> list[Case]:
    """All CT volumes below a folder, or all radiographs where there is no CT, sorted by name.

    Understood are FLARE22 / nnU-Net / Decathlon folders (`images*/X_0000.nii.gz` or `X.nii.gz`, the label `X.nii.gz` in
    a folder that has "label", "seg" or the like as a word of its name), one folder per case (`<case>/ct.nii.gz`,
    `<case>/label.nii.gz`; other NIfTI files beside a `ct.nii.gz` are not images), and any other tree of `.nii` and
    `.nii.gz` files, where `X_label`, `X_seg` or `label_X` is the label of `X`, and `segmentation-0` or `label0` that of
    `volume-0` or `img0`. Names starting with a dot are skipped. Radiographs are `.png` files in the same layouts;
    beside NIfTI files they count as previews and are left out.

    Raises:
        DataListError: the folder is missing or holds no image, or a case has two labels.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataListError(f"{data_dir}: no such folder (--data_dir)")
    files = sorted(_files(data_dir, SUFFIXES)) or sorted(_files(data_dir, PICTURE_SUFFIXES))
    images, labels = _sort_files(files, data_dir)
    if not images:
        raise DataListError(
            f"{data_dir}: no images found below it. Expected .nii, .nii.gz or .png files that are not named like "
            f"labels, and outside of folders named label*, {', '.join(LABEL_FOLDERS)} ({len(labels)} label files were "
            "seen). Is --data_dir right?"
        )
    by_stem, by_number = defaultdict(list), defaultdict(list)
    for label in labels:
        number = _without_start(label, LABEL_START)
        for stem in {_subject(label), _without_ending(label), number}:
            by_stem[stem].append(label)
        if number != _plain_stem(label):
            by_number[number].append(label)
    names = unique_names([image.relative_to(data_dir).as_posix() for image in images])
    cases = []
    for name, image in zip(names, images):
        label = _label_of(image, by_stem[_subject(image)], data_dir)
        if label is None and (number := _without_start(image, IMAGE_START)) != _plain_stem(image):
            label = _label_of(image, by_number[number], data_dir)
        cases.append(Case(name, image, label))
    return sorted(cases, key=lambda case: case.name)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Case names of image paths (relative, with `/`): the file's stem, or its folder for `ct.nii.gz` and the like.

    Where two would be the same, the folders above are put in front, as in `siteA__case1`.
    """
    subjects = [_subject(Path(path)) for path in paths]
    counts = Counter(subject.lower() for subject in subjects)  # to some file systems upper and lower case are the same
    names = [
        subject if counts[subject.lower()] == 1 else "__".join(_stem(path).lstrip("./").split("/"))
        for path, subject in zip(paths, subjects)
    ]
    twice = sorted(name for name, count in Counter(name.lower() for name in names).items() if count > 1)
    if twice:
        raise DataListError(f"several images are called {', '.join(twice[:5])}; rename one or keep one format of it")
    return names


def write_data_list(
    path: str | Path,
    data_dir: str | Path,
    training: Sequence[Case],
    validation: Sequence[Case] = (),
    labels: dict[str, str] | None = None,
    unreadable: dict[str, str] | None = None,
    name: str = "",
) -> None:
    """Write a Decathlon list.

    Args:
        path: the JSON file.
        data_dir: what image and label paths are made relative to; files outside of it keep their absolute path.
        training, validation: the two sections.
        labels: label value -> what it is.
        unreadable: file -> reason, for files that were left out.
        name: of the data set; empty takes the folder's.
    """
    content = {
        "name": name or Path(data_dir).resolve().name,
        "description": f"{len(training)} training and {len(validation)} validation cases",
        "modality": {"0": MODALITIES[kind_of_cases([*training, *validation])]},
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
        files = [file for case in cases for file in (case.image, case.label) if file is not None]
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


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterable[Path]:
    """All files below a folder that end so, following links to folders but no hidden names; no folder twice."""
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in visited:  # a link to a folder above, or beside
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in files if name.endswith(suffixes) and not name.startswith("."))


def _sort_files(files: Sequence[Path], data_dir: Path) -> tuple[list[Path], list[Path]]:
    """Images and labels; what lies beside a `ct.nii.gz` and is neither is dropped."""
    case_folders = {file.parent for file in files if _plain_stem(file).lower() in IMAGE_STEMS}
    subjects = {(file.parent, _plain_stem(file)) for file in files}
    images, labels = [], []
    for file in files:
        stem = _plain_stem(file).lower()
        beside_image = _without_ending(file) != _plain_stem(file) and (file.parent, _without_ending(file)) in subjects
        if stem in LABEL_STEMS or LABEL_START.match(stem) or beside_image or _label_folder(file, data_dir):
            labels.append(file)
        elif file.parent not in case_folders or stem in IMAGE_STEMS:
            images.append(file)
    return images, labels


def _label_folder(file: Path, data_dir: Path) -> Path | None:
    """The folder of labels that a file lies in: the outermost below `data_dir` that is named like one."""
    folders = file.relative_to(data_dir).parents[:-1]  # the nearest first
    for position, folder in reversed(list(enumerate(folders))):
        named_so = folder.name.lower() in LABEL_FOLDERS or _starts_like_label(folder.name.lower())
        # `liver_segmentation/imagesTr/X` and `ct_with_labels/volume-0` only speak of labels.
        speaks_of_labels = any(word in LABEL_FOLDERS or _starts_like_label(word) for word in _words(folder.name))
        if named_so or (speaks_of_labels and not _says_image(file, [nearer.name for nearer in folders[:position]])):
            return data_dir / folder
    return None


def _starts_like_label(word: str) -> bool:
    return word.startswith("label") and not word.startswith(("labelled", "labeled"))


def _says_image(file: Path, folder_names: Sequence[str]) -> bool:
    """Whether a file's own name, or one of these folders', says that it is an image."""
    stem = _plain_stem(file)
    if _without_ending(file) != stem:
        return False
    if _stem(file.name) != stem or stem.lower() in IMAGE_STEMS or IMAGE_START.match(stem):
        return True
    return any(word in IMAGE_FOLDERS or word.startswith("images") for name in folder_names for word in _words(name))


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def _label_of(image: Path, named_alike: Sequence[Path], data_dir: Path) -> Path | None:
    """The label of an image among those named like it: one from the same part of the tree, the nearest."""
    candidates = [label for label in named_alike if ((_label_folder(label, data_dir) or label).parent) in image.parents]
    if not candidates:
        return None
    shared = [len(os.path.commonpath([image, label])) for label in candidates]
    best = [label for label, length in zip(candidates, shared) if length == max(shared)]
    if len(best) > 1:
        raise DataListError(f"{image}: has several labels: {', '.join(map(str, best))}; move all but one elsewhere")
    return best[0]


def _subject(file: Path) -> str:
    """Whose file it is: its stem without channel number, or its folder where the stem says only what it is."""
    stem = _plain_stem(file)
    if stem.lower() in IMAGE_STEMS + LABEL_STEMS and file.parent.name:
        return file.parent.name
    return stem


def _without_ending(file: Path) -> str:
    """The stem of `X_label.nii.gz` without what says that it is a label."""
    stem = _plain_stem(file)
    ending = next((ending for ending in LABEL_ENDINGS if stem.lower().endswith(ending)), "")
    return stem[: len(stem) - len(ending)]


def _without_start(file: Path, start: re.Pattern) -> str:
    """The stem of `volume-0.nii` without the word that says what it is."""
    stem = _plain_stem(file)
    found = start.match(stem)
    return stem[found.end() :] if found else stem


def _plain_stem(file: Path) -> str:
    return _stem(file.name).removesuffix(CHANNEL_SUFFIX)


def _stem(name: str) -> str:
    for suffix in SUFFIXES + PICTURE_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _entry(case: Case, data_dir: Path) -> dict[str, str]:
    """A list entry; keys that do not apply are left out."""
    files = {"image": case.image, "label": case.label}
    entry = {key: _relative(file, data_dir) for key, file in files.items() if file is not None} | {"name": case.name}
    return entry | ({"group": case.group} if case.group else {})


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
    for entry, (key, received) in zip(plain, entries):
        if not isinstance(entry.get("image"), str) or "\0" in entry["image"]:
            raise DataListError(f"{json_list}: an entry of {key!r} has no 'image' path: {received!r}")
    unnamed = [entry["image"] for entry in plain if entry.get("name") in (None, "")]
    unnamed = list(dict.fromkeys(unnamed))  # an image may stand in two sections
    given = dict(zip(unnamed, unique_names(unnamed)))
    cases, image_of, groups = [], {}, defaultdict(set)
    for entry, (key, _) in zip(plain, entries):
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
        if key == section:
            cases.append(Case(name, data_dir / entry["image"], data_dir / label if label else None, group))
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
