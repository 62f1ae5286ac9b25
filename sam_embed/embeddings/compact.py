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
    decoder_of_int8,
    decoder_of_pca,
    decoder_of_pq,
    encode_int8,
    encode_pca,
    encode_pq,
    expand,
    squeeze,
)

FORMS = ("fp16", "int8", "pca", "pq")
COARSE_STEP = 0.05  # the coarse map has few voxels: finer steps than those of the fine map cost nothing
MAP_NAMES = ("fine", "coarse", "semantic")


@dataclass(frozen=True)
class Storage:
    """How embeddings are stored; its fields are flags, `form` is --storage.

    Attributes:
        form: one of FORMS.
        pca_step: of pca, rounding along principal axes of unit vectors; a score's error grows with it
        max_bytes: of pca, bytes per fine voxel above which its steps widen
        pq_bytes: of pq, bytes per fine voxel
    """

    form: str = field(default="pca", metadata={"flag": False})
    pca_step: float = 0.15
    max_bytes: float = 18.0
    pq_bytes: int = 16

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"--storage is {self.form!r}; choose one of {', '.join(FORMS)}")
        if not 0.016 <= self.pca_step <= 1:
            raise ValueError(f"--pca_step must lie in 0.016..1, received {self.pca_step}")
        if self.max_bytes < 1 or self.pq_bytes < 1:
            raise ValueError(
                f"--max_bytes and --pq_bytes must be 1 or more, received {self.max_bytes} and {self.pq_bytes}"
            )


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
        form, encoded = _encode(voxels, storage, is_coarse=name == "coarse")
        parts |= {f"{name}.{part}": tensor.contiguous() for part, tensor in encoded.items()}
        described[name] = {"form": form, "shape": list(maps[name].shape)}
    if body is not None:
        parts["body.codes"] = squeeze(np.packbits(body.numpy()))
    return parts, json.dumps({"maps": described, "storage": asdict(storage)})


def _stored_voxels(name: str, body: Tensor | None) -> Tensor | None:
    """int64 [N], which voxels of a map are stored; None for all: the coarse map, and where no body is known."""
    if name == "coarse" or body is None or not body.any():
        return None
    return body.flatten().nonzero()[:, 0]


def _encode(voxels: Voxels, storage: Storage, is_coarse: bool) -> tuple[str, Parts]:
    if storage.form == "int8":
        return "int8", encode_int8(voxels)
    if is_coarse:
        return "pca", encode_pca(voxels, min(COARSE_STEP, storage.pca_step), max_bytes=float("inf"))
    if storage.form == "pca":
        return "pca", encode_pca(voxels, storage.pca_step, storage.max_bytes)
    return "pq", encode_pq(voxels, storage.pq_bytes)


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
            decoder = _decoder(forms[name], own, shape[0], number, header["storage"])
            maps[name] = _decode_map(decoder, shape, index, number)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"lacks or garbles a part ({error!r})") from error
    return maps


def _decoder(form: str, parts: Parts, num_channels: int, num_vectors: int, storage: dict) -> Decoder:
    if form == "pq":
        return decoder_of_pq(parts, num_channels, num_vectors, int(storage["pq_bytes"]))
    if form == "pca":
        return decoder_of_pca(parts, num_channels, num_vectors)
    if form == "int8":
        return decoder_of_int8(parts, num_channels, num_vectors)
    raise ValueError(f"stored as {form!r}, which this version does not know")


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
