"""Labelled cases that a segmenter remembers: what best.pth holds of them, and what they say about a new scan.

A remembered case is a reference kept small (`sam_embed.matching.kept`). A new scan is embedded by the same SAM, the
labels of every remembered case are carried to it (`sam_embed.matching.carry`), and together they are a prior
(`engine.segmentation.prior`). A case never remembers itself: neither under its name nor, by its voxels, under another
one.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.ct.geometry import spacing_of
from datasets.ct.images import CT, NAMES
from datasets.ct.nifti import Volume
from datasets.store.format import checksum_of
from engine.segmentation.prior import Prior, Votes, prior_of
from engine.segmentation.setup import Preprocessing
from sam_embed.checkpoint import SHIPPED, CheckpointError, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.beyond import Ends, excluded
from sam_embed.matching.carry import (
    NODE_MM,
    VOTE_MM,
    coarser_grid,
    count_votes,
    is_outside,
)
from sam_embed.matching.intensity import sharpened, shrunk
from sam_embed.matching.kept import kept, reference_of
from sam_embed.matching.nodes import thinned
from sam_embed.matching.reference import Reference
from sam_embed.network import AnatomicalEmbedder

WEIGHT, BLUR_MM = 4.0, 0.0  # where nothing is learnt; measured with networks on grids of 4 and 6 mm


@dataclass(frozen=True)
class RecallOptions:
    """Whether and how a network's memory is used; its fields are flags.

    Attributes:
        memory: use the labelled cases that best.pth remembers, if it does; false = the network alone
        sam_checkpoint: weights of the SAM that the memory was made with; empty = the path noted in best.pth, or, where
            that is gone, the weights that come with the repository
    """

    memory: bool = True
    sam_checkpoint: str = ""


@dataclass(frozen=True)
class MemoryOptions(RecallOptions):
    """What a finetuning run remembers; its fields are flags.

    Attributes:
        memory: remember labelled cases in best.pth, and let them help in validation, evaluation and prediction
        sam_checkpoint: SAM's weights, with which cases are matched; unset = those that come with the repository
        memory_cases: remember the first so many training cases; 0 = all (each takes seconds of every prediction)
        memory_weight: of the carried labels' log-probabilities, beside the network's; unset = learnt by leaving out one
            remembered case after the other, of a single case 4
        memory_blur_mm: blur of the carried labels (sigma, mm); unset = learnt likewise, of a single case 0
    """

    memory: bool = False
    sam_checkpoint: str = str(SHIPPED)
    memory_cases: int = 4
    memory_weight: float | None = None
    memory_blur_mm: float | None = None


def check_can_remember(preprocessing: Preprocessing) -> None:
    """Raise ValueError for networks that cannot have a memory: SAM matches CT volumes."""
    if preprocessing.images != CT:
        raise ValueError(
            f"--memory true: SAM matches CT, and these cases are {NAMES[preprocessing.images]}; expected --memory false"
        )
    if preprocessing.spatial_dims != 3:
        raise ValueError("--memory true: expected a 3-D network, received slices (--roi_z 1); use --memory false")


class Sam:
    """A SAM network that embeds whole scans for the memory.

    Args:
        checkpoint_file: its weights.
        device: where it runs.

    Raises:
        ValueError: the file holds no SAM.
    """

    def __init__(self, checkpoint_file: str | Path, device: torch.device) -> None:
        try:
            network, self.info = load_embedder(checkpoint_file)
        except CheckpointError as error:
            raise ValueError(f"--sam_checkpoint {checkpoint_file} holds no SAM: {error}") from error
        self.path = str(Path(checkpoint_file).resolve())
        self._network: AnatomicalEmbedder = for_inference(network).to(device)

    def embed(self, ct: Volume, name: str) -> Embedding:
        """The embedding of a CT at the nodes of dense matching; its source is a digest of the voxels."""
        embedding = embed_volume(self._network, ct, self.info, name=name)
        source = f"voxels:{checksum_of(np.ascontiguousarray(ct.array).data)}"
        return dataclasses.replace(thinned(embedding, NODE_MM), source=source)


@dataclass(frozen=True, eq=False)
class Memory:
    """What best.pth holds: tensors and plain values.

    Attributes:
        cases: of `sam_embed.matching.kept.kept`.
        sam: "path" and "fingerprint" of the SAM that made the embeddings.
        num_classes: channels of the network.
        weight, blur_mm: of the prior.
        is_learnt: whether these were learnt by leaving cases out.
    """

    cases: list[dict]
    sam: dict[str, str]
    num_classes: int
    weight: float = WEIGHT
    blur_mm: float = BLUR_MM
    is_learnt: bool = False

    def as_dict(self) -> dict:
        """For checkpoints."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def names(self) -> list[str]:
        return [case["header"]["name"] for case in self.cases]

    def describe(self) -> str:
        """For people: what is remembered, and with which strength it speaks."""
        shown = ", ".join(self.names[:4]) + (", ..." if len(self.names) > 4 else "")
        how = "learnt by leaving cases out" if self.is_learnt else "set, not learnt"
        number = f"{len(self.names)} labelled case{'s' if len(self.names) > 1 else ''}"
        return f"memory: {number} ({shown}), weight {self.weight:g}, blur {self.blur_mm:g} mm ({how})"


@dataclass(frozen=True, eq=False)
class Scan:
    """A new scan as a memory looks at it.

    Attributes:
        embedding: at the nodes of dense matching.
        hu: mean intensities, float32 [d, h, w], HU, where votes are counted: voxels of 3 mm or wider.
        affine: [4, 4], index (d, h, w) in `hu` -> world mm.
    """

    embedding: Embedding
    hu: np.ndarray
    affine: np.ndarray

    @classmethod
    def of(cls, ct: Volume, embedding: Embedding) -> "Scan":
        """A CT of any voxel size."""
        shape, affine = coarser_grid(ct.shape, ct.affine, VOTE_MM)
        return cls(embedding, shrunk(ct.array, shape), affine)


class Recall:
    """A memory in use: its cases decoded, and the SAM that embeds new scans."""

    def __init__(self, memory: Memory, sam: Sam) -> None:
        self.memory, self.sam = memory, sam
        self.references = [reference_of(case) for case in memory.cases]

    @functools.cached_property
    def _ends(self) -> list[Ends]:
        return [Ends.of(reference) for reference in self.references]

    def scan(self, ct: Volume, name: str) -> Scan:
        """A new scan, for `prior`."""
        return Scan.of(ct, self.sam.embed(ct, name))

    @property
    def names(self) -> list[str]:
        return self.memory.names

    def reference_of(self, name: str) -> Reference:
        """A remembered case."""
        return self.references[self.names.index(name)]

    def prior(self, scan: Scan) -> Prior | None:
        """What all remembered cases but the scan itself say; None where there is no other, or the scan is empty."""
        votes, num_cases = self.votes(scan)
        if votes is None:
            return None
        return prior_of(votes, self.memory.num_classes, self.memory.weight, self.memory.blur_mm, num_cases)

    def votes(self, scan: Scan) -> tuple[Votes | None, int]:
        """The labels behind `prior`, and how many cases carried them.

        Several cases are weighed by score, spread and cycle error, and the scan's intensities sharpen the votes.
        Outside of the scan's body is background.
        """
        known = zip(self.references, self._ends)
        others = [(one, ends) for one, ends in known if not is_same_case(one.embedding, scan.embedding)]
        if not others or not scan.embedding.body.any():
            return None, 0
        references, ends = zip(*others)
        grid = scan.hu.shape, scan.affine
        counts, classes, reach, beyond = count_votes(scan.embedding, references, *grid)
        counts = sharpened(counts, scan.hu, spacing_of(scan.affine))
        outside = is_outside(scan.embedding, *grid)  # a network that has seen little air finds organs there, too
        counts[0][outside], reach[outside] = 1, 1
        absent = excluded(ends, beyond, reach)
        return Votes(counts, classes.tolist(), reach, scan.affine, absent), len(others)


def is_same_case(one: Embedding, other: Embedding) -> bool:
    """Whether two embeddings are of one case: by name, or by its voxels."""
    return one.name == other.name or one.source == other.source


def make_memory(
    scans: Iterable[tuple[Embedding, Volume]], sam: Sam, num_classes: int, options: MemoryOptions
) -> Memory:
    """A memory of labelled cases."""
    cases = [kept(scan, label) for scan, label in scans]
    memory = Memory(cases, {"path": sam.path, "fingerprint": sam.info.fingerprint}, num_classes)
    given = {"weight": options.memory_weight, "blur_mm": options.memory_blur_mm}
    return dataclasses.replace(memory, **{name: float(value) for name, value in given.items() if value is not None})


def open_recall(stored: dict, checkpoint_file: str | Path, sam_checkpoint: str, device: torch.device) -> Recall:
    """The memory of a checkpoint, with its SAM.

    Args:
        stored: of `Memory.as_dict`.
        checkpoint_file: that holds it, for messages.
        sam_checkpoint: SAM's weights; empty = the path noted in the memory.

    Raises:
        ValueError: no such file, or another SAM than the memory's.
    """
    memory = Memory(**stored)
    noted, wanted = memory.sam["path"], memory.sam["fingerprint"]
    path = sam_checkpoint or (noted if Path(noted).is_file() or not SHIPPED.is_file() else str(SHIPPED))
    advice = "Name it with --sam_checkpoint, or use the network alone with --memory false"
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. {checkpoint_file} remembers cases with SAM {wanted}. {advice}")
    sam = Sam(path, device)
    if sam.info.fingerprint != wanted:
        raise ValueError(
            f"{path} is SAM {sam.info.fingerprint}, and {checkpoint_file} remembers cases with SAM {wanted} "
            f"({memory.sam['path']}). {advice}"
        )
    return Recall(memory, sam)
