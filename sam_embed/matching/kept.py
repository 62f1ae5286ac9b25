"""Labelled references kept small: what it takes to carry their labels, below 1 MB a case.

A kept case is its SAM embedding, thinned to the nodes of dense matching and coded, and its labels at 3 mm. A finetuned
network holds a few of them in its checkpoint; a file of many (`save_references`) serves scans without any label.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datasets.ct.geometry import resample
from datasets.ct.nifti import Volume
from datasets.store.files import write_bytes
from sam_embed.embeddings.compact import Storage
from sam_embed.embeddings.embedding_store import Embedding, as_parts, from_parts
from sam_embed.matching.carry import VOTE_MM
from sam_embed.matching.reference import Reference

# Bytes of a case, which with its labels (some 50 000) stay below 1 MB.
MAP_BYTES = {"fine": 600_000, "coarse": 150_000}
MOST_BYTES = Storage.max_bytes  # per voxel; more is of no use
SHIPPED_REFERENCES = Path(__file__).resolve().parents[2] / "weights" / "phantom_references.safetensors"


def kept(scan: Embedding, label: Volume) -> dict:
    """A case as `reference_of` reads it: tensors and plain values.

    Args:
        scan: with nodes for dense matching alone (`sam_embed.matching.dense.thinned`).
        label: channels, uint8 [D, H, W], on any grid.

    Raises:
        ValueError: the scan shows no patient.
    """
    if not scan.body.any():
        raise ValueError(f"{scan.name} shows no patient, so its labels cannot be kept; take it out of the list")
    most = {
        "fine": MAP_BYTES["fine"] / max(1, int(scan.body.sum())),
        "coarse": MAP_BYTES["coarse"] / scan.coarse[0].numel(),
    }
    most = {name: max(1.0, min(MOST_BYTES, number)) for name, number in most.items()}
    parts, header = as_parts(scan, Storage(max_bytes=most["fine"], max_coarse_bytes=most["coarse"]))
    array, affine = resample(label.array, label.affine, np.maximum(label.spacing_mm, VOTE_MM), order=0)
    packed = zlib.compress(np.ascontiguousarray(array, dtype=np.uint8).tobytes(), level=9)
    return {
        "parts": parts,
        "header": header,
        "label": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
        "shape": list(array.shape),
        "affine": affine.tolist(),
    }


def reference_of(case: Mapping) -> Reference:
    """The case of `kept`, to carry labels from."""
    label: Tensor = case["label"]
    array = np.frombuffer(zlib.decompress(label.numpy().tobytes()), np.uint8).reshape(case["shape"])
    return Reference(from_parts(case["parts"], case["header"]), array, np.array(case["affine"]))


def save_references(path: str | Path, cases: Sequence[dict], facts: Mapping) -> None:
    """Write cases of `kept` and what is known of them (plain values) to one .safetensors."""
    tensors = {
        f"{number}.parts.{name}": part for number, case in enumerate(cases) for name, part in case["parts"].items()
    }
    tensors |= {f"{number}.label": case["label"] for number, case in enumerate(cases)}
    described = [{name: case[name] for name in ("header", "shape", "affine")} for case in cases]
    write_bytes(path, save(tensors, metadata={"cases": json.dumps(described), "facts": json.dumps(dict(facts))}))


def load_references(path: str | Path) -> tuple[list[Reference], dict]:
    """The references of `save_references`, and the facts.

    Raises:
        ValueError: no such file, or another one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cases = json.loads(texts["cases"])
        for number, case in enumerate(cases):
            before = f"{number}.parts."
            case["parts"] = {name[len(before) :]: part for name, part in tensors.items() if name.startswith(before)}
            case["label"] = tensors[f"{number}.label"]
        return [reference_of(case) for case in cases], json.loads(texts["facts"])
    except (SafetensorError, OSError, KeyError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as labelled references ({error})") from error
