"""What the name of a file or folder says: whose it is, and whether it is an image or a label."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets.ct.formats import VOLUME_SUFFIXES
from datasets.lists.cases import DataListError

PICTURE_SUFFIXES = (".png",)
CHANNEL_SUFFIX = "_0000"  # nnU-Net and FLARE name the first channel of an image so, and the label without it
# File names that say what a file is, not whose: the case is then named after its folder.
IMAGE_STEMS = ("ct", "image", "imaging", "img", "volume", "scan")
LABEL_STEMS = ("label", "labels", "seg", "segmentation", "mask")
DICOM_STEMS = ("dicom", "dcm")  # of folders
LABEL_ENDINGS = tuple(f"{joint}{stem}" for stem in LABEL_STEMS for joint in "_-.")
# Numbered by kind, as `volume-0` and `segmentation-0` (LiTS), `labels-1` (CT-ORG) or `img0001` and `label0001` (BTCV).
IMAGE_START = re.compile(rf"(?:{'|'.join(IMAGE_STEMS)})(?:[-_. ]+(?=.)|(?=\d))", re.IGNORECASE)
LABEL_START = re.compile(rf"(?:{'|'.join(LABEL_STEMS)})(?:[-_. ]+(?=.)|(?=\d))", re.IGNORECASE)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Case names of image paths (relative, with `/`): the file's stem, or its folder for `ct.nii.gz` and the like.

    Where two would be the same, the folders above are put in front, as in `siteA__case1`.

    Raises:
        DataListError: two are the same even so.
    """
    subjects = [subject(Path(path)) for path in paths]
    counts = Counter(name.lower() for name in subjects)  # to some file systems upper and lower case are the same
    names = [
        name if counts[name.lower()] == 1 else "__".join(full_stem(path).lstrip("./").split("/"))
        for path, name in zip(paths, subjects)
    ]
    twice = sorted(name for name, count in Counter(name.lower() for name in names).items() if count > 1)
    if twice:
        raise DataListError(f"several images are called {', '.join(twice[:5])}; rename one or keep one format of it")
    return names


def subject(file: Path) -> str:
    """Whose file it is: its stem without channel number, or its folder where the stem says only what it is."""
    stem = plain_stem(file)
    if stem.lower() in IMAGE_STEMS + LABEL_STEMS + DICOM_STEMS and file.parent.name:
        return file.parent.name
    return stem


def says_label(file: Path) -> bool:
    """Whether a file's own name says that it is a label, as `label`, `seg_1` and `case1_mask` do."""
    stem = plain_stem(file)
    return stem.lower() in LABEL_STEMS or bool(LABEL_START.match(stem)) or without_ending(file) != stem


def without_ending(file: Path) -> str:
    """The stem of `X_label.nii.gz` without what says that it is a label."""
    stem = plain_stem(file)
    ending = next((ending for ending in LABEL_ENDINGS if stem.lower().endswith(ending)), "")
    return stem[: len(stem) - len(ending)]


def without_start(file: Path, start: re.Pattern) -> str:
    """The stem of `volume-0.nii` without the word that says what it is."""
    stem = plain_stem(file)
    found = start.match(stem)
    return stem[found.end() :] if found else stem


def plain_stem(file: Path) -> str:
    """The name without suffix and channel number."""
    return full_stem(file.name).removesuffix(CHANNEL_SUFFIX)


def full_stem(name: str) -> str:
    """A name or path without its suffix."""
    for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES):
        name = name.removesuffix(suffix)
    return name
