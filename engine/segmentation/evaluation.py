"""Evaluation of a segmentation network: cases in, scores and pictures out, shared among ranks.

A case brings a volume on the network's grid and the truth on the file's own grid. The network slides over the first,
its probabilities are brought to the second, and Dice and NSD are taken there, in the file's own spacing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.ct.file_grid import read_file_grid
from datasets.ct.images import CT, RADIOGRAPH, kind_of, write_labels_like
from datasets.ct.nifti import Volume, check_same_grid, read_ct, read_label
from datasets.ct.radiograph import SUFFIX, read_mask_of, read_radiograph
from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.lists.label_classes import LabelClasses
from datasets.store.format import check_kind
from datasets.store.volumes import VolumeStore
from engine.distributed import World, gather_objects
from engine.loop import evaluating
from engine.segmentation.memory import Scan
from engine.segmentation.metrics import (
    OrganScore,
    Tolerances,
    case_means,
    nan_mean,
    published_slice_dice,
    score_case,
)
from engine.segmentation.pictures import SHOWN_HU, CaseView, case_view, save_overlay
from engine.segmentation.report import PLAIN, SLICE_DICE, write_report
from engine.segmentation.segmenter import Segmenter
from engine.signals import StopRequest

OVERLAY = "worst_and_best.png"
EVALUATION = "evaluation"  # folder of a finetuning run's judgement of its best network


@dataclass(frozen=True)
class EvaluationCase:
    """One case, canonical axes throughout.

    Attributes:
        volume: HU on the network's grid, a radiograph's stored grey, or mapped MR with its channels.
        truth: channels on the grid that is judged.
        truth_hu: the first channel on the truth's grid, int16, for pictures; None = no picture.
        scan: the CT as the memory sees it; None = no memory.
    """

    volume: Volume
    truth: Volume
    truth_hu: np.ndarray | None = None
    scan: Scan | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases in the order of their names, and pictures' planes by case.

    Attributes:
        slice_dice: `published_slice_dice` of all slices of all cases; empty for 3-D networks.
        plain_scores: of the network without its memory; empty where it has none.
    """

    scores: list[OrganScore]
    views: dict[str, CaseView]
    slice_dice: list[float] = field(default_factory=list)
    plain_scores: list[OrganScore] = field(default_factory=list)

    @property
    def dice(self) -> float:
        """Mean over cases of the mean over organs; NaN where nothing counts."""
        return nan_mean(list(case_means(self.scores).values()))

    def means(self) -> dict[str, float]:
        """ "dice"; without the memory where there is one; for 2-D networks the published slice-wise number."""
        plain = list(case_means(self.plain_scores).values())
        return (
            {"dice": self.dice}
            | ({PLAIN["dice"]: nan_mean(plain)} if plain else {})
            | ({SLICE_DICE: nan_mean(self.slice_dice)} if self.slice_dice else {})
        )

    def worst_and_best(self) -> list[tuple[str, CaseView]]:
        """(title, view) of the case with the lowest and of that with the highest mean Dice that can be shown."""
        means = {c: dice for c, dice in case_means(self.scores).items() if c in self.views and not np.isnan(dice)}
        if not means:
            return []
        order = sorted(means, key=means.get)
        chosen = {"worst": order[0], "best": order[-1]} if len(order) > 1 else {"only": order[0]}
        return [(f"{rank}: {case}, Dice {100 * means[case]:.1f} %", self.views[case]) for rank, case in chosen.items()]

    def write(self, folder: str | Path, class_names: tuple[str, ...], description: dict) -> None:
        """Write cases.csv, results.md, results.json and the overlay picture. On rank 0 only."""
        write_report(folder, self.scores, description, self.slice_dice, self.plain_scores)
        views = self.worst_and_best()
        if views:
            save_overlay(Path(folder) / OVERLAY, views, class_names)


def evaluate(
    segmenter: Segmenter,
    load_case: Callable[[str], EvaluationCase],
    case_names: list[str],
    world: World,
    tolerance_mm: Tolerances = 0.0,
    predictions_dir: Path | None = None,
    progress: bool = False,
    stop: StopRequest | None = None,
) -> Evaluation | None:
    """Judge a network, with its memory and without; every rank takes every W-th case, and gets all scores.

    Args:
        segmenter: its network is in evaluation mode inside, and as before outside.
        load_case: name -> case.
        tolerance_mm: of NSD, of all organs or of each; 0 leaves it out.
        predictions_dir: where to write label maps `<case>.nii.gz` or masks `<case>.png` on the label files' own grids;
            None = nowhere.
        progress: show a bar on rank 0.
        stop: looked at before each case.

    Returns:
        None on every rank where `stop` was requested on one of them.
    """
    scores: list[OrganScore] = []
    plain_scores: list[OrganScore] = []
    views: dict[str, CaseView] = {}
    slices: dict[str, list[float]] = {}
    classes, mine = segmenter.classes, case_names[world.rank :: world.size]
    with evaluating(segmenter.network):
        for name in tqdm(mine, desc="evaluation", unit="case", disable=not (progress and world.is_main)):
            if stop is not None and stop.requested:
                break
            case = load_case(name)
            truth, spacing_mm = case.truth.array, case.truth.spacing_mm
            if case.scan is None:
                predicted = segmenter.segment(case.volume, case.truth)
            else:
                prior = segmenter.recall.prior(case.scan)
                predicted, plain = segmenter.segment(case.volume, case.truth, prior, keep_plain=True)
                plain_scores += score_case(name, plain, truth, spacing_mm, classes.names, tolerance_mm)
            scores += score_case(name, predicted, truth, spacing_mm, classes.names, tolerance_mm)
            if segmenter.is_2d:
                slices[name] = published_slice_dice(predicted, truth, len(classes))
            if case.truth_hu is not None:
                views[name] = case_view(case.truth_hu, truth, predicted, spacing_mm, shown_window(case, segmenter))
            if predictions_dir is not None:
                suffix = SUFFIX if kind_of(case.truth.path) == RADIOGRAPH else ".nii.gz"
                path = predictions_dir / f"{name}{suffix}"
                write_labels_like(path, classes.to_values(predicted), case.truth.path)
    gathered = gather_objects(((scores, plain_scores), views, slices, stop is not None and stop.requested))
    if any(is_stopped for *_, is_stopped in gathered):
        return None
    order = {name: number for number, name in enumerate(case_names)}
    with_memory, plain = (
        sorted((score for both, *_ in gathered for score in both[at]), key=lambda score: order[score.case])
        for at in (0, 1)
    )
    views, slices = ({name: value for part in gathered for name, value in part[at].items()} for at in (1, 2))
    return Evaluation(with_memory, views, [value for name in case_names for value in slices.get(name, [])], plain)


def shown_window(case: EvaluationCase, segmenter: Segmenter) -> tuple[float, float]:
    """What pictures show black and white: soft tissue of a CT, all of a radiograph or an MR."""
    return SHOWN_HU if segmenter.preprocessing.images == CT else (case.truth_hu.min(), case.truth_hu.max())


def check_pixel_sizes(cases: list[Case], tolerance_mm: Tolerances) -> None:
    """Raise ValueError where NSD is wanted of radiographs whose files do not say how large a pixel is."""
    pictures = [case.image for case in cases if kind_of(case.image) == RADIOGRAPH] if tolerance_mm else []
    unscaled = next((path for path in pictures if not read_radiograph(path).is_scaled), None)
    if unscaled is not None:
        flag = "--flare22_nsd" if isinstance(tolerance_mm, Mapping) else f"--nsd_mm {tolerance_mm:g}"
        raise ValueError(
            f"{flag}: {unscaled} does not say how large its pixels are, so there is no distance in "
            "mm. Leave NSD out with --nsd_mm 0, or write the size into the files (PNG chunk pHYs)"
        )


def file_cases(
    cases: list[Case], segmenter: Segmenter, store: VolumeStore | None, with_pictures: bool = True
) -> Callable[[str], EvaluationCase]:
    """`load_case` of `evaluate` on the voxels of the label files.

    Args:
        store: at the network's spacing: volumes of CT and MR come from it where it has them.

    Raises:
        ValueError: images or a store of another kind than the network's.
    """
    if store is not None:
        check_kind(store.store_dir, segmenter.preprocessing.images, segmenter.preprocessing.mr_percentiles)
    by_name = {case.name: case for case in cases}
    for case in cases:
        segmenter.check_image(case.image)

    def load(name: str) -> EvaluationCase:
        case, in_store = by_name[name], store is not None and name in store
        if segmenter.preprocessing.images == RADIOGRAPH:
            picture = read_radiograph(case.image)
            truth = as_channels(read_mask_of(picture, case.label), segmenter.classes)
            return EvaluationCase(segmenter.on_own_grid(picture), truth, picture.array if with_pictures else None)
        label = read_label(case.label)
        has_file = case.image.exists()  # else the store stands alone
        is_recalled = segmenter.recall is not None
        is_read = with_pictures or not in_store or (is_recalled and has_file)
        image = segmenter.preprocessing.read(case.source) if is_read else None
        if has_file:
            check_same_grid(label, *read_file_grid(case.image).canonical(), case.image)
        volume = store.read(name) if in_store else segmenter.on_own_grid(image)
        scan = segmenter.recall.scan(image or volume, name) if is_recalled else None
        truth_hu = image.array.reshape(-1, *image.shape)[0] if with_pictures else None
        return EvaluationCase(volume, as_channels(label, segmenter.classes), truth_hu, scan)

    return load


def stored_cases(
    store: VolumeStore, classes: LabelClasses, scan_of: Callable[[str], Scan | None] = lambda name: None
) -> Callable[[str], EvaluationCase]:
    """`load_case` of `evaluate` on the volume store's own grid: quick, for validation during training.

    Args:
        scan_of: case -> what the memory looks at; None = no memory.
    """

    def load(name: str) -> EvaluationCase:
        truth = as_channels(store.read_label(name), classes)
        return EvaluationCase(store.read(name), truth, scan=scan_of(name))

    return load


def ct_reader(cases: list[Case], store: VolumeStore) -> Callable[[str], Volume]:
    """Case name -> its CT as the file has it, or where there is no file any more, as the store has it."""
    by_name = {case.name: case for case in cases}
    return lambda name: read_ct(by_name[name].image) if by_name[name].image.exists() else store.read(name)


def label_of(case: Case, store: VolumeStore, classes: LabelClasses) -> Volume:
    """The channels of a case as the file has them, or where there is no file any more, as the store has them."""
    return as_channels(read_label(case.label) if case.label.exists() else store.read_label(case.name), classes)


def as_channels(label: Volume, classes: LabelClasses) -> Volume:
    """Label values -> channels."""
    return dataclasses.replace(label, array=classes.to_classes(label.array))


def labelled_cases(json_list: str, data_dir: str, section: str) -> list[Case]:
    """The cases of a section that have labels.

    Raises:
        DataListError: there are none.
    """
    cases = [case for case in load_data_list(json_list, data_dir, section) if case.label is not None]
    if not cases:
        raise DataListError(f"{json_list}: no case of {section!r} has a label (--section)")
    return cases
