"""Scans to look at side by side, where a place of one lies in the others, and labels carried over: without HTTP.

Points are world mm (RAS+). Scans are numbered in the order given, planes named as in `datasets.ct.planes`. Any thread
may ask; `embed_all` and `carry_to` take seconds to minutes and run in threads of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from datasets.ct.geometry import CANONICAL_AXCODES
from datasets.ct.nifti import Volume
from datasets.ct.planes import PLANES, cut_plane, planes_of
from datasets.lists.label_classes import LabelClasses
from engine.segmentation.pictures import channel_colours
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import carry_labels
from sam_embed.matching.follow import Followed, Follower, FollowOptions
from sam_embed.matching.match import describe_box, inside, similarity_map
from sam_embed.matching.opinion import Opinion
from sam_embed.matching.reference import Reference

WAITING, WORKING, READY, FAILED = "waiting", "working", "ready", "failed"
NONE, GIVEN = "none", "given"  # further states of labels


class NotReadyError(ValueError):
    """Something was asked for that is still being made, or could not be made."""


@dataclass(eq=False)
class Scan:
    """One CT and what is known of it.

    Attributes:
        name: shown to the user.
        volume: int16 HU [D, H, W] in the canonical orientation.
        labels: uint8 channels [D, H, W], given or carried; None = none yet.
        embedding: None until it is made.
        state: of the embedding: "waiting", "working", "ready" or "failed".
        label_state: "none", "given", "working", "ready" (carried) or "failed".
        error: why something failed.
    """

    name: str
    volume: Volume
    labels: np.ndarray | None = None
    embedding: Embedding | None = None
    state: str = WAITING
    label_state: str = field(init=False)
    error: str = ""

    def __post_init__(self) -> None:
        self.label_state = NONE if self.labels is None else GIVEN


class Session:
    """The scans and everything that is asked about them.

    Args:
        scans: two or more.
        embed: makes a scan's embedding.
        options: which matches are trusted.
        classes: of the labels; None = no labels at all.
        references: labelled ones that are none of the scans. Labels are carried from them and from labelled scans.
        opinion: of a network, on a volume's organs, or None; by default the carried labels stand alone.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        embed: Callable[[Scan], Embedding],
        options: FollowOptions,
        classes: LabelClasses | None = None,
        references: Sequence[Reference] = (),
        opinion: Callable[[Volume], Opinion | None] = lambda volume: None,
    ) -> None:
        self.scans, self.classes = list(scans), classes
        self._embed, self._options, self._references = embed, options, list(references)
        self._opinion = opinion
        self._followers: dict[tuple[int, int], Follower] = {}
        self._matching, self._carrying, self._claiming = Lock(), Lock(), Lock()

    def embed_scan(self, scan: Scan) -> None:
        """Embed one scan; a failure is noted in it, so that the others can go on."""
        scan.state = WORKING
        try:
            scan.embedding = self._embed(scan)
            scan.state = READY
        except (ValueError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            scan.error, scan.state = str(error) or type(error).__name__, FAILED

    def describe(self) -> dict:
        """Names, geometry and states of all scans, as plain values; see `_describe_scan`."""
        names = self.classes.names if self.classes else ()
        colours = (255 * channel_colours(len(names))).round().astype(int).tolist() if names else []
        return {
            "axcodes": CANONICAL_AXCODES,
            "planes": {name: plane._asdict() for name, plane in PLANES.items()},
            "classes": [{"name": name, "colour": colour} for name, colour in zip(names, colours)],
            "scans": [self._describe_scan(number) for number in range(len(self.scans))],
        }

    def _describe_scan(self, number: int) -> dict:
        """One scan: `affine` is index (d, h, w) -> world mm, `map` the grid of its similarity maps."""
        scan = self.scans[number]
        described = {
            "name": scan.name,
            "path": scan.volume.path,
            "planes": list(planes_of(scan.volume.shape)),
            **_grid(scan.volume.shape, scan.volume.affine),
            "state": scan.state,
            "labels": scan.label_state,
            "can_carry": self._can_carry(number),
            "error": scan.error,
        }
        if scan.embedding is not None:
            described["map"] = _grid(scan.embedding.fine.shape[1:], scan.embedding.fine_affine)
        return described

    def plane(self, number: int, plane: str, index: int) -> np.ndarray:
        """One plane of a scan: int16 HU, as `cut_plane` gives it.

        Raises:
            IndexError: no scan, plane or slice of this number.
        """
        return _cut(self._scan(number).volume.array, plane, index)

    def label_plane(self, number: int, plane: str, index: int) -> np.ndarray:
        """One plane of a scan's labels: uint8 channels.

        Raises:
            IndexError: no scan, plane or slice of this number.
            NotReadyError: the scan has no labels.
        """
        scan = self._scan(number)
        if scan.labels is None:
            raise NotReadyError(f"{scan.name} has no labels yet")
        return _cut(scan.labels, plane, index)

    def match(self, query: int, key: int, point_mm: Sequence[float]) -> Followed:
        """Find a point [3] of one scan in another.

        Raises:
            IndexError: no scan of this number.
            NotReadyError: one of them is not embedded.
            ValueError: the point does not lie in the patient.
        """
        point_mm = self._checked_point(query, point_mm)
        self._embedding(key)
        with self._matching:  # one match fills the CPU, and the dense map of a pair is made once
            follower = self._followers.setdefault(
                (query, key), Follower(self._embedding(query), self._embedding(key), self._options)
            )
            return follower.follow(point_mm[None])

    def similarity(self, query: int, key: int, point_mm: Sequence[float]) -> np.ndarray:
        """Similarity of a point [3] of one scan to every voxel of the other's map, for display.

        Returns:
            uint8 [d, h, w]: 255 at the highest similarity; 0 at the median and below.

        Raises:
            as `match`.
        """
        point_mm = self._checked_point(query, point_mm)
        similarity = similarity_map(self._embedding(query), self._embedding(key), point_mm).cpu().numpy()
        lowest, highest = np.median(similarity), similarity.max()
        shown = (similarity - lowest) / max(highest - lowest, 1e-6)
        return np.rint(255 * np.maximum(shown, 0)).astype(np.uint8)

    def claim_carrying(self, number: int) -> bool:
        """Note that labels are about to be carried to a scan; False where they are already, or have been.

        Raises:
            IndexError: no scan of this number.
            NotReadyError: nothing to carry from, or something is not embedded yet.
        """
        scan = self._scan(number)
        if not self._can_carry(number):
            raise NotReadyError(f"{scan.name}: labels cannot be carried to it yet; are all scans embedded?")
        with self._claiming:
            is_free = scan.label_state in (NONE, FAILED)
            if is_free:
                scan.label_state = WORKING
            return is_free

    def carry_to(self, number: int) -> None:
        """Carry labels to a scan; a failure is noted in it."""
        scan, volume = self.scans[number], self.scans[number].volume
        try:
            with self._carrying:  # one scan at a time: it takes all cores, and memory
                carried = carry_labels(
                    scan.embedding,
                    self._all_references(),
                    volume.shape,
                    volume.affine,
                    hu=volume.array,
                    opinion=self._opinion(volume),
                )
            scan.labels = self.classes.to_classes(carried.labels)
            scan.label_state = READY
        except (ValueError, RuntimeError, MemoryError) as error:
            scan.error, scan.label_state = str(error) or type(error).__name__, FAILED

    def _all_references(self) -> list[Reference]:
        """The references from elsewhere, and the scans with labels of their own."""
        return self._references + [
            Reference(scan.embedding, self.classes.to_values(scan.labels), scan.volume.affine)
            for scan in self._labelled()
        ]

    def _can_carry(self, number: int) -> bool:
        """Whether a scan has no labels of its own, and all that labels would be carried from is embedded."""
        labelled, scan = self._labelled(), self.scans[number]
        are_ready = all(other.state == READY for other in (*labelled, scan))
        return scan.label_state != GIVEN and are_ready and bool(labelled or self._references)

    def _labelled(self) -> list[Scan]:
        return [scan for scan in self.scans if scan.label_state == GIVEN]

    def _scan(self, number: int) -> Scan:
        if not 0 <= number < len(self.scans):
            raise IndexError(f"no scan {number}: there are {len(self.scans)}")
        return self.scans[number]

    def _embedding(self, number: int) -> Embedding:
        scan = self._scan(number)
        if scan.embedding is None:
            raise NotReadyError(f"{scan.name} is not embedded: {scan.error or scan.state}")
        return scan.embedding

    def _checked_point(self, number: int, point_mm: Sequence[float]) -> np.ndarray:
        embedding, point_mm = self._embedding(number), np.asarray(point_mm, dtype=np.float64)
        if not inside(embedding, point_mm[None])[0]:
            raise ValueError(f"this place is outside of the patient, who fills {describe_box(embedding)}")
        return point_mm


def _grid(shape: Sequence[int], affine: np.ndarray) -> dict:
    """A grid as plain values: its shape and affine, and the inverse affine."""
    return {"shape": list(shape), "affine": affine.tolist(), "inverse": np.linalg.inv(affine).tolist()}


def _cut(array: np.ndarray, plane: str, index: int) -> np.ndarray:
    if plane not in PLANES or not 0 <= index < array.shape[PLANES[plane].cut]:
        raise IndexError(f"no {plane} plane {index} in a volume of shape {array.shape}")
    return np.ascontiguousarray(cut_plane(array, plane, index))
