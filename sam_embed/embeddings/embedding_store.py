"""Embeddings of whole volumes: what they hold, where their voxels lie, and their files.

One file per case, `<embed_dir>/<case>.safetensors`: half-precision tensors, or the small codes of
`sam_embed.embeddings.compact`, and a JSON header. Files of all forms may lie in one folder: loading decodes them.
Reading a file runs no code; it is written aside and renamed, so that a file that exists is whole, and the checksum in
its header shows damage that came later.
"""

import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datasets.store.files import write_bytes
from sam_embed.embeddings.compact import FP16, Storage, pack, unpack

SUFFIX = ".safetensors"
FORMAT = "sam_embed.embedding.1"
COMPACT_FORMAT = "sam_embed.embedding.2"
NUM_NAMED = 5  # cases that a message names
EMBED_AGAIN = "delete it and embed the case again (scripts/generate_sam_embeddings.py)"


class EmbedDirError(ValueError):
    """A folder of embeddings that a run cannot use; the message names cases and the flag."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of one volume.

    Attributes:
        name: of the case.
        fine: float16 [C, d, h, w], unit length over channels.
        coarse: float16 [C, d', h', w'], likewise.
        fine_affine, coarse_affine: float64 [4, 4], index (d, h, w) of either grid -> world mm.
        semantic: float16 like `fine` for networks with a semantic head, else None.
        body: bool [d, h, w], True where a fine voxel lies inside the patient; None where it was not stored.
        fingerprint: of the weights that made it.
        source: identity of the CT it was made from (`CaseSource.identity`); empty where it is not known.
    """

    name: str
    fine: Tensor
    coarse: Tensor
    fine_affine: np.ndarray
    coarse_affine: np.ndarray
    semantic: Tensor | None = None
    body: Tensor | None = None
    fingerprint: str = ""
    source: str = ""

    @property
    def fine_spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring fine voxels along (D, H, W)."""
        return tuple(np.linalg.norm(self.fine_affine[:3, :3], axis=0).tolist())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What there is to store."""
        named = {"fine": self.fine, "coarse": self.coarse, "semantic": self.semantic, "body": self.body}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @cached_property
    def coarse_positions(self) -> list[np.ndarray]:
        """Per axis, the coarse index at which each fine index lies; the grids are parallel, so axes are separate."""
        fine_to_coarse = np.linalg.inv(self.coarse_affine) @ self.fine_affine
        return [
            fine_to_coarse[axis, axis] * np.arange(size) + fine_to_coarse[axis, 3]
            for axis, size in enumerate(self.fine.shape[1:])
        ]


def embedding_path(embed_dir: str | Path, name: str) -> Path:
    return Path(embed_dir) / f"{name}{SUFFIX}"


def embedded_cases(embed_dir: str | Path) -> list[str]:
    """Names of all cases with an embedding in a folder, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(embed_dir).glob(f"*{SUFFIX}"))


def as_parts(embedding: Embedding, storage: Storage = FP16) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An embedding as tensors by name and a header of plain text; `from_parts` reads them."""
    parts, described = embedding.tensors(), ""
    if storage.form != FP16.form:
        parts, described = pack(parts, storage)
    header = {
        "format": COMPACT_FORMAT if described else FORMAT,
        "name": embedding.name,
        "fingerprint": embedding.fingerprint,
        "source": embedding.source,
        "fine_affine": json.dumps(np.asarray(embedding.fine_affine).tolist()),
        "coarse_affine": json.dumps(np.asarray(embedding.coarse_affine).tolist()),
    }
    if described:
        header["compact"] = described
    contiguous = {name: tensor.contiguous() for name, tensor in parts.items()}
    return contiguous, header | {"crc32": checksum_of_tensors(contiguous)}


def from_parts(parts: Mapping[str, Tensor], header: Mapping[str, str]) -> Embedding:
    """The embedding of `as_parts`, decoded to half precision.

    Raises:
        ValueError: another format, or tensors that are not those that were written.
        KeyError: a part is missing.
    """
    if header.get("format") not in (FORMAT, COMPACT_FORMAT):
        raise ValueError(f"format {header.get('format')!r}, expected {FORMAT!r} or {COMPACT_FORMAT!r}")
    if "crc32" in header and header["crc32"] != checksum_of_tensors(parts):  # older files have none
        raise ValueError("its checksum differs")
    tensors = unpack(dict(parts), header["compact"]) if header["format"] == COMPACT_FORMAT else parts
    return Embedding(
        name=header["name"],
        fine=tensors["fine"],
        coarse=tensors["coarse"],
        fine_affine=np.array(json.loads(header["fine_affine"]), dtype=np.float64),
        coarse_affine=np.array(json.loads(header["coarse_affine"]), dtype=np.float64),
        semantic=tensors.get("semantic"),
        body=tensors.get("body"),
        fingerprint=header["fingerprint"],
        source=header.get("source", ""),
    )


def save_embedding(embed_dir: str | Path, embedding: Embedding, storage: Storage = FP16) -> Path:
    """Write one case's file aside and rename it."""
    path = embedding_path(embed_dir, embedding.name)
    parts, header = as_parts(embedding, storage)
    write_bytes(path, save(parts, metadata=header))
    return path


def is_embedded(embed_dir: str | Path, name: str, fingerprint: str, source: str) -> bool:
    """Whether a case is embedded by these weights and, as far as the two identities show, from the CT as it is now.

    Only identities of one kind ("store:...", "file:...") can show that a CT has changed.
    """
    header = stored_header(embed_dir, name)
    stored = header.get("source", "")
    has_changed = stored != source and stored.partition(":")[0] == source.partition(":")[0]
    return header.get("fingerprint") == fingerprint and not has_changed


def stored_form(embed_dir: str | Path, name: str) -> str | None:
    """The form ("fp16", "pca", ...) of a stored embedding; None where there is no usable file."""
    header = stored_header(embed_dir, name)
    if header.get("format") == COMPACT_FORMAT:
        return json.loads(header["compact"])["storage"]["form"]
    return FP16.form if header.get("format") == FORMAT else None


def stored_header(embed_dir: str | Path, name: str) -> dict[str, str]:
    """A file's header without its tensors: `fingerprint`, `source` and more; empty where there is no usable file."""
    try:
        with safe_open(embedding_path(embed_dir, name), framework="pt") as stored:
            return stored.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return {}


def common_weights(embed_dir: str | Path, headers: Mapping[str, Mapping[str, str]]) -> str:
    """The fingerprint of the weights behind some cases' embeddings, given the `stored_header` of each.

    Raises:
        EmbedDirError: cases without an embedding, or embeddings of several SAMs.
    """
    by_weights: dict[str | None, list[str]] = {}
    for name, header in headers.items():
        by_weights.setdefault(header.get("fingerprint"), []).append(name)
    if missing := by_weights.get(None):
        raise EmbedDirError(
            f"--embed_dir {embed_dir}: {len(missing)} of {len(headers)} cases have no embedding, first "
            f"{named(missing)}; run scripts/generate_sam_embeddings.py with this --embed_dir"
        )
    if len(by_weights) > 1:
        listed = "; ".join(f"{weights}: {named(cases)}" for weights, cases in by_weights.items())
        raise EmbedDirError(
            f"--embed_dir {embed_dir}: embeddings of different weights ({listed}); embed all cases with one "
            "--checkpoint_file (scripts/generate_sam_embeddings.py)"
        )
    return next(iter(by_weights))


def named(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")


def load_embedding(embed_dir: str | Path, name: str) -> Embedding:
    """Read one case's embedding, decoded to half precision.

    Raises:
        ValueError: no such file, a damaged one, or one of another kind.
    """
    path = embedding_path(embed_dir, name)
    if not path.is_file():
        raise ValueError(f"{path}: no embedding of this case; run scripts/generate_sam_embeddings.py (--embed_dir)")
    try:
        with safe_open(path, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
        embedding = from_parts(tensors, header)
        _check(embedding, name)
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; {EMBED_AGAIN}") from error
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: damaged embedding file ({error}); {EMBED_AGAIN}") from error
    return embedding


def checksum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of contiguous tensors, in the order of their names, as 8 hexadecimal digits."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def _check(embedding: Embedding, name: str) -> None:
    """Raise ValueError unless it is the embedding of this case, and its parts fit together."""
    if embedding.name != name:
        raise ValueError(f"it is the embedding of {embedding.name!r}")
    maps = {key: getattr(embedding, key) for key in ("fine", "coarse", "semantic")}
    for key, vectors in maps.items():
        if vectors is None:
            continue
        if vectors.ndim != 4 or vectors.numel() == 0 or not vectors.is_floating_point():
            raise ValueError(f"{key} is {vectors.dtype} of shape {list(vectors.shape)}, expected floats [C, d, h, w]")
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{key} holds values that are not finite")
    is_like_fine = embedding.semantic is None or embedding.semantic.shape == embedding.fine.shape
    is_body_like_fine = embedding.body is None or embedding.body.shape == embedding.fine.shape[1:]
    if len(embedding.fine) != len(embedding.coarse) or not (is_like_fine and is_body_like_fine):
        raise ValueError(f"shapes {[list(tensor.shape) for tensor in embedding.tensors().values()]} do not fit")
    for affine in (embedding.fine_affine, embedding.coarse_affine):
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
            raise ValueError(f"affine {affine.tolist()} places no voxels in the world")


class EmbeddingCache:
    """Loads embeddings from a folder and keeps the few used last, within a byte limit (at least one is kept)."""

    def __init__(self, embed_dir: str | Path, limit_mb: float = 2048) -> None:
        self.embed_dir, self.limit_bytes = Path(embed_dir), limit_mb * 2**20
        self._kept: OrderedDict[str, Embedding] = OrderedDict()

    def __getitem__(self, name: str) -> Embedding:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        self._kept[name] = load_embedding(self.embed_dir, name)
        while len(self._kept) > 1 and sum(kept.num_bytes for kept in self._kept.values()) > self.limit_bytes:
            self._kept.popitem(last=False)
        return self._kept[name]
