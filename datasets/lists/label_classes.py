"""What the label values mean: class names of a data list or of a well-known data set, and the way to channels and back.

A network's channel c stands for `values[c]`; channel 0 is background. Values that are not listed count as background,
so that a list may name only the organs of interest.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.lists.data_list import DataListError, read_json_list

FLARE22 = (
    *("liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland"),
    *("left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney"),
)
BTCV = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"),
)
BUILT_IN = {"flare22": FLARE22, "btcv": BTCV}
MAX_CLASSES = 256  # class maps are uint8


@dataclass(frozen=True)
class LabelClasses:
    """Label values and names by channel; the first is background.

    Raises:
        ValueError: no organ, a value twice, or more than 255 organs.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.names) or len(set(self.values)) < len(self.values):
            raise ValueError(f"label values {self.values} and names {self.names}: expected one name for each value")
        if not 2 <= len(self.values) <= MAX_CLASSES or self.values[0] != 0:
            raise ValueError(f"label values {self.values}: expected background (0) first, and 1 to 255 organs")

    def __len__(self) -> int:
        """Channels, with background."""
        return len(self.values)

    def to_classes(self, labels: np.ndarray) -> np.ndarray:
        """Label values of any shape -> channels (uint8); unlisted values become background."""
        table = np.zeros(max(int(labels.max(initial=0)), *self.values) + 1, dtype=np.uint8)
        table[list(self.values)] = np.arange(len(self.values), dtype=np.uint8)
        return table[labels]

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Channels of any shape -> label values, uint8 where they fit and int16 otherwise."""
        dtype = np.uint8 if max(self.values) <= 255 else np.int16
        return np.asarray(self.values, dtype=dtype)[classes]

    def as_dict(self) -> dict:
        """Plain values, for checkpoints."""
        return {"values": list(self.values), "names": list(self.names)}

    @classmethod
    def from_dict(cls, plain: dict) -> "LabelClasses":
        return cls(tuple(plain["values"]), tuple(plain["names"]))

    @classmethod
    def built_in(cls, name: str) -> "LabelClasses":
        """The 13 organs of "flare22" or "btcv"."""
        return cls(tuple(range(len(BUILT_IN[name]) + 1)), ("background", *BUILT_IN[name]))


def read_classes(json_list: str | Path, wanted: str = "list") -> LabelClasses:
    """The classes to segment.

    Args:
        json_list: a Decathlon list; its "labels" are {"1": "liver"} or, as nnU-Net writes them, {"liver": 1}.
        wanted: "list" for the list's own, or the name of a built-in set.

    Raises:
        DataListError: the list names no organ, or names it in a way that nobody understands.
    """
    if wanted in BUILT_IN:
        return LabelClasses.built_in(wanted)
    by_value = _by_value(read_json_list(json_list).get("labels", {}), json_list)
    by_value.pop(0, None)
    if not by_value:
        raise DataListError(
            f'{json_list}: its "labels" name no organ; write {{"labels": {{"0": "background", "1": "liver", ...}}}} '
            f"or choose --classes {' or '.join(BUILT_IN)}"
        )
    values = sorted(by_value)
    return LabelClasses((0, *values), ("background", *(by_value[value] for value in values)))


def _by_value(labels: object, json_list: str | Path) -> dict[int, str]:
    """{value: name} from either way of writing it."""
    try:
        pairs = [(key, int(value)) if isinstance(value, int) else (value, int(key)) for key, value in labels.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataListError(
            f'{json_list}: "labels" must be {{"1": "liver"}} or {{"liver": 1}}, received {labels!r}'
        ) from error
    return {value: str(name) for name, value in pairs}
