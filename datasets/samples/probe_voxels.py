"""Which voxels frozen features are probed at: as many of every organ and of other tissue, from every labelled case.

The voxels of some cases teach a probe, those of other cases, which it never saw, judge it (`engine.watch.probe`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.lists.label_classes import LabelClasses
from datasets.lists.splits import choose_labelled, split_held_out
from datasets.store.volumes import VolumeStore

TISSUE_HU = -500  # background voxels below are air and lung, which any network distinguishes from organs


@dataclass(frozen=True)
class CaseVoxels:
    """Chosen voxels of one case: `voxels` int64 [n, 3], indices (d, h, w) of the store; `channels` int64 [n]."""

    name: str
    voxels: np.ndarray
    channels: np.ndarray


@dataclass(frozen=True)
class ProbeVoxels:
    """The voxels that teach a probe and those that judge it, and the store that their volumes are read from."""

    store: VolumeStore
    classes: LabelClasses
    taught: list[CaseVoxels]
    judged: list[CaseVoxels]

    def read_hu(self, name: str) -> np.ndarray:
        """The volume of a case, int16 HU [D, H, W]."""
        return self.store.read(name).array

    def read_channels(self, name: str) -> np.ndarray:
        """The classes of a case's voxels, uint8 [D, H, W]."""
        return self.classes.to_classes(self.store.read_label(name).array)


def split_probe_cases(
    json_list: str | Path,
    data_dir: str | Path,
    num_labelled: int = 0,
    fold: int = 0,
    held_out_share: float = 0.3,
    max_cases: int = 0,
) -> tuple[list[Case], list[Case]]:
    """Labelled cases to teach and to judge a probe: the list's two sections, or a split of the one that has labels.

    Args:
        num_labelled, fold: few-shot, as in finetuning (`datasets.lists.splits`); 0 takes all.
        held_out_share: of the labelled cases, where only one section has any.
        max_cases: at most so many on either side, the first of the fold; 0 = all.

    Raises:
        DataListError: an unreadable list, or fewer than two labelled cases.
    """
    sections = [
        [case for case in load_data_list(json_list, data_dir, section, must_exist=False) if case.label is not None]
        for section in ("training", "validation")
    ]
    taught, judged = sections
    if not taught or not judged:
        labelled = taught + judged
        if len(labelled) < 2:
            raise DataListError(
                f"{json_list}: {len(labelled)} of its cases have labels; a probe learns from one and is judged on "
                "another (name a labelled list with --probe_json_list or --json_list)"
            )
        taught, judged = split_held_out(labelled, held_out_share, fold)
    taught = choose_labelled(taught, num_labelled, fold)
    return tuple(
        choose_labelled(cases, min(max_cases, len(cases)), fold) if max_cases else cases for cases in (taught, judged)
    )


def choose_probe_voxels(
    store: VolumeStore,
    classes: LabelClasses,
    taught: Sequence[Case],
    judged: Sequence[Case],
    num_voxels: int,
    seed: int = 0,
) -> ProbeVoxels:
    """Draw the voxels of all cases that the store holds with labels.

    Args:
        num_voxels: per case and class; organs that have fewer give all.

    Raises:
        DataListError: one side has no case left, or no organ.
    """
    sides = []
    for cases, side in ((taught, "teach"), (judged, "judge")):
        names = [case.name for case in cases if case.name in store and store.record(case.name).has_label]
        drawn = [draw_voxels(store, name, classes, num_voxels, seed) for name in names]
        if not any(voxels.channels.any() for voxels in drawn):
            raise DataListError(
                f"{store.store_dir}: no case with organs to {side} a probe with, of {', '.join(c.name for c in cases)}"
            )
        sides.append(drawn)
    return ProbeVoxels(store, classes, *sides)


def draw_voxels(store: VolumeStore, name: str, classes: LabelClasses, num_voxels: int, seed: int) -> CaseVoxels:
    """Up to `num_voxels` of every class of one case; of the background only tissue in the body's box.

    They depend on the seed and the case's name alone.
    """
    record = store.record(name)
    label = classes.to_classes(store.read_label(name).array)
    box = tuple(slice(int(start), int(stop)) for start, stop in zip(record.body_start, record.body_stop))
    is_candidate = np.zeros(label.shape, dtype=bool)
    is_candidate[box] = store.read(name).array[box] > TISSUE_HU
    is_candidate |= label > 0
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return CaseVoxels(name, *choose_voxels(label, is_candidate, len(classes), num_voxels, rng))


def choose_voxels(
    channels: np.ndarray, is_candidate: np.ndarray, num_classes: int, num_voxels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `num_voxels` of every class among the candidates.

    Args:
        channels, is_candidate: class and bool of every voxel [D, H, W].

    Returns:
        Indices (d, h, w) int64 [n, 3] and classes int64 [n].
    """
    candidates = np.flatnonzero(is_candidate)
    present = channels.ravel()[candidates]
    chosen = []
    for channel in range(num_classes):
        own = candidates[present == channel]
        chosen.append(own if len(own) <= num_voxels else np.sort(rng.choice(own, num_voxels, replace=False)))
    voxels = np.stack(np.unravel_index(np.concatenate(chosen), channels.shape), axis=1).astype(np.int64)
    return voxels, np.repeat(np.arange(num_classes), [len(own) for own in chosen])
