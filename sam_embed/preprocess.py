"""From a CT volume to the network's input: the checkpoint's grid, the body cut out, HU mapped as in its training.

Yan et al., "SAM", TMI 2022: 2 mm isotropic, HU [-1024, 3071] -> [0, 255], minus 50, cropped to the body. Orientation is
the project's canonical one ("SPL"), which is what the published checkpoint saw.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datasets.ct.geometry import body_mask, grown_box, index_to_world, mask_box, resample
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo

BODY_MARGIN_MM = 8.0  # of air kept around the body, so that skin is seen against air


def scale_hu(hu: Tensor, info: EmbedderInfo) -> Tensor:
    """HU of any shape -> the network's float32 intensities (air -50, 40 HU 16.26, at the published settings)."""
    clipped = hu.float().clamp(info.hu_min, info.hu_max)
    return (clipped - info.hu_min) * (info.scale_to / (info.hu_max - info.hu_min)) + info.offset


def cut_body(volume: Volume, spacing_mm: Sequence[float], margin_mm: float = 0.0) -> tuple[Volume, np.ndarray]:
    """Resample a volume and cut out the patient's box.

    Args:
        volume: int16 HU in the canonical orientation, any spacing.
        spacing_mm: wanted voxel size (D, H, W).
        margin_mm: of surroundings kept around the body.

    Returns:
        The volume, and where the patient is in it, bool [D, H, W]; the whole volume where there is no patient.
    """
    array, affine = resample(volume.array, volume.affine, spacing_mm)
    body = body_mask(array, spacing_mm)
    start, stop = grown_box(*mask_box(body), margin_mm / np.array(spacing_mm), body.shape)
    affine = affine.copy()
    affine[:3, 3] = index_to_world(affine, start)
    box = tuple(map(slice, start, stop))
    return Volume(np.ascontiguousarray(array[box]), affine, volume.path), np.ascontiguousarray(body[box])


def prepare(volume: Volume, info: EmbedderInfo) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The network's input from a volume: the checkpoint's spacing, the body cut out, intensities scaled.

    Args:
        volume: int16 HU [D, H, W] in the canonical orientation, any spacing.
        info: of the checkpoint.

    Returns:
        float32 [1, 1, D, H, W]; its affine float64 [4, 4], index -> world mm; bool [D, H, W], True inside the patient.
    """
    cut, body = cut_body(volume, info.spacing_mm, BODY_MARGIN_MM)
    return scale_hu(torch.from_numpy(cut.array), info)[None, None], cut.affine, body
