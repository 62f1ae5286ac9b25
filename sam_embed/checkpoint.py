"""Reading and writing the network's weights: our own checkpoints and the published files, without running their code.

Our format is a dictionary of tensors and plain values: `kind` = "sam_embed", `state_dict`, `options` (of the
constructor), `preprocessing` (see `EmbedderInfo`) and whatever the training adds (step, optimiser, commit, ...). A
.safetensors holds the weights alone, in half precision, and the rest as text in its header.
Published files are a bare state dict, or what mmcv writes: {"meta", "state_dict", ...}, names perhaps behind `module.`.
"""

import dataclasses
import hashlib
import json
import math
import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datasets.ct.geometry import CANONICAL_AXCODES
from datasets.store.files import write_bytes
from datasets.store.numpy_pickles import numpy_globals
from sam_embed.network import AnatomicalEmbedder

KIND = "sam_embed"
SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "sam_phantom.safetensors"  # comes with the repository
PREFIXES = ("module.", "model.")


class CheckpointError(ValueError):
    """A file that holds no usable weights; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class EmbedderOptions:
    """Which SAM network is used; its field is a flag.

    Attributes:
        checkpoint_file: weights of the embedding network; unset = those that come with the repository
    """

    checkpoint_file: str = str(SHIPPED)


@dataclasses.dataclass(frozen=True)
class EmbedderInfo:
    """How volumes must be prepared for a network; the defaults are what the published checkpoint saw.

    Attributes:
        spacing_mm: SAM's grid (D, H, W), mm
        hu_min: HU are clipped to [hu_min, hu_max] ...
        hu_max: ... mapped to [0, scale_to] ...
        scale_to: ... see --hu_max ...
        offset: ... and this is added
        axcodes: orientation of the volumes
        source: name of the file
        fingerprint: of the weights, so that stored embeddings of other weights are not mistaken for these
    """

    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
    hu_min: float = -1024.0
    hu_max: float = 3071.0
    scale_to: float = 255.0
    offset: float = -50.0
    axcodes: str = dataclasses.field(default=CANONICAL_AXCODES, metadata={"flag": False})
    source: str = dataclasses.field(default="", metadata={"flag": False})
    fingerprint: str = dataclasses.field(default="", metadata={"flag": False})

    def __post_init__(self) -> None:
        """Check what volumes are prepared with, and turn a list of lengths, which checkpoints have, into a tuple."""
        object.__setattr__(self, "spacing_mm", tuple(self.spacing_mm))
        lengths, values = self.spacing_mm, (self.hu_min, self.hu_max, self.scale_to, self.offset)
        if len(lengths) != 3 or not all(0 < length < math.inf for length in lengths):
            raise ValueError(f"--spacing_mm {lengths}: expected three lengths (D H W) above zero, mm")
        if not all(map(math.isfinite, values)) or self.hu_min >= self.hu_max:
            raise ValueError(
                f"--hu_min {self.hu_min}, --hu_max {self.hu_max}, --scale_to {self.scale_to}, --offset {self.offset}: "
                "expected numbers, and a low end below the high end"
            )

    def preprocessing(self) -> dict:
        """The part that a checkpoint stores, as plain values."""
        stored = dataclasses.asdict(self)
        del stored["source"], stored["fingerprint"]
        return {**stored, "spacing_mm": list(self.spacing_mm)}


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change when any weight changes."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode())
        digest.update(state_dict[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def embedder_checkpoint(network: AnatomicalEmbedder, info: EmbedderInfo, **extra) -> dict:
    """The dictionary to save for a network; `extra` holds what training needs to resume."""
    return {
        "kind": KIND,
        "state_dict": network.state_dict(),
        "options": dataclasses.asdict(network.options),
        "preprocessing": info.preprocessing(),
        **extra,
    }


def write_small(path: str | Path, network: AnatomicalEmbedder, info: EmbedderInfo, card: Mapping) -> None:
    """Write the weights alone in half precision, a quarter of a checkpoint that can resume.

    Args:
        path: ends in .safetensors.
        card: what else is known of the weights, plain values.

    Raises:
        CheckpointError: a weight that half precision cannot hold, or another suffix.
    """
    if Path(path).suffix != SHIPPED.suffix:
        raise CheckpointError(f"{path}: expected a name that ends in {SHIPPED.suffix} (--output)")
    weights = network.state_dict()
    halved = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    if lost := [name for name, value in halved.items() if not torch.isfinite(value).all()]:
        raise CheckpointError(f"{path}: half precision does not hold the values of {lost[0]}")
    described = embedder_checkpoint(network, info, card=dict(card))
    texts = {name: json.dumps(value) for name, value in described.items() if name != "state_dict"}
    write_bytes(path, save({name: value.contiguous() for name, value in halved.items()}, metadata=texts))


def load_embedder(checkpoint_file: str | Path) -> tuple[AnatomicalEmbedder, EmbedderInfo]:
    """Build the network that a file's weights fit, on the CPU, in float32 and in evaluation mode.

    Args:
        checkpoint_file: our checkpoint or .safetensors, a bare published state dict, or an mmcv file of SAM or UAE-S.

    Raises:
        CheckpointError: no such file, not loadable without running code, names and shapes that do not fit, or a network
            trained on another axis order.
    """
    content = _load_plain(Path(checkpoint_file))
    state_dict = _state_dict_of(content, checkpoint_file)
    is_ours = content.get("kind") == KIND
    # A published file says nothing about itself; only UAE-S has a semantic head.
    published = {"semantic": any(name.startswith("semantic_head.") for name in state_dict)}
    network = _network_of(content.get("options") if is_ours else published, checkpoint_file)
    try:
        network.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), 600)
        raise CheckpointError(f"{checkpoint_file}: does not fit the SAM network ({problems})") from error
    if broken := [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{checkpoint_file}: {broken[0]} holds values that are not finite (--checkpoint_file)")
    preprocessing = content.get("preprocessing", {}) if is_ours else {}
    if not isinstance(preprocessing, Mapping):
        raise CheckpointError(f"{checkpoint_file}: its preprocessing is {preprocessing!r:.80}, expected named values")
    axcodes = preprocessing.get("axcodes", CANONICAL_AXCODES)
    if axcodes != CANONICAL_AXCODES:
        raise CheckpointError(
            f"{checkpoint_file}: trained on volumes in axis order {axcodes}, expected {CANONICAL_AXCODES} "
            "(--checkpoint_file)"
        )
    identity = {"source": Path(checkpoint_file).name, "fingerprint": weights_fingerprint(network.state_dict())}
    try:
        info = EmbedderInfo(**preprocessing, **identity)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint_file}: its preprocessing cannot be used ({error})") from error
    return network.eval(), info


def _network_of(options: object, source: str | Path) -> AnatomicalEmbedder:
    """The network that a checkpoint's options describe."""
    try:
        return AnatomicalEmbedder(**options)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(f"{source}: its options describe no SAM network ({error})") from error


def _load_plain(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint (--checkpoint_file)")
    if path.suffix == SHIPPED.suffix:
        return _load_small(path)
    try:
        # mmcv's meta may hold numpy numbers (a best score).
        with torch.serialization.safe_globals(numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, ValueError, OSError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint that loads without running code ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return dict(content)


def _load_small(path: Path) -> dict:
    """The content of a .safetensors by `write_small`, under the names of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            described = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as weights of a SAM network ({error})") from error
    return {**described, "state_dict": weights}


def _state_dict_of(content: dict, source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, freed of wrapper prefixes."""
    kind = content.get("kind", KIND)
    if kind != KIND:
        raise CheckpointError(f"{source}: a checkpoint of kind {kind!r}, expected {KIND!r} (--checkpoint_file)")
    weights = content.get("state_dict", content)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{source}: its state_dict is a {type(weights).__name__}, expected named tensors")
    weights = {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: tensor for name, tensor in weights.items()}
    if not weights:
        raise CheckpointError(f"{source}: holds no tensors, expected the weights of a SAM network")
    return weights
