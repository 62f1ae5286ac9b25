"""Pickles of tensors, numpy arrays and plain values, read without running what is in them.

A pickle is a program, and so is a file by `torch.save`. Only the few functions that build tensors and arrays are
admitted here. A file that would make more of them than it can hold is refused.
"""

import io
import itertools
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from datasets.store.numpy_pickles import numpy_globals

MAX_ITEMS, MAX_DEPTH = 10_000, 20  # of the lists in a file
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
            return _plain(_load(file), itertools.count(1))
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
        content = file.read()
        _check_memo(content)
        return RestrictedUnpickler(io.BytesIO(content)).load()
    return _load_torch(file)


def _check_memo(content: bytes) -> None:
    """Refuse a pickle that numbers its objects with gaps: the unpickler would make a list as long as the number."""
    for num_before, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > num_before:
            raise RefusedClassError(f"an object with the number {argument}, although {num_before} precede it")


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


def _plain(value: object, counter: Iterator[int], depth: int = 0) -> object:
    """The value with stand-ins replaced; raises where one is no tensor, array or plain value, or they are too many."""
    if depth > MAX_DEPTH:
        raise RefusedClassError(f"lists nested deeper than {MAX_DEPTH} levels")
    if next(counter) > MAX_ITEMS:  # lists that hold each other many times make millions of a short file
        raise RefusedClassError(f"more than {MAX_ITEMS:,} items")
    if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RefusedClassError(f"a tensor {list(value.shape)} that repeats what it stores")
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, (list, tuple)):
        return [_plain(item, counter, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_plain(key, counter, depth + 1): _plain(item, counter, depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        raise RefusedClassError("a numpy array of Python objects")
    if value is None or isinstance(value, (Tensor, np.ndarray, np.generic, str, bytes, bool, int, float)):
        return value
    name = value.name if isinstance(value, _Admitted) else f"{type(value).__module__}.{type(value).__qualname__}"
    raise RefusedClassError(name)
