"""Weights in the files that people have: our checkpoints, extracted weights, MONAI's and other projects' files.

Only tensors are read (`weights_only=True`); nothing in a file can run code. What describes the weights (spacing, HU
window, axis codes, backbone) comes from the header of a .safetensors, the `.json` beside a .pth, or the checkpoint.
"""

import json
import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from datasets.store.numpy_pickles import numpy_globals
from models.hub import local_weights

# Where files keep their tensors; the first that is there counts. Our checkpoints hold the student under "student", a
# finetuned network under "model"; "network_weights" is nnU-Net's name, "net" VoCo's.
CONTAINERS = ("student", "state_dict", "model", "network_weights", "model_state_dict", "net")
DESCRIBING = ("preprocessing", "backbone", "method", "module", "step", "commit", "kind", "classes")


class WeightsError(ValueError):
    """A weights file that cannot be read or does not fit; the message names it and says what to change."""


@dataclass(frozen=True)
class WeightsFile:
    """Tensors under the names that the file gives them, and its description (empty for files without one)."""

    path: str
    tensors: dict[str, torch.Tensor]
    description: dict = field(default_factory=dict)


def read_weights_file(path: str | Path, network: str = "auto") -> WeightsFile:
    """Read .safetensors, .pth or .pt onto the CPU.

    Args:
        path: a file, or `hf://owner/name` (see `models.hub`).
        network: of a file that holds a student and a teacher, the one to take; "auto" takes the student of our
            checkpoints, and of other files all tensors.

    Raises:
        WeightsError: missing, damaged, carrying code, or without tensors.
        HubError: it cannot be had from the hub.
    """
    path = local_weights(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file (--weights)")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path, network)
    if not found.tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return found if network == "auto" else replace(found, tensors=without_the_other(found.tensors, network))


def without_the_other(tensors: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    """Tensors of a file in which "student" and "teacher" are parts of names, without those of the one not wanted."""
    parts = {name: name.split(".") for name in tensors}
    if not any(network in words for words in parts.values()):
        return tensors
    other = {"student": "teacher", "teacher": "student"}[network]
    return {name: tensor for name, tensor in tensors.items() if other not in parts[name]}


def check_finite(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise WeightsError, naming a tensor, where values are infinite or NaN."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold values that are not finite, first {broken[0]}; take "
            "a checkpoint from before the run broke"
        )


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return WeightsFile(str(path), tensors, {k: _plain(v) for k, v in (file.metadata() or {}).items()})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not readable as safetensors ({error})") from error


def _plain(text: str) -> object:
    """A value of a safetensors header, which holds text only: JSON where it is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_pickled(path: Path, network: str) -> WeightsFile:
    state = read_plain(path)
    container = next((name for name in (network, *CONTAINERS) if isinstance(state.get(name), dict)), None)
    tensors = state if container is None else state[container]
    description = {name: state[name] for name in DESCRIBING if name in state}
    beside = path.with_name(path.name + ".json")
    if beside.is_file():
        description |= _read_description(beside)
    return WeightsFile(str(path), {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}, description)


def read_plain(path: Path) -> dict:
    """The dict of tensors, plain and numpy's values in a .pth or .pt file, on the CPU, with its checksums compared.

    Raises:
        WeightsError: damaged, holding objects that only code can rebuild, or no dict.
    """
    try:
        check_parts(path)
        with torch.serialization.safe_globals(numpy_globals()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as e:
        raise WeightsError(unreadable(path, e)) from e
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}; expected a dict with tensors")
    return state


def check_parts(path: Path) -> None:
    """Compare the checksum of every part of a file (a zip archive); older formats have none and pass.

    Raises:
        ValueError: a part differs: bytes of the file have changed since it was written.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong: the file was damaged")


def unreadable(path: Path, error: Exception) -> str:
    """Tell a file with foreign objects apart from one that is merely broken."""
    text = str(error)
    if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
        return (
            f"{path}: holds pickled Python objects besides tensors, which could run code, and is not loaded; "
            "save its tensors alone (a dict of tensors) in the environment that made it"
        )
    return f"{path}: not a complete PyTorch file ({first_line(error)})"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read_description(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: the weights' description is not readable ({error}); mend or remove it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object that describes the weights")
    return content
