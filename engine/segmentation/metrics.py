"""Dice and normalised surface distance per organ, MONAI's, on the part of the volume that holds the organ.

`published_slice_dice` is another measure, which has been published for 2-D networks under the name of Dice.

Conventions where MONAI leaves the choice: an organ that neither truth nor prediction has counts for nothing (NaN); one
that only one of them has scores 0 in both measures, as FLARE22 counts it. MONAI's NSD counts the voxels of surfaces,
FLARE22's official one weighs their area. So Dice can be compared with leaderboards, NSD cannot, not even with FLARE22's
tolerance of each organ.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

# FLARE22's official evaluation (Ma et al., Lancet Digital Health 2024), mm.
FLARE22_TOLERANCES_MM = {
    **{"liver": 5.0, "right kidney": 3.0, "left kidney": 3.0, "spleen": 3.0, "pancreas": 5.0, "aorta": 2.0},
    **{"inferior vena cava": 2.0, "right adrenal gland": 2.0, "left adrenal gland": 2.0, "gallbladder": 2.0},
    **{"esophagus": 3.0, "stomach": 5.0, "duodenum": 7.0},
}
Tolerances = float | Mapping[str, float]  # of NSD: of all organs, or of each by its name; mm


@dataclass(frozen=True)
class OrganScore:
    """One organ of one case; `dice` and `nsd` in [0, 1] or NaN, volumes in millilitres (pictures are 1 mm thick)."""

    case: str
    organ: str
    dice: float
    nsd: float
    truth_ml: float
    predicted_ml: float


def score_case(
    case: str,
    predicted: np.ndarray,
    truth: np.ndarray,
    spacing_mm: tuple[float, float, float],
    names: tuple[str, ...],
    tolerance_mm: Tolerances,
) -> list[OrganScore]:
    """Scores of all organs of a case.

    Args:
        predicted, truth: uint8 channels [D, H, W], 0 = background; D = 1 is a picture, whose organs have outlines
            instead of surfaces.
        spacing_mm: of their voxels, (D, H, W).
        names: of the channels, background first.
        tolerance_mm: surfaces nearer than this agree, one number or one for each of `names`; 0 leaves NSD out (NaN).

    Returns:
        One score per organ, in the order of `names`.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"{case}: prediction has shape {predicted.shape}, truth {truth.shape}")
    voxel_ml, scores = float(np.prod(spacing_mm)) / 1000, []
    if len(truth) == 1:
        predicted, truth, spacing_mm = predicted[0], truth[0], spacing_mm[1:]
    boxes = [ndimage.find_objects(array, max_label=len(names) - 1) for array in (predicted, truth)]
    for channel, (name, *both) in enumerate(zip(names[1:], *boxes), start=1):
        box = joined_box(*both)
        found, true = (array[box] == channel if box else np.zeros(0, bool) for array in (predicted, truth))
        tolerance = tolerance_mm[name] if isinstance(tolerance_mm, Mapping) else tolerance_mm
        dice, nsd = organ_scores(found, true, spacing_mm, tolerance) if box else (float("nan"), float("nan"))
        scores.append(OrganScore(case, name, dice, nsd, true.sum() * voxel_ml, found.sum() * voxel_ml))
    return scores


def joined_box(one: tuple[slice, ...] | None, other: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    """The box around two boxes, either of which may be missing."""
    if one is None or other is None:
        return one or other
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other))


def organ_scores(
    predicted: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> tuple[float, float]:
    """(Dice, NSD) of two bool masks [d, h, w] or [h, w], of which at least one is not empty."""
    from monai.metrics import compute_dice, compute_surface_dice  # here: MONAI takes seconds

    if not predicted.any() or not truth.any():
        return 0.0, (0.0 if tolerance_mm > 0 else float("nan"))
    # A rim of background, so that what touches the box has a surface there.
    tensors = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (predicted, truth)]
    dice = float(compute_dice(*tensors))
    if tolerance_mm <= 0:
        return dice, float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of its own calls
        nsd = compute_surface_dice(
            *tensors, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing_mm
        )
    return dice, float(nsd)


def published_slice_dice(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> list[float]:
    """Of every slice, the mean Dice of the classes that are in the slice's truth, background among them.

    Its mean over the slices of all cases is the number that Konieczkowicz (thesis, AGH Krakow 2023) reports as Dice.
    It cannot be compared with organ Dice. A slice without organs scores nearly 1 for background alone, and an organ
    that is predicted in a slice that has none costs only what it takes from the background.

    Args:
        predicted, truth: uint8 channels [D, H, W], 0 = background.
        num_classes: background included.

    Returns:
        One value in [0, 1] per slice along D.
    """
    values = []
    for found, true in zip(predicted.reshape(len(predicted), -1), truth.reshape(len(truth), -1), strict=True):
        both, *sizes = (np.bincount(a, minlength=num_classes) for a in (true[found == true], found, true))
        present = sizes[1] > 0
        values.append(float((2 * both[present] / sum(sizes)[present]).mean()))
    return values


def case_means(scores: list[OrganScore], measure: str = "dice") -> dict[str, float]:
    """Case -> mean of a measure over its organs; NaN where none counts."""
    cases = dict.fromkeys(score.case for score in scores)
    return {case: nan_mean([getattr(s, measure) for s in scores if s.case == case]) for case in cases}


def nan_mean(values: list[float]) -> float:
    """Mean of the values that are numbers; NaN where there is none."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")
