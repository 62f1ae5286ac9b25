"""From a CT volume to the network's input: the checkpoint's grid, the body cut out, HU mapped as in its training.

Yan et al., "SAM", TMI 2022: 2 mm isotropic, HU [-1024, 3071] -> [0, 255], minus 50, cropped to the body. Orientation is
the project's canonical one ("SPL"), which is what the published checkpoint saw.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.ct.geometry import body_mask, index_to_world, mask_box, resample
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo

BODY_MARGIN_MM = 8.0  # of air kept around the body, so that skin is seen against air


def scale_hu(hu: Tensor, info: EmbedderInfo) -> Tensor:
    """HU of any shape -> the network's float32 intensities (air -50, 40 HU 16.26, at the published settings)."""
    clipped = hu.float().clamp(info.hu_min, info.hu_max)
    return (clipped - info.hu_min) * (info.scale_to / (info.hu_max - info.hu_min)) + info.offset


class Prepared(NamedTuple):
    """A volume as the network wants it.

    Attributes:
        tensor: float32 [1, 1, D, H, W], scaled.
        affine: float64 [4, 4], index (d, h, w) of that grid -> world mm.
        body: bool [D, H, W], True inside the patient.
    """

    tensor: Tensor
    affine: np.ndarray
    body: np.ndarray


def prepare(volume: Volume, info: EmbedderInfo) -> Prepared:
    """Resample a volume to the checkpoint's spacing, cut out the body and scale its intensities.

    Args:
        volume: int16 HU [D, H, W] in the canonical orientation, any spacing.
        info: of the checkpoint.
    """
    array, affine = resample(volume.array, volume.affine, info.spacing_mm)
    body = body_mask(array, info.spacing_mm)
    box = _box_of(body, info.spacing_mm)
    affine = affine.copy()
    affine[:3, 3] = index_to_world(affine, [part.start for part in box])
    tensor = scale_hu(torch.from_numpy(np.ascontiguousarray(array[box])), info)[None, None]
    return Prepared(tensor, affine, body[box])


def _box_of(body: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """The mask's box with a margin; the whole volume where the mask is empty."""
    margin = np.ceil(BODY_MARGIN_MM / np.array(spacing_mm)).astype(int)
    start, stop = mask_box(body)
    start, stop = np.maximum(start - margin, 0), np.minimum(stop + margin, body.shape)
    return tuple(slice(int(low), int(high)) for low, high in zip(start, stop))
