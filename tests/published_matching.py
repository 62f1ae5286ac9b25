"""The published way to match voxels, number for number, for comparison with results of the published pipeline.

It differs from `sam_embed.matching.match` in three places: a query point takes the vector of the voxel it falls in;
the coarse map is stretched over the fine grid as if both covered the same box (`align_corners=False`); and a fine
voxel i is put half an input voxel beyond its first one, at 2 i + 0.5. One published defect is not reproduced: it clips
x by the size of y.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

FINE_STRIDE = 2
HALF_STRIDE_VOX = 0.5  # centre of the two input voxels {2 i, 2 i + 1}


def stretch_coarse(fine: Tensor, coarse: Tensor) -> Tensor:
    """Coarse [1, C, d', h', w'] on the fine grid [1, C, d, h, w], unit length over channels."""
    return F.normalize(F.interpolate(coarse.float(), size=fine.shape[2:], mode="trilinear"), dim=1)


def published_similarity(
    query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], points_vox: np.ndarray, query_ratio: np.ndarray
) -> Tensor:
    """Similarities [N, d * h * w] of voxels of the query image to every fine voxel of the key.

    Args:
        query, key: (fine, coarse), [1, C, ...] each, axes z, y, x.
        points_vox: int [N, 3], voxels (x, y, z) of the original query image.
        query_ratio: [3], original spacing / 2 mm, (x, y, z).
    """
    xyz = np.floor(np.asarray(points_vox) * np.asarray(query_ratio) / FINE_STRIDE).astype(np.int64)
    total = 0
    for query_map, key_map in ((query[0], key[0]), (stretch_coarse(*query), stretch_coarse(*key))):
        vectors = query_map[0, :, xyz[:, 2], xyz[:, 1], xyz[:, 0]].float().T  # [N, C]
        total = total + vectors @ key_map[0].float().flatten(1)
    return total / 2


def published_match(
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    points_vox: np.ndarray,
    query_ratio: np.ndarray,
    key_ratio: np.ndarray,
    key_shape: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Matched voxels int [N, 3] (x, y, z) of the original key image of `key_shape` (X, Y, Z), and scores [N]."""
    score, flat = published_similarity(query, key, points_vox, query_ratio).max(dim=1)
    zyx = np.stack(np.unravel_index(flat.numpy(), tuple(key[0].shape[2:])), axis=1)
    xyz = (zyx[:, ::-1] * FINE_STRIDE + HALF_STRIDE_VOX) / np.asarray(key_ratio)
    return np.clip(np.trunc(xyz), 0, np.asarray(key_shape) - 1).astype(np.int64), score.numpy()
