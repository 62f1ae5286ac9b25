"""Features of many cases in a folder: shared out over processes, resumable, each with its place in the world.

`CASE.json` says what a case's features are, where they lie and what they were made from. It is written last, so a case
without it is made again. The features are in `CASE.safetensors` or in `.npy` files:

              .safetensors                        .npy
    pooled    "pooled" [sum of C]                 CASE.npy [sum of C]
    dense     "stride_8" [C, d, h, w], ...        CASE.stride8.npy [C, d, h, w], ...
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.ct.nifti import Volume
from datasets.store.files import write_bytes, write_text
from engine.features.extractor import FeatureExtractor, Features
from engine.flags import FlagChecks
from sam_embed.case_source import CaseSource

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class FileOptions:
    """Which features are written, and in which form.

    Attributes:
        maps: encoder maps by stride in voxels; empty = the deepest one
        dense: write the maps on their grid; else their means, joined to one vector a case
        form: kind of files
        dtype: of the numbers
    """

    maps: tuple[int, ...] = ()
    dense: bool = False
    form: Literal["safetensors", "npy"] = "safetensors"
    dtype: str = field(default="float32", metadata={"choices": list(DTYPES)})

    def __post_init__(self) -> None:
        checks = FlagChecks(self)
        checks.expect(all(stride >= 1 for stride in self.maps), "maps", "strides in voxels, 1 or more")
        checks.finish()


@dataclass
class Report:
    """Names of the cases whose features were written, of those found finished, and reasons of those that failed."""

    written: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def extract_cases(
    extractor: FeatureExtractor,
    cases: CaseSource,
    output_dir: str | Path,
    options: FileOptions,
    rank: int = 0,
    world_size: int = 1,
) -> Report:
    """Write the features of this rank's share of the cases; a case that cannot be read does not stop the others.

    Args:
        cases: all of them; rank r takes every `world_size`-th one, from r on.
        output_dir: made if missing. Cases that it has from the same weights, settings and CT are kept.

    Raises:
        ValueError: the encoder has no map at a stride of `options.maps`.
        FileWriteError: the folder cannot be written to, or is full; what is finished stays.
    """
    strides = tuple(sorted(options.maps)) or (extractor.strides[-1],)
    extractor.check_strides(strides)
    share, settings = cases.names[rank::world_size], settings_of(extractor, options, strides)
    made_from = {name: settings | {"source": cases.identity(name)} for name in share}
    report = Report(reused=[name for name in share if is_finished(output_dir, name, made_from[name])])
    finished = set(report.reused)
    missing = [name for name in share if name not in finished]
    bar = tqdm(missing, desc="features", unit="case", initial=len(finished), total=len(share), disable=rank > 0)
    for name in bar:
        bar.set_postfix_str(name)
        try:
            volume = cases.read(name)
            features = extractor(volume, strides)
        except (ValueError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            report.failed[name] = str(error) or type(error).__name__
            continue
        write_features(output_dir, name, features, volume, made_from[name], options)
        report.written.append(name)
    return report


def settings_of(extractor: FeatureExtractor, options: FileOptions, strides: tuple[int, ...]) -> dict:
    """Everything beside the CT that decides a case's features, in plain values."""
    return {
        "weights": extractor.fingerprint(),
        "preprocessing": extractor.preprocessing.as_dict(),
        "axcodes": extractor.axcodes,
        "overlap": extractor.windows.overlap,
        "precision": extractor.windows.precision,
        "strides": list(strides),
        "dense": options.dense,
        "form": options.form,
        "dtype": options.dtype,
    }


def is_finished(output_dir: str | Path, name: str, made_from: dict) -> bool:
    """Whether a case's features are there, and were made from the same weights, settings and CT."""
    try:
        found = json.loads((Path(output_dir) / f"{name}.json").read_text())
        return found["made_from"] == made_from and all((Path(output_dir) / file).is_file() for file in found["files"])
    except (OSError, ValueError, TypeError, LookupError):
        return False


def write_features(
    output_dir: str | Path, name: str, features: Features, volume: Volume, made_from: dict, options: FileOptions
) -> None:
    """Write one case's features, and `NAME.json` after them."""
    folder, dtype = Path(output_dir), DTYPES[options.dtype]
    description = {
        "case": name,
        "image": {"shape": list(volume.shape), "spacing_mm": list(volume.spacing_mm), "affine": volume.affine.tolist()},
        "maps": features.geometry(),
        "made_from": made_from,
    }
    contents = contents_of(features, options, name, lambda one: one.to(dtype).contiguous())
    if options.form == "safetensors":
        tensors = {key: tensor for key, (_, tensor) in contents.items()}
        header = {key: json.dumps(value) for key, value in description.items()}
        files = {f"{name}.safetensors": safetensors.torch.save(tensors, header)}
    else:
        files = {file: npy_bytes(tensor.numpy()) for file, tensor in contents.values()}
    description["files"] = list(files)
    (folder / f"{name}.json").unlink(missing_ok=True)
    for file, content in files.items():
        write_bytes(folder / file, content)
    write_text(folder / f"{name}.json", json.dumps(description, indent=1) + "\n")


def contents_of(
    features: Features, options: FileOptions, name: str, convert: Callable[[Tensor], Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """{name of a tensor: (its .npy file, the tensor)}."""
    if not options.dense:
        return {"pooled": (f"{name}.npy", convert(features.pooled()))}
    return {f"stride_{s}": (f"{name}.stride{s}.npy", convert(one)) for s, one in features.maps.items()}


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
