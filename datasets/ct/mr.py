"""Reading MR: intensities have no unit, so robust percentiles of each volume are mapped to one fixed range.

The foreground is what is brighter than the background by the rule of BET (Smith, Human Brain Mapping 2002): brighter
than the 2nd percentile of all voxels and a tenth of the way from there to the 98th. Two percentiles of the foreground
become `MAPPED`; the rest is linear, and clipped at the ends of `MR_RANGE`. Percentiles stand for the extremes because
single bright voxels decide these (Nyul and Udupa, Magn Reson Med 1999); 0.5 and 99.5 of the foreground are those at
which nnU-Net clips CT (Isensee et al., Nature Methods 2021). The percentiles are of the file's own voxels, before any
resampling, so that a volume is mapped alike at every voxel size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.ct.file_checks import CTReadError, check_extent
from datasets.ct.formats import read_channels
from datasets.ct.geometry import spacing_of
from datasets.ct.intensity import MR_RANGE
from datasets.ct.nifti import Volume, canonical, finite_range

DEFAULT_PERCENTILES = (0.5, 99.5)
MAPPED = (-800.0, 800.0)  # what the two percentiles become; the rest of MR_RANGE is head room
BACKGROUND_PERCENTILES, BACKGROUND_SHARE = (2.0, 98.0), 0.1
FLAGS = "--modality mr"


class IntensityMap(NamedTuple):
    """The linear map of one channel: a file's intensities `low` and `high` become the two values of `MAPPED`.

    Back: intensity = low + (value - MAPPED[0]) / (MAPPED[1] - MAPPED[0]) * (high - low), but for what was clipped.
    """

    low: float
    high: float

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Intensities of any shape and real type -> int16 in MR_RANGE."""
        scale = (MAPPED[1] - MAPPED[0]) / (self.high - self.low)
        values = (raw.astype(np.float32) - np.float32(self.low)) * np.float32(scale) + np.float32(MAPPED[0])
        return np.rint(np.clip(values, *MR_RANGE, out=values), out=values).astype(np.int16)


@dataclass(frozen=True)
class MRVolume(Volume):
    """An MR whose intensities were mapped: int16 in MR_RANGE.

    Attributes:
        maps: of each channel.
        body_above: of each channel, the mapped value between the background and the foreground.
    """

    maps: tuple[IntensityMap, ...]
    body_above: tuple[int, ...]


def check_percentiles(percentiles: Sequence[float]) -> tuple[float, float]:
    """Two percentiles as a tuple; raises ValueError, naming the flag, unless 0 <= low < high <= 100."""
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        received = " ".join(f"{value:g}" for value in percentiles)
        raise ValueError(f"--mr_percentiles {received}: expected two numbers from 0 to 100, the lower one first")
    return float(percentiles[0]), float(percentiles[1])


def read_mr(source: str | Path | Sequence[str | Path], percentiles: Sequence[float] = DEFAULT_PERCENTILES) -> MRVolume:
    """Read one MR from any format of `formats.read_voxels`, the intensities of each channel mapped by itself.

    Args:
        source: a file; a 4-D NIfTI has several channels. Or several files on one grid, whose channels follow each
            other.
        percentiles: of the foreground, which become `MAPPED`.

    Returns:
        [D, H, W], or [C, D, H, W] of several channels.

    Raises:
        CTReadError: as `formats.read_voxels`, files on different grids, a size that no patient has, or a channel that
            `measure` refuses.
    """
    paths = [source] if isinstance(source, str | Path) else list(source)
    raw, affine = _channels_on_one_grid(paths)
    check_extent(affine, next(iter(raw.values())).shape, paths[0])
    measured = {name: measure(channel, percentiles, name) for name, channel in raw.items()}
    turned = [canonical(measured[name][0].apply(channel), affine) for name, channel in raw.items()]
    arrays = [array for array, _ in turned]
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays)
    maps = tuple(intensities for intensities, _ in measured.values())
    body_above = tuple(int(intensities.apply(np.array([above]))[0]) for intensities, above in measured.values())
    return MRVolume(array, turned[0][1], str(paths[0]), maps, body_above)


def _channels_on_one_grid(paths: Sequence[str | Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{name for messages: voxels [X, Y, Z]} of the channels of all files, and their affine.

    Raises:
        CTReadError: a file lies on another grid than the first, or is named twice.
    """
    found: dict[str, np.ndarray] = {}
    for path in paths:
        channels, own = read_channels(path)
        if not found:
            shape, affine = channels[0].shape, own
        tolerance_mm = 0.01 * min(spacing_of(affine))
        if channels[0].shape != shape or not np.allclose(own, affine, rtol=0, atol=tolerance_mm):
            raise CTReadError(
                f"{path}: lies on another grid than {paths[0]} (shape {channels[0].shape} and {shape}); the channels "
                "of a case need one grid"
            )
        names = [f"{path}, channel {number}" for number in range(len(channels))] if len(channels) > 1 else [str(path)]
        if names[0] in found:
            raise CTReadError(f"{path}: stands twice among the channels of a case")
        found |= dict(zip(names, channels))
    return found, affine


def measure(raw: np.ndarray, percentiles: Sequence[float], name: str) -> tuple[IntensityMap, float]:
    """The map of a channel, and the intensity above which its foreground lies.

    Args:
        raw: intensities of one volume, any shape.
        name: the file, and the channel where it has several, for messages.

    Raises:
        CTReadError: voxels that are not finite, one value throughout, or percentiles that are equal.
    """
    low, high = finite_range(raw, f"{name} ({FLAGS})")
    if low == high:
        raise CTReadError(f"{name}: every voxel is {low:g}; expected an MR with contrast ({FLAGS})")
    dark, bright = np.percentile(raw, BACKGROUND_PERCENTILES)
    background = float(dark + BACKGROUND_SHARE * (bright - dark))
    foreground = raw[raw > background]
    ends = np.percentile(foreground, percentiles) if foreground.size else (high, high)
    if not ends[0] < ends[1] or not math.isfinite(ends[1] - ends[0]):
        shown = " and ".join(f"{value:g}" for value in percentiles)
        raise CTReadError(
            f"{name}: the percentiles {shown} (--mr_percentiles) of its foreground are {ends[0]:g} and {ends[1]:g}: a "
            f"mask, or a volume that is nearly empty? Expected an MR with contrast ({FLAGS})"
        )
    return IntensityMap(float(ends[0]), float(ends[1])), background
