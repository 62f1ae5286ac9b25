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
from models.methods.method import Method, average_towards
from models.pretrained import LoadReport, load_pretrained, own_head_name
from models.weights_file import WeightsError, check_finite, read_weights_file

BACKBONE_PREFIX = "backbone.network."
HEAD_PREFIX = "head."
TASK_LAYER_PREFIX = "out."
CHECKPOINT_KEYS = ["auto", "student", "teacher"]  # auto: the teacher where the run has one, else the student
FORMATS = {"monai": ".pth", "safetensors": ".safetensors"}  # containers of the same names


def chosen_part(state: dict, wanted: str = "auto") -> str:
    """The part of a checkpoint to extract; "auto" takes the teacher where it has a backbone, else the student.

    Args:
        state: a loaded checkpoint of pretraining.
        wanted: auto, student or teacher.
    """
    if wanted != "auto":
        return wanted
    has_teacher = any(name.startswith(BACKBONE_PREFIX) for name in state.get("teacher", {}))
    return "teacher" if has_teacher else "student"


def extract(state: dict, key: str, with_head: bool, path: str | Path) -> dict[str, torch.Tensor]:
    """The backbone's weights (and the head's under `head.`) of a checkpoint, under the network's own names.

    Args:
        state: a loaded checkpoint of pretraining.
        key: `student` or `teacher`.
        with_head: whether to keep the projection head too.
        path: named in errors.

    Raises:
        CheckpointError: the checkpoint holds no such module, the module holds no backbone, or values are not finite.
    """
    if key not in state:
        raise CheckpointError(f"{path}: holds no {key!r}; it holds {', '.join(map(str, state))}")
    weights = {
        name.removeprefix(BACKBONE_PREFIX): value.contiguous()
        for name, value in state[key].items()
        if is_shared_with_segmenters(name)
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


def weights_file_name(path: str | Path, wanted: str = "auto") -> Path:
    """The file to write: `path`, with the suffix of the format where it has none of ours.

    Args:
        wanted: a name of `FORMATS`, or "auto" for what the suffix says.

    Raises:
        ValueError: format and suffix contradict each other, or neither says what to write.
    """
    path, known = Path(path), " or ".join(FORMATS.values())
    if wanted == "auto":
        if path.suffix not in FORMATS.values():
            raise ValueError(f"{path}: expected a name that ends in {known} (or --format {' or '.join(FORMATS)})")
        return path
    if path.suffix in FORMATS.values() and path.suffix != FORMATS[wanted]:
        raise ValueError(
            f"--format {wanted} writes {FORMATS[wanted]}, but the file is called {path}: change the name or the format"
        )
    return path if path.suffix == FORMATS[wanted] else path.with_name(path.name + FORMATS[wanted])


def save_weights(weights: dict[str, torch.Tensor], metadata: dict, path: str | Path) -> None:
    """Write weights as a plain dict of tensors (.pth, metadata beside it in `<path>.json`) or as .safetensors.

    Raises:
        ValueError: another suffix.
    """
    path = weights_file_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        # Tied tensors share memory, which safetensors refuses; the header takes text only.
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
        save_file({name: value.clone() for name, value in weights.items()}, aside, metadata=texts)
    else:
        torch.save({name: value.clone() for name, value in weights.items()}, aside)
        described = path.with_name(path.name + ".json")
        described_aside = described.with_name(described.name + ".tmp")
        described_aside.write_text(json.dumps(metadata, indent=2) + "\n")
        described_aside.replace(described)
    aside.replace(path)


def start_from(method: Method, path: str | Path) -> LoadReport:
    """Load a file's weights into a method (`--checkpoint_file`), before its first step; a teacher starts as a copy.

    Encoder and decoder come by `models.pretrained`, whatever their spelling; what else our own files hold for the
    student (heads, mask tokens, reconstruction layer) by name and shape, and so does the projector of VoCo's files.

    Returns:
        What became of the keys of encoder and decoder, and which others were loaded.

    Raises:
        CheckpointError: unreadable, damaged, carrying code, or not for this encoder; the student is then untouched.
    """
    student = method.student
    own, network = student.state_dict(), student.backbone.network
    try:
        file = read_weights_file(path, "student")
        file = replace(file, tensors={own_head_name(name): value for name, value in file.tensors.items()})
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
