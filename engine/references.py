"""Where the labels that a command carries to other scans come from: label maps of its flags, or phantoms."""

from collections.abc import Iterable, Sequence

import numpy as np

from datasets.ct.nifti import Volume
from datasets.lists.label_classes import FLARE22, LabelClasses
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.matching.kept import SHIPPED_REFERENCES, load_references
from sam_embed.matching.reference import Reference

PHANTOMS = "phantoms"  # what a flag says instead of files


def classes_of(labels: Iterable[Volume]) -> LabelClasses:
    """All label values of some label maps, each named by its number.

    Raises:
        ValueError: they hold nothing but 0, or more than 255 values.
    """
    values, paths = {0}, []
    for label in labels:
        values |= set(np.unique(label.array).tolist())
        paths.append(label.path)
    values = sorted(values - {0})
    if not values:
        raise ValueError(f"--labels {' '.join(paths)}: every voxel is 0; expected label maps with organs")
    return LabelClasses((0, *values), ("background", *(f"label {value}" for value in values)))


def open_phantoms() -> tuple[list[Reference], LabelClasses]:
    """The phantoms that come with the repository, and the classes of the organs that they may name."""
    references, facts = load_references(SHIPPED_REFERENCES)
    values = [FLARE22.index(organ) + 1 for organ in facts["organs"]]
    return references, LabelClasses((0, *values), ("background", *facts["organs"]))


def check_embedded_by(references: Sequence[Reference], info: EmbedderInfo, checkpoint_file: str, flag: str) -> None:
    """Check that phantoms were embedded with the network of a checkpoint.

    Args:
        flag: that asked for phantoms, with its dashes.

    Raises:
        ValueError: with another one.
    """
    theirs = references[0].embedding.fingerprint
    if theirs != info.fingerprint:
        raise ValueError(
            f"{checkpoint_file} is SAM {info.fingerprint}, and the phantoms were embedded with SAM {theirs}; leave "
            f"--checkpoint_file away with {flag} {PHANTOMS}"
        )
