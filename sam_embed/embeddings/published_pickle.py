"""The authors' embedding files (Yan et al., "SAM", TMI 2022, public code): read without running what is in them.

They are Python pickles of a list: fine [1, C, D/2, H/2, W/2], coarse [1, C, D/4, H/16, W/16], sometimes the image,
sometimes the case's name. A pickle is a program, so that only tensors, arrays and plain values are admitted here. They
say nothing about geometry, which comes from the CT: taken to be the whole volume (no body crop), resampled to 2 mm from
the corner of its first voxel on, as torchio does, axes (z, y, x).
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.ct.geometry import body_mask, index_to_world, resample, spacing_of
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import numpy_globals
from sam_embed.embeddings.embed import output_affine
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.network import OutputGrid

SPACING_MM = (2.0, 2.0, 2.0)
# Of `AnatomicalEmbedder` at its default options, which are the published ones.
FINE_GRID = OutputGrid((2.0, 2.0, 2.0), (0.5, 0.0, 0.0))
COARSE_GRID = OutputGrid((4.0, 16.0, 16.0), (0.5, 0.0, 0.0))
LENGTH_TOLERANCE = 0.01  # by which vectors may miss unit length before they are normalised again
# `torch.save` before its zip format starts with this pickled number.
TORCH_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP_START = b"PK\x03\x04"
# What damaged bytes make of an unpickler.
DAMAGES = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    ValueError,
    MemoryError,
    OverflowError,
    ImportError,
    OSError,
)


class PublishedPickleError(ValueError):
    """A file that is no published embedding, or not safe to read; the message names it and the reason."""


class RefusedClassError(pickle.UnpicklingError):
    """A pickle asks for something other than tensors, arrays and plain values."""


class PublishedEmbedding(NamedTuple):
    """What a published file holds: float16 tensors [C, d, h, w] of unit length, and the name if it is in there."""

    fine: Tensor
    coarse: Tensor
    name: str | None


class _Admitted:
    """Stands for a function that a pickle may call; unlike the function itself, a pickle cannot alter it."""

    __slots__ = ("name", "_function")

    def __init__(self, name: str, function: Callable) -> None:
        self.name, self._function = name, function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise RefusedClassError(f"a change of {self.name}")


class _Dtype:
    """Stands for a numpy type; holds no Python objects and no fields."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_flags: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind in "OV":
            raise RefusedClassError(f"numpy.dtype({code!r})")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array until its content is known."""

    __slots__ = ("array",)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, is_fortran, content = state
        self.array = _array_of(content, dtype, shape, "F" if is_fortran else "C")


def _array_of(content: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How older pickle protocols write bytes."""
    if encoding != "latin1":
        raise RefusedClassError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _tensor(storage: torch.storage.TypedStorage, offset: int, shape: tuple, stride: tuple, *_grad: object) -> Tensor:
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(tuple(shape), tuple(stride), offset)  # refuses to reach beyond the storage


def _not_called(*_arguments: object) -> None:
    raise RefusedClassError("numpy.ndarray called directly")


def _admitted() -> dict[str, _Admitted]:
    """Everything that a pickle may name."""
    functions: dict[str, Callable] = {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        # torch's own function unpickles without restriction
        "torch.storage._load_from_bytes": lambda content: _load_torch(io.BytesIO(content)),
        "torch.Size": tuple,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": _latin1,
        "builtins.bytes": lambda: b"",  # so do older protocols write empty ones
        "__builtin__.bytes": lambda: b"",
        "numpy.ndarray": _not_called,
        "numpy.dtype": _Dtype,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        functions[f"{core}.multiarray._reconstruct"] = lambda *_: _Array()
        functions[f"{core}.multiarray.scalar"] = lambda dtype, content: np.frombuffer(content, dtype.dtype)[0]
        functions[f"{core}.numeric._frombuffer"] = _array_of
    return {name: _Admitted(name, function) for name, function in functions.items()}


ADMITTED = _admitted()


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors, numpy arrays and plain values; anything else raises `RefusedClassError` before it is imported."""

    def find_class(self, module: str, name: str) -> _Admitted:
        if f"{module}.{name}" not in ADMITTED:
            raise RefusedClassError(f"{module}.{name}")
        return ADMITTED[f"{module}.{name}"]


def read_plain(path: str | Path) -> object:
    """The content of a file by `pickle.dump` or `torch.save`, without running code.

    Raises:
        PublishedPickleError: no such file, a truncated or damaged one, or one that holds more than tensors, arrays and
            plain values (the message names the class).
    """
    path = Path(path)
    if not path.is_file():
        raise PublishedPickleError(f"{path}: no such file (--pickle_dir)")
    try:
        with path.open("rb") as file:
            return _plain(_load(file))
    except RefusedClassError as error:
        raise PublishedPickleError(
            f"{path}: refused, as it holds {error}; only tensors, numpy arrays and plain values are read"
        ) from error
    except DAMAGES as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise PublishedPickleError(
            f"{path}: truncated, damaged or no pickle at all ({reason}); copy it anew"
        ) from error


def _load(file: BinaryIO) -> object:
    start = file.read(len(TORCH_LEGACY_START))
    file.seek(0)
    if start != TORCH_LEGACY_START and not start.startswith(ZIP_START):
        return RestrictedUnpickler(file).load()
    return _load_torch(file)


def _load_torch(file: BinaryIO) -> object:
    """`torch.load` in its restricted mode, which names what it refuses in the midst of a longer message."""
    try:
        with torch.serialization.safe_globals(numpy_globals()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise RefusedClassError(named.group(1)) from error
        raise


def _plain(value: object, depth: int = 0) -> object:
    """The value with stand-ins replaced; raises where one is no tensor, array or plain value."""
    if depth > 20:
        raise RefusedClassError("lists nested deeper than 20 levels")
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        raise RefusedClassError("a numpy array of Python objects")
    if value is None or isinstance(value, (Tensor, np.ndarray, np.generic, str, bytes, bool, int, float)):
        return value
    name = value.name if isinstance(value, _Admitted) else f"{type(value).__module__}.{type(value).__qualname__}"
    raise RefusedClassError(name)


def read_published(path: str | Path) -> PublishedEmbedding:
    """Read one published embedding: [fine, coarse], perhaps with the image, the name, or both, in any order.

    Raises:
        PublishedPickleError: see `read_plain`; also where the list holds no two embeddings of one width.
    """
    content = read_plain(path)
    if not isinstance(content, list):
        raise PublishedPickleError(
            f"{path}: holds a {type(content).__name__}, expected a list [fine, coarse, image or name]"
        )
    names = [item for item in content if isinstance(item, str)]
    embeddings = [found for found in map(_embedding_of, content) if found is not None]
    if len(embeddings) != 2 or len(names) > 1 or embeddings[0].shape[0] != embeddings[1].shape[0]:
        raise PublishedPickleError(
            f"{path}: expected fine [1, C, d, h, w] and coarse [1, C, d', h', w'], perhaps an image [1, 1, D, H, W] "
            f"and a name; received [{', '.join(map(_described, content))}]"
        )
    coarse, fine = sorted(embeddings, key=Tensor.numel)
    return PublishedEmbedding(_unit_length(fine, path), _unit_length(coarse, path), names[0] if names else None)


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
