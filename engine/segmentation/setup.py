"""What finetuning takes over from pretraining: preprocessing and network size, from the weights unless flags differ.

Weights that were trained at one voxel size, HU window or axis order and finetuned at another lose much of their gain,
silently. So every value comes from the weights' own description; a flag wins, with a warning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

AXCODES = "SPL"
DEFAULTS = {"spacing_mm": [2.0, 1.5, 1.5], "hu_min": -125.0, "hu_max": 225.0, "roi": [96, 96, 96]}
FLAG_OF = {"spacing_mm": "--spacing_mm", "hu_min": "--a_min", "hu_max": "--a_max", "roi": "--roi_z, --roi_y, --roi_x"}


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes the network's input.

    Attributes:
        spacing_mm: (D, H, W) of the network's grid; None = each file's own.
        hu_min, hu_max: what becomes [0, 1].
        roi: (D, H, W) of a crop or window, voxels.
    """

    spacing_mm: tuple[float, float, float] | None
    hu_min: float
    hu_max: float
    roi: tuple[int, int, int]

    def as_dict(self) -> dict:
        """Plain values under the names that checkpoints use."""
        spacing = "native" if self.spacing_mm is None else list(self.spacing_mm)
        return {
            "axcodes": AXCODES,
            "spacing_mm": spacing,
            "hu_min": self.hu_min,
            "hu_max": self.hu_max,
            "roi": list(self.roi),
        }

    @classmethod
    def from_dict(cls, plain: dict) -> "Preprocessing":
        spacing = plain["spacing_mm"]
        return cls(
            None if spacing == "native" else tuple(float(value) for value in spacing),
            float(plain["hu_min"]),
            float(plain["hu_max"]),
            tuple(int(side) for side in plain["roi"]),
        )


def settle_preprocessing(given: dict, described: dict, in_store: object = None) -> tuple[Preprocessing, list[str]]:
    """Decide on every value: the flag, else what the weights say, else the store's spacing, else the default.

    Args:
        given: values of flags under the names of `DEFAULTS`, None where a flag was not used; a `roi` may hold None for
            single sides.
        described: "preprocessing" of the weights' description; empty where there is none.
        in_store: spacing of a store that is there already, as in `given`; None = no store.

    Returns:
        The preprocessing, and warnings for the user.

    Raises:
        ValueError: a window that is none.
    """
    chosen, warnings = {}, []
    for name, default in DEFAULTS.items():
        from_weights = described.get(name)
        fallback = in_store if name == "spacing_mm" and in_store is not None else default
        base = fallback if from_weights is None else from_weights
        flag = given.get(name)
        if name == "roi":
            flag = [own if own is not None else side for own, side in zip(flag or [None] * 3, base)]
        chosen[name] = base if flag is None else flag
        if from_weights is not None and not agree(chosen[name], from_weights) and name != "roi":
            warnings.append(
                f"{FLAG_OF[name]} {told(chosen[name])} differs from the {told(from_weights)} that the weights were "
                "trained with; leave the flag away to keep what they know"
            )
    if described.get("axcodes", AXCODES) != AXCODES:
        warnings.append(
            f"the weights were trained on volumes in axis order {described['axcodes']}, here it is {AXCODES}: expect "
            "little of them"
        )
    settled = Preprocessing.from_dict(chosen)
    if settled.hu_min >= settled.hu_max:
        raise ValueError(f"--a_min {settled.hu_min:g} --a_max {settled.hu_max:g}: expected a_min below a_max (HU)")
    return settled, warnings


def agree(one: object, other: object) -> bool:
    """Whether two values mean the same, numbers to a thousandth."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    pairs = list(zip(one, other)) if isinstance(one, Sequence) else [(one, other)]
    return all(abs(float(a) - float(b)) <= 1e-3 * max(1.0, abs(float(b))) for a, b in pairs)


def told(value: object) -> str:
    """A value as one would type it."""
    return (
        value
        if isinstance(value, str)
        else " ".join(f"{v:g}" for v in (value if isinstance(value, Sequence) else [value]))
    )


def settle_network(name: str | None, feature_size: int | None, described: dict) -> tuple[str, int, list[str]]:
    """Backbone and feature size: the flag, else what the weights say, else swin_unetr of 48.

    Args:
        described: "backbone" of the weights' description.

    Returns:
        Name, feature size, and warnings.
    """
    warnings = [
        f"{flag} {value} differs from the weights' {described[key]}"
        for flag, value, key in (("--backbone", name, "name"), ("--feature_size", feature_size, "feature_size"))
        if value is not None and described.get(key) not in (None, value)
    ]
    if name is None:
        name = described.get("name", "swin_unetr")
    if feature_size is None:
        feature_size = int(described.get("feature_size", 48))
    return name, feature_size, warnings
