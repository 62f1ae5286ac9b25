"""Embeddings in little room: which voxels are stored, in which form, and back.

Only fine voxels inside the patient are stored (matches elsewhere are wrong, and mining drops them); outside, decoded
vectors are zero: their similarity is that of the coarse map alone. Every other vector has unit length again. What
each form costs in bytes and millimetres: `python -m benchmarks.embedding_storage`, figures in benchmarks/RESULTS.md.
"""

import json
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from sam_embed.embeddings.compact_codes import (
    Decoder,
    Parts,
    Voxels,
    blocks,
    decoder_of_pca,
    encode_pca,
    expand,
    squeeze,
)

FORMS = ("fp16", "pca")
COARSE_STEP = 0.05  # the coarse map has few voxels: finer steps than those of the fine map cost nothing
MAP_NAMES = ("fine", "coarse", "semantic")


@dataclass(frozen=True)
class Storage:
    """How embeddings are stored; its fields are flags, `form` is --storage.

    Attributes:
        form: one of FORMS.
        pca_step: of pca, rounding along principal axes of unit vectors; a score's error grows with it
        max_bytes: of pca, bytes per fine voxel above which its steps widen
        max_coarse_bytes: the same per coarse voxel
    """

    form: str = field(default="pca", metadata={"flag": False})
    pca_step: float = 0.15
    max_bytes: float = 18.0
    max_coarse_bytes: float = field(default=float("inf"), metadata={"flag": False})

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"--storage is {self.form!r}; choose one of {', '.join(FORMS)}")
        if not 0.016 <= self.pca_step <= 1:
            raise ValueError(f"--pca_step must lie in 0.016..1, received {self.pca_step}")
        if self.max_bytes < 1:
            raise ValueError(f"--max_bytes must be 1 or more, received {self.max_bytes}")


FP16 = Storage("fp16")


def pack(maps: dict[str, Tensor], storage: Storage) -> tuple[Parts, str]:
    """Maps and body mask as small tensors.

    Args:
        maps: `fine`, `coarse`, perhaps `semantic` (float16 [C, d, h, w]) and `body` (bool [d, h, w]).
        storage: form other than "fp16".

    Returns:
        Tensors by name, `<map>.<part>`, and a JSON header that says how to read them.
    """
    body, parts, described = maps.get("body"), {}, {}
    for name in MAP_NAMES:
        if name not in maps:
            continue
        voxels = Voxels(maps[name].contiguous(), _stored_voxels(name, body))
        is_coarse = name == "coarse"
        limits = (
            (min(COARSE_STEP, storage.pca_step), storage.max_coarse_bytes)
            if is_coarse
            else (storage.pca_step, storage.max_bytes)
        )
        encoded = encode_pca(voxels, *limits)
        parts |= {f"{name}.{part}": tensor.contiguous() for part, tensor in encoded.items()}
        described[name] = {"form": "pca", "shape": list(maps[name].shape)}
    if body is not None:
        parts["body.codes"] = squeeze(np.packbits(body.numpy()))
    return parts, json.dumps({"maps": described, "storage": asdict(storage)})


def _stored_voxels(name: str, body: Tensor | None) -> Tensor | None:
    """int64 [N], which voxels of a map are stored; None for all: the coarse map, and where no body is known."""
    if name == "coarse" or body is None or not body.any():
        return None
    return body.flatten().nonzero()[:, 0]


def unpack(parts: Parts, described: str) -> dict[str, Tensor]:
    """What `pack` took: float16 maps and the body mask.

    Raises:
        ValueError: the parts do not fit their header.
    """
    try:
        header = json.loads(described)
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in header["maps"].items()}
        forms = {name: entry["form"] for name, entry in header["maps"].items()}
        maps = {}
        if "body.codes" in parts:
            number = int(np.prod(shapes["fine"][1:]))
            bits = np.unpackbits(expand(parts["body.codes"], (-(-number // 8),), np.uint8), count=number)
            maps["body"] = torch.from_numpy(bits.view(bool).reshape(shapes["fine"][1:]))
        body = maps.get("body")
        for name, shape in shapes.items():
            index = _stored_voxels(name, body)
            own = {
                part.removeprefix(f"{name}."): tensor for part, tensor in parts.items() if part.startswith(f"{name}.")
            }
            number = int(np.prod(shape[1:])) if index is None else len(index)
            if forms[name] != "pca":
                raise ValueError(f"stored as {forms[name]!r}, which this version does not know")
            maps[name] = _decode_map(decoder_of_pca(own, shape[0], number), shape, index, number)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"lacks or garbles a part ({error!r})") from error
    return maps


def _decode_map(decoder: Decoder, shape: tuple[int, ...], index: Tensor | None, number: int) -> Tensor:
    """float16 [C, d, h, w] of unit vectors, zero where nothing is stored."""
    decoded = torch.zeros(shape[0], int(np.prod(shape[1:])), dtype=torch.float16)
    for first, last in blocks(number):
        vectors = decoder(first, last)
        length = vectors.square().sum(dim=0).sqrt_()  # several times as fast as F.normalize over the first dimension
        vectors = (vectors / length.clamp_min_(1e-6)).half()
        if index is None:
            decoded[:, first:last] = vectors
        else:
            decoded.index_copy_(1, index[first:last], vectors)
    return decoded.view(shape)
