"""Finding CT or radiographs, and their labels, in the layouts people have."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.ct.dicom import SLICE_SUFFIXES, is_dicom
from datasets.ct.formats import EXPECTED, is_volume_file
from datasets.lists.cases import Case, DataListError
from datasets.lists.names import (
    IMAGE_START,
    IMAGE_STEMS,
    LABEL_START,
    LABEL_STEMS,
    PICTURE_SUFFIXES,
    full_stem,
    plain_stem,
    says_label,
    subject,
    unique_names,
    without_ending,
    without_start,
)

LABEL_FOLDERS = ("seg", "segs", "segmentation", "segmentations", "mask", "masks", "annotations", "gt")
IMAGE_FOLDERS = (*IMAGE_STEMS, "imgs", "volumes", "scans")
META_DATA = (".raw", ".zraw")  # voxels of the .mhd file of the same name
NUM_PROBED = 8  # files of a folder that are opened to see whether they are DICOM

# Kinds of what is seen and not taken, beside file suffixes.
NO_SUFFIX = "files without suffix"
EMPTY_FOLDERS = "empty folders"
BESIDE_IMAGE = "volumes beside a ct, image or the like"
LONE_LABELS = "labels without an image"
ORGAN_MASKS = "masks beside a ct (of single organs? scripts/merge_organs.py joins them)"
JOINED_MASKS = "masks beside a ct that has a label"
NUM_KINDS_SHOWN = 8


@dataclass
class Found:
    """What lies below a folder.

    Attributes:
        cases: sorted by name.
        not_taken: kind -> how many files or folders were seen and not taken; hidden ones do not count.
    """

    cases: list[Case] = field(default_factory=list)
    not_taken: Counter[str] = field(default_factory=Counter)

    def describe_not_taken(self) -> str:
        """As `3 .png, 2 empty folders`; empty where everything was taken."""
        kinds = sorted(self.not_taken.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{number} {kind}" for kind, number in kinds[:NUM_KINDS_SHOWN])
        more = sum(number for _, number in kinds[NUM_KINDS_SHOWN:])
        return shown + (f", {more} others" if more else "")


def find_cases(data_dir: str | Path) -> list[Case]:
    """The cases of `search`."""
    return search(data_dir).cases


def search(data_dir: str | Path) -> Found:
    """All CT volumes below a folder, or all radiographs where there is no CT.

    Understood are FLARE22 / nnU-Net / Decathlon folders (`images*/X_0000.nii.gz` or `X.nii.gz`, the label `X.nii.gz` in
    a folder that has "label", "seg" or the like as a word of its name), one folder per case (`<case>/ct.nii.gz`,
    `<case>/label.nii.gz`; other volumes beside a `ct.nii.gz` are not images), and any other tree of volume files,
    where `X_label`, `X_seg` or `label_X` is the label of `X`, and `segmentation-0` or `label0` that of `volume-0` or
    `img0`. Volume files are `.nii`, `.nii.gz`, `.mha`, `.mhd` and `.nrrd`. A folder of DICOM files is an image, unless
    it also holds a volume file that is not named like a label (its conversion). Names starting with a dot are skipped.
    Radiographs are `.png` files in the same layouts; beside CT they count as previews and are left out.

    Raises:
        DataListError: the folder is missing or holds no image, two images have one name, or a case has two labels.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataListError(f"{data_dir}: no such folder (--data_dir)")
    volumes, pictures, not_taken = _seen(data_dir)
    files = sorted(volumes or pictures)
    if volumes:
        not_taken.update(file.suffix for file in pictures)
    images, labels, case_folders = _sort_files(files, data_dir)
    not_taken[BESIDE_IMAGE] += len(files) - len(images) - len(labels)
    if not images:
        not_taken[LONE_LABELS] += len(labels)
        seen = Found(not_taken=+not_taken).describe_not_taken() or "nothing"
        raise DataListError(
            f"{data_dir}: no images found below it. Expected {EXPECTED}, or .png files, that are not named like "
            f"labels, and outside of folders named label*, {', '.join(LABEL_FOLDERS)}. Seen: {seen}. Is --data_dir "
            "right?"
        )
    label_of = _match_labels(images, labels, data_dir)
    labelled_folders = {image.parent for image in label_of}
    for label in set(labels) - set(label_of.values()):
        folder = _label_folder(label, data_dir)
        masks = JOINED_MASKS if folder and folder.parent in labelled_folders else ORGAN_MASKS
        not_taken[masks if folder and folder.parent in case_folders else LONE_LABELS] += 1
    # A folder of slices may be searched itself; it then lies at "." of itself.
    relative = [data_dir.resolve().name if image == data_dir else _relative(image, data_dir) for image in images]
    cases = [Case(name, image, label_of.get(image)) for name, image in zip(unique_names(relative), images)]
    return Found(sorted(cases, key=lambda case: case.name), +not_taken)


def _relative(file: Path, data_dir: Path) -> str:
    return file.relative_to(data_dir).as_posix()


def _seen(data_dir: Path) -> tuple[list[Path], list[Path], Counter[str]]:
    """Volume files and folders of DICOM slices, pictures, and how many files of other kinds and empty folders."""
    volumes, pictures, others = [], [], Counter()
    for folder, files, is_empty in _folders(data_dir):
        here = {file for file in files if is_volume_file(file)}
        shown = {file for file in files if file.name.endswith(PICTURE_SUFFIXES)}
        taken = here | shown
        rest = [file for file in files if file not in taken and not _is_meta_data(file, here)]
        volumes += here
        pictures += shown
        if all(says_label(file) for file in here) and _holds_slices(rest):
            volumes.append(folder)
        else:
            others.update(_kind(file) for file in rest)
        others[EMPTY_FOLDERS] += is_empty
    return volumes, pictures, others


def _folders(top: Path) -> Iterator[tuple[Path, list[Path], bool]]:
    """Each folder with its files and whether it is empty; follows links, no hidden names, no folder twice."""
    visited = set()
    for parent, folders, names in os.walk(top, followlinks=True):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in visited:  # a link to a folder above, or beside
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        yield Path(parent), files, not (folders or files)


def _is_meta_data(file: Path, volumes: set[Path]) -> bool:
    return file.suffix in META_DATA and file.with_suffix(".mhd") in volumes


def _holds_slices(files: Sequence[Path]) -> bool:
    """Whether one of the first files, those named like slices before all others, is DICOM."""
    likely_first = sorted(files, key=lambda file: file.suffix.lower() not in SLICE_SUFFIXES)
    return any(is_dicom(file) for file in likely_first[:NUM_PROBED])


def _kind(file: Path) -> str:
    """The suffix; a number is none (slices are often called by their UID)."""
    suffix = file.suffix.lower()
    return NO_SUFFIX if suffix[1:].isdigit() or not suffix else suffix


def _sort_files(files: Sequence[Path], data_dir: Path) -> tuple[list[Path], list[Path], set[Path]]:
    """Images, labels and folders with a `ct.nii.gz` or the like; what lies beside one and is neither is dropped."""
    case_folders = {file.parent for file in files if plain_stem(file).lower() in IMAGE_STEMS}
    subjects = {(file.parent, plain_stem(file)) for file in files}
    images, labels = [], []
    for file in files:
        stem = plain_stem(file).lower()
        beside_image = without_ending(file) != plain_stem(file) and (file.parent, without_ending(file)) in subjects
        if stem in LABEL_STEMS or LABEL_START.match(stem) or beside_image or _label_folder(file, data_dir):
            labels.append(file)
        elif file.parent not in case_folders or stem in IMAGE_STEMS:
            images.append(file)
    return images, labels, case_folders


def _match_labels(images: Sequence[Path], labels: Sequence[Path], data_dir: Path) -> dict[Path, Path]:
    """Image -> label, for the images that have one."""
    by_stem, by_number = defaultdict(list), defaultdict(list)
    for label in labels:
        number = without_start(label, LABEL_START)
        for stem in {subject(label), without_ending(label), number}:
            by_stem[stem].append(label)
        if number != plain_stem(label):
            by_number[number].append(label)
    label_of = {}
    for image in images:
        label = _label_of(image, by_stem[subject(image)], data_dir)
        if label is None and (number := without_start(image, IMAGE_START)) != plain_stem(image):
            label = _label_of(image, by_number[number], data_dir)
        if label is not None:
            label_of[image] = label
    return label_of


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
    stem = plain_stem(file)
    if without_ending(file) != stem:
        return False
    if full_stem(file.name) != stem or stem.lower() in IMAGE_STEMS or IMAGE_START.match(stem):
        return True
    return any(word in IMAGE_FOLDERS or word.startswith("images") for name in folder_names for word in _words(name))


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def _label_of(image: Path, named_alike: Sequence[Path], data_dir: Path) -> Path | None:
    """The label of an image among those named like it: one from the same part of the tree, the nearest."""
    around = (image, *image.parents)  # a label may lie among the slices of its image
    candidates = [label for label in named_alike if (_label_folder(label, data_dir) or label).parent in around]
    if not candidates:
        return None
    shared = [len(os.path.commonpath([image, label])) for label in candidates]
    best = [label for label, length in zip(candidates, shared) if length == max(shared)]
    if len(best) > 1:
        raise DataListError(f"{image}: has several labels: {', '.join(map(str, best))}; move all but one elsewhere")
    return best[0]
