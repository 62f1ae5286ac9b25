"""What finetuning takes over from pretraining: preprocessing and network size, from the weights unless flags differ.

Weights that were trained at one voxel size, HU window or axis order and finetuned at another lose much of their gain,
silently. So every value comes from the weights' own description; a flag wins, with a warning.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from datasets.ct.formats import count_channels
from datasets.ct.geometry import CANONICAL_AXCODES as AXCODES
from datasets.ct.geometry import resample
from datasets.ct.images import CT, MR, RADIOGRAPH, read_image
from datasets.ct.intensity import AIR_HU, MR_RANGE, fill_ends
from datasets.ct.nifti import Volume
from datasets.lists.cases import Case
from datasets.store.volumes import VolumeStore, parse_spacing
from engine.segmentation.sliding_window import WindowOptions
from models.backbones.interface import spatial_dims_of
from models.methods import METHODS

KIND = "segmentation"  # of a finetuned network's checkpoint
DEFAULTS = {
    "preprocessing": {"spacing_mm": [2.0, 1.5, 1.5], "hu_min": -125.0, "hu_max": 225.0, "roi": [96, 96, 96]},
    "backbone": {"name": "swin_unetr", "feature_size": 48},
}
# Radiographs keep their pixels, and each is shown in its own range; MR is shown in the range that it is mapped to.
DEFAULTS_OF = {
    CT: DEFAULTS["preprocessing"],
    RADIOGRAPH: {"spacing_mm": "native", "hu_min": None, "hu_max": None, "roi": [1, 96, 96]},
    MR: DEFAULTS["preprocessing"] | {"hu_min": float(MR_RANGE[0]), "hu_max": float(MR_RANGE[1])},
}
FLAG_OF = {
    **{"spacing_mm": "--spacing_mm", "hu_min": "--a_min", "hu_max": "--a_max", "roi": "--roi_z, --roi_y, --roi_x"},
    **{"name": "--backbone", "feature_size": "--feature_size"},
}


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes the network's input.

    Attributes:
        spacing_mm: (D, H, W) of the network's grid; None = each file's own.
        hu_min, hu_max: what becomes [0, 1]; None = the ends of each radiograph's own range.
        roi: (D, H, W) of a crop or window, voxels.
        images: CT, RADIOGRAPH or MR.
        mr_percentiles: of the intensity map of MR (`datasets.ct.mr`); None = of another kind.
    """

    spacing_mm: tuple[float, float, float] | None
    hu_min: float | None
    hu_max: float | None
    roi: tuple[int, int, int]
    images: str = CT
    mr_percentiles: tuple[float, float] | None = None

    @property
    def spatial_dims(self) -> int:
        """2 where the network sees slices, else 3."""
        return spatial_dims_of(self.roi)

    @property
    def window_text(self) -> str:
        """The intensities that become 0 to 1, for messages."""
        if self.images == CT:
            return f"{self.hu_min:g} to {self.hu_max:g} HU"
        if self.images == MR:
            return f"mapped MR from {self.hu_min:g} to {self.hu_max:g}"
        low = "darkest" if self.hu_min is None else f"{self.hu_min:g}"
        high = "brightest" if self.hu_max is None else f"{self.hu_max:g}"
        return f"{low} to {high} grey of each radiograph"

    def read(self, source: str | Path | Sequence[Path]) -> Volume:
        """Read an image of the kind that the network takes; MR is mapped as its training volumes were."""
        return read_image(source, self.mr_percentiles)

    def on_own_grid(self, volume: Volume) -> Volume:
        """The volume at the network's spacing, resampled as the volume store does it."""
        if self.spacing_mm is None:
            return volume
        return Volume(*resample(volume.array, volume.affine, self.spacing_mm), volume.path)

    def windows_for(self, volume: Volume, windows: WindowOptions) -> WindowOptions:
        """`windows` with what becomes 0 and 1: the network's HU, or the ends of a radiograph's own range."""
        own_range = float(volume.array.min()), float(volume.array.max())
        low, high = fill_ends((self.hu_min, self.hu_max), own_range)
        outside = {CT: AIR_HU, MR: MR_RANGE[0]}.get(self.images, int(own_range[0]))
        return replace(windows, hu_min=low, hu_max=high, outside=outside)

    def as_dict(self) -> dict:
        """Plain values under the names that checkpoints use; CT is what is meant where they do not say."""
        values = {"axcodes": AXCODES, "spacing_mm": plain_spacing(self.spacing_mm)}
        values |= {"hu_min": self.hu_min, "hu_max": self.hu_max, "roi": list(self.roi)}
        values |= {} if self.images == CT else {"images": self.images}
        return values | ({} if self.mr_percentiles is None else {"mr_percentiles": list(self.mr_percentiles)})

    @classmethod
    def from_dict(cls, plain: dict) -> "Preprocessing":
        spacing = None if plain["spacing_mm"] == "native" else tuple(map(float, plain["spacing_mm"]))
        ends = (None if plain[name] is None else float(plain[name]) for name in ("hu_min", "hu_max"))
        percentiles = plain.get("mr_percentiles")
        kind = plain.get("images", CT), None if percentiles is None else tuple(map(float, percentiles))
        return cls(spacing, *ends, tuple(map(int, plain["roi"])), *kind)


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


class SetupFlags(Protocol):
    """Flags that say how a network's input is prepared; None where one was not used."""

    spacing_mm: Sequence[float | str] | None
    a_min: float | None
    a_max: float | None
    roi_z: int | None
    roi_y: int | None
    roi_x: int | None
    backbone: str | None
    feature_size: int | None


def given_by(flags: SetupFlags) -> dict:
    """The values of flags under the names that `resolve_setup` takes."""
    return {
        "spacing_mm": None if flags.spacing_mm is None else plain_spacing(parse_spacing(flags.spacing_mm)),
        "hu_min": flags.a_min,
        "hu_max": flags.a_max,
        "roi": [flags.roi_z, flags.roi_y, flags.roi_x],
        "name": flags.backbone,
        "feature_size": flags.feature_size,
    }


def resolve_setup(
    described: dict,
    given: dict,
    backbones: Collection[str],
    store_dir: str | Path | None = None,
    images: str = CT,
    mr_percentiles: tuple[float, float] | None = None,
) -> Setup:
    """Decide on every value: the flag, else what the weights say, else the store's spacing, else the default.

    Args:
        described: the weights' description; empty where there is none.
        given: values of flags under the names in `DEFAULTS`, None or absent where a flag was not used; a `roi` may
            hold None for single sides.
        backbones: known names.
        store_dir: a volume store, which may not exist yet.
        images: CT, RADIOGRAPH or MR. Voxel size and window of weights of another kind are not taken over.
        mr_percentiles: of the intensity map of MR.

    Raises:
        ValueError: weights of something else (SAM), a window whose ends are swapped, an unknown backbone, weights of
            slices for a 3-D network or the reverse, or thick crops of radiographs.
    """
    if described.get("kind") not in (None, KIND, *METHODS):
        raise ValueError(
            f"--weights holds a checkpoint of kind {described['kind']!r}; expected pretrained weights (main_ddp.py, "
            "extract_backbone_weights.py) or a finetuned network"
        )
    defaults, chosen, notes = dict(DEFAULTS_OF[images]), {}, []
    before = described.get("preprocessing", {})
    if before and before.get("images", CT) != images:
        notes.append(f"the weights were trained on {before.get('images', CT)}, so only their crop is taken over")
        described = described | {"preprocessing": {name: before[name] for name in ("axcodes", "roi") if name in before}}
    elif mr_percentiles is not None and before and not agree(mr_percentiles, before.get("mr_percentiles")):
        notes.append(
            f"MR is mapped by its percentiles {as_typed(mr_percentiles)}; the weights were trained with "
            f"{as_typed(before.get('mr_percentiles'))} (--mr_percentiles of scripts/prepare_volumes.py)"
        )
    if store_dir is not None and (Path(store_dir) / "store.json").exists():
        defaults["spacing_mm"] = plain_spacing(VolumeStore(store_dir, names=()).spacing_mm)
    for part, values in (("preprocessing", defaults), ("backbone", DEFAULTS["backbone"])):
        for name, default in values.items():
            from_weights, flag = described.get(part, {}).get(name), given.get(name)
            chosen[name] = default if from_weights is None else from_weights
            if name == "roi":
                flag = [side if own is None else own for own, side in zip(flag or [None] * 3, chosen[name])]
            elif None not in (flag, from_weights) and not agree(flag, from_weights):
                notes.append(
                    f"{FLAG_OF[name]} {as_typed(flag)} differs from the {as_typed(from_weights)} that the weights were "
                    "trained with; leave the flag away to keep what they know"
                )
            chosen[name] = chosen[name] if flag is None else flag
    axcodes = before.get("axcodes", AXCODES)
    if axcodes != AXCODES:
        notes.append(f"the weights were trained on volumes in axis order {axcodes}, here it is {AXCODES}")
    if None not in (chosen["hu_min"], chosen["hu_max"]) and chosen["hu_min"] >= chosen["hu_max"]:
        raise ValueError(f"--a_min {chosen['hu_min']:g} --a_max {chosen['hu_max']:g}: expected a_min below a_max (HU)")
    if images == RADIOGRAPH and chosen["roi"][0] != 1:
        raise ValueError(f"--roi_z {chosen['roi'][0]}: radiographs are one pixel deep, expected --roi_z 1")
    check_spatial_dims(before.get("roi"), chosen["roi"])
    if chosen["name"] not in backbones:
        raise ValueError(f"--backbone (unset = the weights') is {chosen['name']!r}, expected {', '.join(backbones)}")
    preprocessing = Preprocessing.from_dict(chosen | {"images": images, "mr_percentiles": mr_percentiles})
    return Setup(preprocessing, chosen["name"], int(chosen["feature_size"]), notes)


def channels_of(cases: Sequence[Case], images: str, wanted: int | None) -> int:
    """The channels of the images, which must be the same for all of them.

    Args:
        images: CT, RADIOGRAPH or MR; only MR has several.
        wanted: --in_channels; None = those of the first case.

    Raises:
        ValueError: naming a case with another number.
    """
    counts = {case.name: 1 for case in cases}
    if images == MR:
        counts = {case.name: sum(map(count_channels, (case.image, *case.further_channels))) for case in cases}
    wanted = wanted or next(iter(counts.values()), 1)
    if others := {name: count for name, count in counts.items() if count != wanted}:
        name, count = next(iter(others.items()))
        raise ValueError(
            f"--in_channels {wanted}: {len(others)} of {len(counts)} cases have another number of channels, {name} has "
            f"{count} (several are read of MR only: scripts/prepare_volumes.py --modality mr)"
        )
    return wanted


def check_spatial_dims(from_weights: Sequence[int] | None, roi: Sequence[int]) -> None:
    """Raise ValueError where the crops (D, H, W) of the weights and of this run are not both slices or both volumes."""
    if from_weights is None or spatial_dims_of(from_weights) == spatial_dims_of(roi):
        return
    trained, wanted = (f"{' x '.join(map(str, size))} voxels (D, H, W)" for size in (from_weights, roi))
    kinds = "2-D and are asked for a 3-D" if from_weights[0] == 1 else "3-D and are asked for a 2-D"
    raise ValueError(
        f"--roi_z {roi[0]}: the weights are {kinds} network. They were trained with crops of {trained}, and this run "
        f"has {wanted}. Leave --roi_z away, or use weights that were trained with --roi_z {roi[0]} (--weights)"
    )


def plain_spacing(spacing_mm: Sequence[float] | None) -> list[float] | str:
    """Voxel size as checkpoints write it."""
    return "native" if spacing_mm is None else list(spacing_mm)


def agree(one: object, other: object) -> bool:
    """Whether two values mean the same, numbers to a thousandth."""
    if one is None or other is None or isinstance(one, str) or isinstance(other, str):
        return one == other
    pairs = list(zip(one, other)) if isinstance(one, Sequence) else [(one, other)]
    return all(abs(float(a) - float(b)) <= 1e-3 * max(1.0, abs(float(b))) for a, b in pairs)


def as_typed(value: object) -> str:
    """A value as a user types it."""
    if value is None or isinstance(value, str):
        return value or "unset"
    return " ".join(f"{number:g}" for number in (value if isinstance(value, Sequence) else [value]))
