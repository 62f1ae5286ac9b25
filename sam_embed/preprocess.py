"""From a CT volume to the network's input: the checkpoint's grid, the body cut out, HU mapped as in its training.

Yan et al., "SAM", TMI 2022: 2 mm isotropic, HU [-1024, 3071] -> [0, 255], minus 50, cropped to the body. Orientation is
the project's canonical one ("SPL"), which is what the published checkpoint saw.
"""

import numpy as np
import torch
from torch import Tensor

from datasets.geometry import body_box, index_to_world, resample
from datasets.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo

BODY_MARGIN_MM = 8.0  # of air kept around the body, so that skin is seen against air


def scale_hu(hu: Tensor, info: EmbedderInfo) -> Tensor:
    """HU of any shape -> the network's float32 intensities (air -50, 40 HU 16.26, at the published settings)."""
    clipped = hu.float().clamp(info.hu_min, info.hu_max)
    return (clipped - info.hu_min) * (info.scale_to / (info.hu_max - info.hu_min)) + info.offset


def prepare(volume: Volume, info: EmbedderInfo) -> tuple[Tensor, np.ndarray]:
    """Resample a volume to the checkpoint's spacing, cut out the body and scale its intensities.

    Args:
        volume: int16 HU [D, H, W] in the canonical orientation, any spacing.
        info: of the checkpoint.

    Returns:
        float32 [1, 1, D', H', W'], and the float64 [4, 4] affine of that grid: index (d, h, w) -> world mm.
    """
    array, affine = resample(volume.array, volume.affine, info.spacing_mm)
    start, stop = body_box(array, info.spacing_mm)
    margin = np.ceil(BODY_MARGIN_MM / np.asarray(info.spacing_mm)).astype(int)
    start, stop = np.maximum(start - margin, 0), np.minimum(stop + margin, array.shape)
    cropped = array[tuple(slice(int(low), int(high)) for low, high in zip(start, stop))]
    affine = affine.copy()
    affine[:3, 3] = index_to_world(affine, start)
    return scale_hu(torch.from_numpy(np.ascontiguousarray(cropped)), info)[None, None], affine
