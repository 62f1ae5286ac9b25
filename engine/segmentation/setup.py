"""What finetuning takes over from pretraining: preprocessing and network size, from the weights unless flags differ.

Weights that were trained at one voxel size, HU window or axis order and finetuned at another lose much of their gain,
silently. So every value comes from the weights' own description; a flag wins, with a warning.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.ct.geometry import CANONICAL_AXCODES as AXCODES
from datasets.store.volumes import VolumeStore

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
        values = {"axcodes": AXCODES, "spacing_mm": plain_spacing(self.spacing_mm)}
        return values | {"hu_min": self.hu_min, "hu_max": self.hu_max, "roi": list(self.roi)}

    @classmethod
    def from_dict(cls, plain: dict) -> "Preprocessing":
        spacing = plain["spacing_mm"]
        return cls(
            None if spacing == "native" else tuple(float(value) for value in spacing),
            float(plain["hu_min"]),
            float(plain["hu_max"]),
            tuple(int(side) for side in plain["roi"]),
        )


@dataclass(frozen=True)
class Setup:
    """Preprocessing and network of one run.

    Attributes:
        notes: warnings for the user.
    """

    preprocessing: Preprocessing
    backbone: str
    feature_size: int
    notes: list[str] = field(default_factory=list, compare=False)


def resolve_setup(
    described: dict, given: dict, backbones: Collection[str], store_dir: str | Path | None = None
) -> Setup:
    """Decide on every value: the flag, else what the weights say, else the store's spacing, else the default.

    Args:
        described: the weights' description; empty where there is none.
        given: values of flags, None or absent where a flag was not used: "backbone", "feature_size", and those of
            `resolve_preprocessing`.
        backbones: known names.
        store_dir: a volume store, which may not exist yet.

    Raises:
        ValueError: a HU window whose ends are swapped, or an unknown backbone.
    """
    in_store = None
    if store_dir is not None and (Path(store_dir) / "store.json").exists():
        in_store = plain_spacing(VolumeStore(store_dir, names=()).spacing_mm)
    preprocessing, notes = resolve_preprocessing(given, described.get("preprocessing", {}), in_store)
    network = described.get("backbone", {})
    name, size, more = resolve_network(given.get("backbone"), given.get("feature_size"), network)
    if name not in backbones:
        raise ValueError(f"the weights' backbone (or --backbone) is {name!r}, expected one of {', '.join(backbones)}")
    return Setup(preprocessing, name, size, notes + more)


def plain_spacing(spacing_mm: Sequence[float] | None) -> list[float] | str:
    """Voxel size as checkpoints write it."""
    return "native" if spacing_mm is None else list(spacing_mm)


def resolve_preprocessing(given: dict, described: dict, in_store: object = None) -> tuple[Preprocessing, list[str]]:
    """The preprocessing, and warnings for the user.

    Args:
        given: values of flags under the names of `DEFAULTS`; a `roi` may hold None for single sides.
        described: "preprocessing" of the weights' description; empty where there is none.
        in_store: spacing of a store that is there already, as in `given`; None = no store.
    """
    chosen, warnings = {}, []
    for name, default in DEFAULTS.items():
        from_weights, flag = described.get(name), given.get(name)
        fallback = in_store if name == "spacing_mm" and in_store is not None else default
        base = fallback if from_weights is None else from_weights
        if name == "roi" and flag is not None:
            flag = [side if own is None else own for own, side in zip(flag, base)]
        chosen[name] = base if flag is None else flag
        if from_weights is not None and not agree(chosen[name], from_weights) and name != "roi":
            warnings.append(
                f"{FLAG_OF[name]} {as_typed(chosen[name])} differs from the {as_typed(from_weights)} that the weights "
                "were trained with; leave the flag away to keep what they know"
            )
    if described.get("axcodes", AXCODES) != AXCODES:
        warnings.append(
            f"the weights were trained on volumes in axis order {described['axcodes']}, here it is {AXCODES}: expect "
            "little of them"
        )
    found = Preprocessing.from_dict(chosen)
    if found.hu_min >= found.hu_max:
        raise ValueError(f"--a_min {found.hu_min:g} --a_max {found.hu_max:g}: expected a_min below a_max (HU)")
    return found, warnings


def agree(one: object, other: object) -> bool:
    """Whether two values mean the same, numbers to a thousandth."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    pairs = list(zip(one, other)) if isinstance(one, Sequence) else [(one, other)]
    return all(abs(float(a) - float(b)) <= 1e-3 * max(1.0, abs(float(b))) for a, b in pairs)


def as_typed(value: object) -> str:
    """A value as a user types it."""
    if isinstance(value, str):
        return value
    return " ".join(f"{number:g}" for number in (value if isinstance(value, Sequence) else [value]))


def resolve_network(name: str | None, feature_size: int | None, described: dict) -> tuple[str, int, list[str]]:
    """Backbone, feature size and warnings: the flag, else what the weights say, else swin_unetr of 48.

    Args:
        described: "backbone" of the weights' description.
    """
    warnings = [
        f"{flag} {value} differs from the weights' {described[key]}"
        for flag, value, key in (("--backbone", name, "name"), ("--feature_size", feature_size, "feature_size"))
        if value is not None and described.get(key) not in (None, value)
    ]
    name = described.get("name", "swin_unetr") if name is None else name
    size = described.get("feature_size", 48) if feature_size is None else feature_size
    return name, int(size), warnings
