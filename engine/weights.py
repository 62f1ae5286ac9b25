"""Weights that leave a run and weights that one starts from, in one layout: the network's own names, no prefix.

A checkpoint of pretraining keeps the backbone under `backbone.network.`, for the student (whole network) and the
teacher (encoder) alike. Extraction drops that prefix and the one-channel reconstruction layer `out.`, whose shape no
segmentation network shares, so that `model.load_state_dict(weights, strict=False)` fits without further ado.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.checkpoint import CheckpointError
from engine.run import load_pretraining
from models import nnunet_checkpoint
from models.layouts import LAYOUTS
from models.methods import METHODS
from models.methods.method import Method, average_towards
from models.pretrained import LoadReport, load_pretrained, own_head_name
from models.weights_file import WeightsError, WeightsFile, check_finite, read_weights_file

BACKBONE_PREFIX = "backbone.network."
HEAD_PREFIX = "head."
TASK_LAYER_PREFIX = "out."
CHECKPOINT_KEYS = ["auto", "student", "teacher"]  # auto: the teacher where the run has one, else the student
SUFFIXES = (".pth", ".safetensors")  # the file's suffix decides the container
DESCRIBING = ("backbone", "preprocessing", "step", "epoch", "commit", "versions")  # entries of a checkpoint
FORMATS = ("monai", "safetensors", *LAYOUTS, nnunet_checkpoint.FORMAT)


def chosen_part(state: dict, wanted: str = "auto", prefers_decoder: bool = False) -> str:
    """The part of a checkpoint to extract; "auto" takes the teacher where it has a backbone, else the student.

    Args:
        state: a loaded checkpoint of pretraining.
        wanted: auto, student or teacher.
        prefers_decoder: "auto" takes the student where it has a decoder, which teachers lack.
    """
    if wanted != "auto":
        return wanted

    def has(part: str, prefix: str) -> bool:
        return any(name.startswith(BACKBONE_PREFIX + prefix) for name in state.get(part, {}))

    is_student = prefers_decoder and has("student", "decoder")
    return "teacher" if has("teacher", "") and not is_student else "student"


def extract(
    state: dict, key: str, with_head: bool, path: str | Path, with_task_layer: bool = False
) -> dict[str, torch.Tensor]:
    """The backbone's weights (and the head's under `head.`) of a checkpoint, under the network's own names.

    Args:
        state: a loaded checkpoint of pretraining.
        key: `student` or `teacher`.
        with_head: whether to keep the projection head too.
        path: named in errors.
        with_task_layer: whether to keep the reconstruction layer too, under `out.`, where there is one.

    Raises:
        CheckpointError: the checkpoint holds no such module, the module holds no backbone, or values are not finite.
    """
    if key not in state:
        raise CheckpointError(f"{path}: holds no {key!r}; it holds {', '.join(map(str, state))}")
    if others := [name for name, value in state[key].items() if not torch.is_tensor(value)]:
        raise CheckpointError(f"{path}: {others[0]!r} of its {key} is no tensor; the file is damaged")
    weights = {
        name.removeprefix(BACKBONE_PREFIX): value.contiguous()
        for name, value in state[key].items()
        if name.startswith(BACKBONE_PREFIX) and (with_task_layer or is_shared_with_segmenters(name))
    }
    if not weights:
        raise CheckpointError(f"{path}: no key of its {key} starts with {BACKBONE_PREFIX}; there is nothing to extract")
    if with_head:
        head = {name: value.contiguous() for name, value in state[key].items() if name.startswith(HEAD_PREFIX)}
        if not head:
            raise CheckpointError(f"{path}: its {key} has no head (its method and flags built none)")
        weights |= head
    try:
        check_finite(weights, path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    return weights


def describe(state: dict, key: str) -> dict:
    """What a user of the weights must know, in plain values.

    Args:
        state: a loaded checkpoint of pretraining.
        key: the network that they are taken from, `student` or `teacher`.
    """
    return {"method": state["kind"], "module": key} | {name: state[name] for name in DESCRIBING}


def read_encoder(path: str | Path, key: str = "auto") -> WeightsFile:
    """Weights to encode with, from a file of any kind that we know.

    Args:
        key: of a pretraining checkpoint, and of a file that holds a student and a teacher, the network to take; "auto"
            takes a checkpoint's teacher where it has one.
    """
    file = read_weights_file(path, key)
    if file.description.get("kind") not in METHODS:
        return file
    state = load_pretraining(path)
    return WeightsFile(str(path), extract(state, chosen_part(state, key), False, path), file.description)


def weights_file_name(path: str | Path, wanted: str = "auto") -> Path:
    """The file to write: `path`, with a suffix where it has none of ours.

    Args:
        wanted: one of `FORMATS`, or "auto" for what the suffix says.

    Raises:
        ValueError: format and suffix contradict each other, or neither says what to write.
    """
    path = Path(path)
    if wanted == "safetensors" and path.suffix == ".pth":
        raise ValueError(
            f"--format safetensors writes .safetensors, but the file is called {path}: change the name or the format"
        )
    if wanted == nnunet_checkpoint.FORMAT and path.suffix == ".safetensors":
        raise ValueError(f"--format {wanted} writes .pth, but the file is called {path}: change the name")
    if path.suffix in SUFFIXES:
        return path
    if wanted == "auto":
        raise ValueError(
            f"{path}: expected a name that ends in {' or '.join(SUFFIXES)} (or --format {' or '.join(FORMATS)})"
        )
    return path.with_name(path.name + (".safetensors" if wanted == "safetensors" else ".pth"))


def halved(weights: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """Floating-point tensors in half precision; others stay as they are.

    Args:
        path: named in errors.

    Raises:
        CheckpointError: a number too large for it.
    """
    smaller = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in smaller.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers above 65504, too large for --half")
    return smaller


def save_weights(weights: dict[str, torch.Tensor], metadata: dict, path: str | Path) -> None:
    """Write weights as a plain dict of tensors (.pth, metadata beside it in `<path>.json`) or as .safetensors.

    Raises:
        ValueError: another suffix.
    """
    path = weights_file_name(path)
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    if path.suffix == ".pth":
        save_described(copies, metadata, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    # Tied tensors share memory, which safetensors refuses; the header takes text only.
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    save_file(copies, aside, metadata=texts)
    aside.replace(path)


def save_described(content: dict, metadata: dict, path: Path) -> None:
    """Write tensors and plain values by `torch.save`, and the metadata beside them in `<path>.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    torch.save(content, aside)
    described = path.with_name(path.name + ".json")
    described_aside = described.with_name(described.name + ".tmp")
    described_aside.write_text(json.dumps(metadata, indent=2) + "\n")
    described_aside.replace(described)
    aside.replace(path)


def start_from(method: Method, path: str | Path) -> LoadReport:
    """Load a file's weights into a method (`--checkpoint_file`), before its first step; a teacher starts as a copy.

    `models.pretrained` loads encoder and decoder, whatever their spelling. What else our own files hold for the student
    (heads, mask tokens, reconstruction layer) is loaded by name and shape, and so are heads of VoCo's and CAiD's files.

    Returns:
        What became of the keys of encoder and decoder, and which others were loaded.

    Raises:
        CheckpointError: unreadable, damaged, carrying code, or not for this encoder; the student is then untouched.
    """
    student = method.student
    own, network = student.state_dict(), student.backbone.network
    try:
        file = read_weights_file(path, "student")
        heads = {name: own_head_name(name) for name in file.tensors}
        named = {heads[name] if heads[name] in own else name: value for name, value in file.tensors.items()}
        file = replace(file, tensors=named)
        beside = {
            name: value
            for name, value in file.tensors.items()
            if name in own and own[name].shape == value.shape and not is_shared_with_segmenters(name)
        }
        file = replace(file, tensors={name: value for name, value in file.tensors.items() if name not in beside})
        check_finite(beside, path)
        load_pretrained(network, file)
        report = load_pretrained(network, file, min_share=0.0, part="whole")  # the decoder, as far as there is one
    except WeightsError as error:
        raise CheckpointError(f"--checkpoint_file {error}") from error
    student.load_state_dict(beside, strict=False)
    if "teacher" in method.networks():
        average_towards(method.teacher, student, 0.0)
    return replace(report, beside=list(beside))


def is_shared_with_segmenters(name: str) -> bool:
    """Whether a student's key is one that extraction keeps of the backbone's network."""
    return name.startswith(BACKBONE_PREFIX) and not name.startswith(BACKBONE_PREFIX + TASK_LAYER_PREFIX)
