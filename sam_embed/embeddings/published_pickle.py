"""The authors' embedding files (Yan et al., "SAM", TMI 2022, public code).

They are Python pickles of a list: fine [1, C, D/2, H/2, W/2], coarse [1, C, D/4, H/16, W/16], of UAE-S also semantic
like fine, sometimes the image, sometimes the case's name. They say nothing about geometry, which comes from the CT:
taken to be the whole volume (no body crop), resampled to 2 mm from the corner of its first voxel on, as torchio does,
axes (z, y, x).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.ct.geometry import body_mask, index_to_world, resample, spacing_of
from datasets.ct.nifti import Volume
from sam_embed.embeddings.embed import output_affine
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.embeddings.plain_pickle import PublishedPickleError, read_plain
from sam_embed.network import OutputGrid

SPACING_MM = (2.0, 2.0, 2.0)
# Of `AnatomicalEmbedder` at its default options, which are the published ones.
FINE_GRID = OutputGrid((2.0, 2.0, 2.0), (0.5, 0.0, 0.0))
COARSE_GRID = OutputGrid((4.0, 16.0, 16.0), (0.5, 0.0, 0.0))
LENGTH_TOLERANCE = 0.01  # by which vectors may miss unit length before they are normalised again


class PublishedEmbedding(NamedTuple):
    """What a published file holds: float16 tensors [C, d, h, w] of unit length, and the name if it is in there."""

    fine: Tensor
    coarse: Tensor
    name: str | None
    semantic: Tensor | None = None


def read_published(path: str | Path) -> PublishedEmbedding:
    """Read one published embedding: [fine, coarse], perhaps with the image, the name, or both, in any order.

    Of UAE-S [fine, coarse, semantic]: of its two large embeddings, fine stands before semantic.

    Raises:
        PublishedPickleError: see `read_plain`; also where the list does not hold these embeddings, all of one width.
    """
    content = read_plain(path)
    if not isinstance(content, list):
        raise PublishedPickleError(
            f"{path}: holds a {type(content).__name__}, expected a list [fine, coarse, image or name]"
        )
    names = [item for item in content if isinstance(item, str)]
    embeddings = [found for found in map(_embedding_of, content) if found is not None]
    coarse = min(embeddings, key=Tensor.numel, default=None)
    fine, *semantic = [one for one in embeddings if one is not coarse] or [None]
    is_right = fine is not None and fine.shape[0] == coarse.shape[0] and len(names) <= 1
    if not is_right or len(semantic) > 1 or any(one.shape != fine.shape for one in semantic):
        raise PublishedPickleError(
            f"{path}: expected fine [1, C, d, h, w] and coarse [1, C, d', h', w'], perhaps semantic like fine, an "
            f"image [1, 1, D, H, W] and a name; received [{', '.join(map(_described, content))}]"
        )
    vectors = [_unit_length(one, path) for one in (fine, coarse, *semantic)]
    return PublishedEmbedding(*vectors[:2], names[0] if names else None, *vectors[2:])


def _embedding_of(item: object) -> Tensor | None:
    """[C, d, h, w] of an embedding; None for an image (one channel, or none at all) and for anything else."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "biuf":
        item = torch.as_tensor(item.astype(item.dtype.newbyteorder("=")))  # torch takes no foreign byte order
    if not isinstance(item, Tensor):
        return None
    tensor = item[0] if item.ndim == 5 and item.shape[0] == 1 else item
    is_embedding = tensor.ndim == 4 and tensor.shape[0] > 1 and tensor.is_floating_point() and tensor.numel() > 0
    return tensor if is_embedding else None


def _described(item: object) -> str:
    shape = list(item.shape) if isinstance(item, (Tensor, np.ndarray)) else ""
    return f"{type(item).__name__} {shape}".strip()


def _unit_length(vectors: Tensor, path: str | Path) -> Tensor:
    """float16 [C, d, h, w], a slice at a time; normalised where it was not."""
    result = torch.empty(vectors.shape, dtype=torch.float16)
    for index in range(vectors.shape[1]):
        part = vectors[:, index].detach().float()
        length = torch.linalg.vector_norm(part, dim=0)
        if not torch.isfinite(length).all():
            raise PublishedPickleError(f"{path}: the embedding {list(vectors.shape)} holds values that are not finite")
        is_unit = bool(((length - 1).abs() < LENGTH_TOLERANCE).all())
        result[:, index] = (part if is_unit else F.normalize(part, dim=0)).half()
    return result


def to_embedding(
    published: PublishedEmbedding, volume: Volume, name: str, fingerprint: str = "", source: str | Path = ""
) -> Embedding:
    """Give a published embedding its place in the world.

    Args:
        published: from `read_published`.
        volume: the same case's CT, canonical orientation, any spacing, not cropped.
        name: of the case.
        fingerprint: of the weights, where known.
        source: the file, for the error.

    Raises:
        PublishedPickleError: the shapes are not those of the whole CT at 2 mm.
    """
    check_fit(tuple(published.fine.shape[1:]), tuple(published.coarse.shape[1:]), volume, source)
    step = np.asarray(SPACING_MM) / spacing_of(volume.affine)  # CT voxels per 2 mm
    grid_affine = np.array(volume.affine, dtype=np.float64)
    grid_affine[:3, :3] *= step
    grid_affine[:3, 3] = index_to_world(volume.affine, (step - 1) / 2)  # corner on corner
    fine_affine = output_affine(grid_affine, FINE_GRID)
    return Embedding(
        name=name,
        fine=published.fine,
        coarse=published.coarse,
        semantic=published.semantic,
        fine_affine=fine_affine,
        coarse_affine=output_affine(grid_affine, COARSE_GRID),
        body=torch.from_numpy(_body_at(volume, fine_affine, published.fine.shape[1:])),
        fingerprint=fingerprint,
    )


def check_fit(fine: Sequence[int], coarse: Sequence[int], volume: Volume, source: str | Path = "") -> None:
    """Raise unless the network makes outputs of these sizes (D, H, W) from the CT at 2 mm.

    The CT's length may be rounded either way and, as the public code drops every second voxel of fine grids and stores
    round too, be off by another voxel of the CT.
    """
    spacing_mm = spacing_of(volume.affine)
    misfits = []
    for axis in range(3):
        length_mm, slack_mm = volume.shape[axis] * spacing_mm[axis], SPACING_MM[axis] + spacing_mm[axis]
        first = max(1, math.ceil((length_mm - slack_mm) / SPACING_MM[axis]))
        sizes = range(first, math.floor((length_mm + slack_mm) / SPACING_MM[axis]) + 1)
        if not any(_output_sizes(size, axis) == (fine[axis], coarse[axis]) for size in sizes):
            misfits.append("DHW"[axis])
    if misfits:
        whole = [max(1, round(size * mm / to_mm)) for size, mm, to_mm in zip(volume.shape, spacing_mm, SPACING_MM)]
        expected = list(zip(*(_output_sizes(size, axis) for axis, size in enumerate(whole))))
        raise PublishedPickleError(
            f"{source}: fine {list(fine)} and coarse {list(coarse)} do not fit {volume.path}, whose grid at 2 mm is "
            f"{whole} and gives fine {list(expected[0])} and coarse {list(expected[1])} (axes D, H, W; wrong along "
            f"{', '.join(misfits)}). Is it another case's, or was the volume cropped to the body before embedding? "
            "Then embed it again with scripts/generate_sam_embeddings.py"
        )


def _output_sizes(size: int, axis: int) -> tuple[int, int]:
    """Sizes of fine and coarse along an axis for an input of `size`: pools round down, convolutions up."""
    if axis == 0:
        return size // 2, (size // 2 + 1) // 2
    return (size + 1) // 2, (size + 15) // 16


def _body_at(volume: Volume, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """bool of `shape`: whether the CT voxel (at 2 mm) nearest to each voxel of a parallel grid lies in the patient."""
    array, array_affine = resample(volume.array, volume.affine, SPACING_MM)
    body = body_mask(array, SPACING_MM)
    to_array = np.linalg.inv(array_affine) @ affine
    nearest = [
        np.clip(np.rint(to_array[axis, axis] * np.arange(size) + to_array[axis, 3]).astype(int), 0, length - 1)
        for axis, (size, length) in enumerate(zip(shape, body.shape))
    ]
    return body[np.ix_(*nearest)]
