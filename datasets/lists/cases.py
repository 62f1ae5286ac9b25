"""A case: one scan and what belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.ct.images import CT, RADIOGRAPH, kind_of

MAX_NAME_BYTES = 180  # file systems take 255, endings included


class DataListError(ValueError):
    """A data folder or data list that cannot be used; the message names it and says what to change."""


@dataclass(frozen=True)
class Case:
    """One CT, MR or radiograph.

    Attributes:
        name: unique in its list.
        image: its file, or the folder of its DICOM series.
        further_channels: of an MR in several files, those after `image`, in the order of the channels.
        label: its label file, if there is one.
        group: the patient. Scans of one group stay on one side of a split and are no pairs. Empty = one of its own.
        weight: how often finetuning draws the case, relative to others; more than 0.
    """

    name: str
    image: Path
    label: Path | None = None
    group: str = ""
    further_channels: tuple[Path, ...] = ()
    weight: float = 1.0

    @property
    def source(self) -> Path | tuple[Path, ...]:
        """What the image is read from: its file, or its channels' files."""
        return (self.image, *self.further_channels) if self.further_channels else self.image

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
