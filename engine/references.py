"""Where the labels that a command carries to other scans come from: label maps of its flags, or phantoms.

With the phantoms comes a network that was taught with their labels. It has its say in where an organ is.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import torch

from datasets.ct.images import CT, NAMES
from datasets.ct.nifti import Volume
from datasets.lists.label_classes import FLARE22, LabelClasses
from engine.segmentation.segmenter import Segmenter, open_segmenter
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.matching.kept import SHIPPED_REFERENCES, load_references
from sam_embed.matching.opinion import Opinion
from sam_embed.matching.reference import Reference

PHANTOMS = "phantoms"  # what a flag says instead of files
NONE = "none"
SHIPPED_NETWORK = Path(__file__).resolve().parents[1] / "weights" / "organs_phantom.safetensors"


def classes_of(labels: Iterable[Volume]) -> LabelClasses:
    """All label values of some label maps, each named by its number.

    Raises:
        ValueError: they hold nothing but 0, or more than 255 values.
    """
    values, paths = {0}, []
    for label in labels:
        values |= set(np.unique(label.array).tolist())
        paths.append(label.path)
    values = sorted(values - {0})
    if not values:
        raise ValueError(f"--labels {' '.join(paths)}: every voxel is 0; expected label maps with organs")
    return LabelClasses((0, *values), ("background", *(f"label {value}" for value in values)))


def open_phantoms() -> tuple[list[Reference], LabelClasses]:
    """The phantoms that come with the repository, and the classes of the organs that they may name."""
    references, facts = load_references(SHIPPED_REFERENCES)
    values = [FLARE22.index(organ) + 1 for organ in facts["organs"]]
    return references, LabelClasses((0, *values), ("background", *facts["organs"]))


def check_embedded_by(references: Sequence[Reference], info: EmbedderInfo, checkpoint_file: str, flag: str) -> None:
    """Check that phantoms were embedded with the network of a checkpoint.

    Args:
        flag: that asked for phantoms, with its dashes.

    Raises:
        ValueError: with another one.
    """
    theirs = references[0].embedding.fingerprint
    if theirs != info.fingerprint:
        raise ValueError(
            f"{checkpoint_file} is SAM {info.fingerprint}, and the phantoms were embedded with SAM {theirs}; leave "
            f"--checkpoint_file away with {flag} {PHANTOMS}"
        )


def add_organ_network(group: jsonargparse.ArgumentParser) -> None:
    """The flag of the network that helps where phantoms are the reference."""
    text = f"with the word {PHANTOMS}: finetuned network that has its say; {NONE} = the carried labels alone"
    group.add_argument("--organ_network", type=str, default=str(SHIPPED_NETWORK), help=text)


def check_organ_network(path: str) -> None:
    """Raise ValueError where `--organ_network` is neither a file nor the word none."""
    if path != NONE and not Path(path).is_file():
        raise ValueError(f"--organ_network {path}: no such file; expected a finetuned network, or the word {NONE}")


def open_organ_network(path: str, references: Sequence[Reference], device: torch.device) -> Segmenter | None:
    """The network of `--organ_network`; None for the word none.

    Raises:
        ValueError: a network of something else than CT, or one that does not know all labels of the references.
        CheckpointError: no finetuned network.
    """
    if path == NONE:
        return None
    network = open_segmenter(path, device)
    if network.preprocessing.images != CT:
        raise ValueError(
            f"--organ_network {path}: expected a network of CT, received one of {NAMES[network.preprocessing.images]}"
        )
    labels = {value for reference in references for value in np.unique(reference.labels).tolist()}
    if missing := sorted(labels - set(network.classes.values)):
        raise ValueError(f"--organ_network {path}: knows no label {missing}, which the {PHANTOMS} have")
    return network


def opinion_of(network: Segmenter | None, volume: Volume) -> Opinion | None:
    """What a network says of a volume, for `carry_labels`."""
    if network is None:
        return None
    return lambda shape, affine: dict(zip(network.classes.values, network.probabilities(volume, shape, affine).numpy()))
