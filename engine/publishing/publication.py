"""Weights with everything that is known of how they came about, and the folder in which they are published.

The folder holds `model.safetensors` (its header describes it, so that it loads without flags), `config.json` (the same,
with the run's flags) and `README.md` (the card). Folders of the machine that trained are left out, and so are names of
cases: they may name people.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from datasets.store.files import write_text
from engine.checkpoint import CheckpointError, load_checkpoint, require
from engine.segmentation.setup import KIND
from engine.weights import DESCRIBING, chosen_part, describe, extract, save_weights
from models.hub import HUB, WEIGHTS_NAME
from models.methods import METHODS
from models.weights_file import read_weights_file

CONFIG, CARD = "config.json", "README.md"
FILES = (WEIGHTS_NAME, CONFIG, CARD)
SEGMENTER_FACTS = ("kind", "backbone", "preprocessing", "classes", "step", "commit", "versions")
FOLDERS = re.compile(r"(?:[^=/]*/)+(?=[^/])")  # all but the last part of a path


@dataclass(frozen=True)
class Publication:
    """Weights under the network's own names, and what is known of them.

    Attributes:
        description: what loading them needs, in plain values: kind or method, backbone, preprocessing, classes ...
        flags: of the run, empty where they are not known.
        facts: further values for the card: num_training_cases, best_dice, command, started, pretrained.
    """

    weights: dict[str, Tensor]
    description: dict
    flags: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)

    @property
    def is_segmenter(self) -> bool:
        """Whether they are a finetuned network, else an encoder (with decoder, or without)."""
        return self.description.get("kind") == KIND

    @property
    def num_parameters(self) -> int:
        """Numbers in all floating-point tensors."""
        return sum(tensor.numel() for tensor in self.weights.values() if tensor.is_floating_point())


def collect(path: str | Path, key: str = "auto") -> Publication:
    """What a file holds for others.

    Args:
        path: a checkpoint of pretraining or finetuning, with the run.json beside it, or extracted weights.
        key: of a checkpoint of pretraining, the network to take; "auto" takes the teacher where there is one.

    Raises:
        CheckpointError, WeightsError: unreadable, or weights that do not describe themselves.
    """
    file = read_weights_file(path)
    kind = file.description.get("kind")
    if kind not in (KIND, *METHODS):
        names = ("backbone", "preprocessing")
        require(file.description, names, path, "weights by extract_backbone_weights.py, with the .json beside a .pth")
        return Publication(file.tensors, file.description)
    state = load_checkpoint(path, (KIND, *METHODS))
    if kind == KIND:
        require(state, SEGMENTER_FACTS, path, "best.pth or checkpoint.pth of a finetuning run")
        weights, description = state["model"], {name: state[name] for name in SEGMENTER_FACTS}
    else:
        require(state, DESCRIBING, path, "a checkpoint of main_ddp.py")
        part = chosen_part(state, key)
        weights, description = extract(state, part, False, path), describe(state, part)
    return Publication(weights, description, without_folders(state.get("flags", {})), facts_of(state, Path(path)))


def facts_of(state: dict, path: Path) -> dict:
    """What a checkpoint, and the run.json beside it, say of the run for its card."""
    facts = {name: state[name] for name in ("num_training_cases", "best_dice") if name in state}
    if facts.get("best_dice", 0) < 0:
        del facts["best_dice"]  # nothing was validated
    if "training_cases" in state:
        facts["num_training_cases"] = len(state["training_cases"])
    if pretrained := {name: value for name, value in state.get("pretrained", {}).items() if name != "path"}:
        facts["pretrained"] = pretrained
    record = path.parent / "run.json"
    if record.is_file():
        try:
            run = json.loads(record.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{record}: not readable ({error}); mend or remove it") from error
        words = run.get("command", "").split(" ")
        facts |= {"started": run.get("started"), "command": " ".join(map(without_folders, words))}
    return facts


def without_folders(value: object) -> object:
    """Plain values whose paths have lost their folders: of `/home/me/data` and `--data_dir=me/data` stays `data`."""
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str) or HUB in value:
        return value
    return FOLDERS.sub("", value)


def write_folder(publication: Publication, card: str, folder: str | Path) -> None:
    """Write the files of `FILES`, replacing those of before.

    Raises:
        FileWriteError: the folder cannot be written to, or is full.
    """
    folder = Path(folder)
    save_weights(publication.weights, publication.description, folder / WEIGHTS_NAME)
    config = publication.description | publication.facts | {"flags": publication.flags}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / CARD, card)
