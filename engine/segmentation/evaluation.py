"""Evaluation of a segmentation network: cases in, scores and pictures out, shared among ranks.

A case brings a volume on the network's grid and the truth on the file's own grid. The network slides over the first,
its probabilities are brought to the second, and Dice and NSD are taken there, in the file's own spacing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn
from tqdm import tqdm

from engine.distributed import World, gather_objects
from engine.loop import evaluating
from engine.segmentation.metrics import OrganScore, case_means, nan_mean, score_case
from engine.segmentation.pictures import CaseView, case_view
from engine.segmentation.sliding_window import WindowOptions, segment_volume


@dataclass(frozen=True)
class EvaluationCase:
    """One case, canonical axes throughout.

    Attributes:
        hu: int16 [D, H, W] on the network's grid, with `affine` (index -> world mm).
        truth: uint8 channels on the grid that is judged, with `truth_affine` and `truth_spacing_mm` (D, H, W).
        truth_hu: int16 HU on the truth's grid, for pictures; None = no picture.
    """

    name: str
    hu: np.ndarray
    affine: np.ndarray
    truth: np.ndarray
    truth_affine: np.ndarray
    truth_spacing_mm: tuple[float, float, float]
    truth_hu: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases in the order of their names, and pictures' planes by case."""

    scores: list[OrganScore]
    views: dict[str, CaseView]

    @property
    def dice(self) -> float:
        """Mean over cases of the mean over organs; NaN where nothing counts."""
        return nan_mean(list(case_means(self.scores).values()))

    def worst_and_best(self) -> list[tuple[str, CaseView]]:
        """(title, view) of the case with the lowest and of that with the highest mean Dice that can be shown."""
        means = {c: dice for c, dice in case_means(self.scores).items() if c in self.views and not np.isnan(dice)}
        if not means:
            return []
        order = sorted(means, key=means.get)
        chosen = {"worst": order[0], "best": order[-1]} if len(order) > 1 else {"only": order[0]}
        return [(f"{rank}: {case}, Dice {100 * means[case]:.1f} %", self.views[case]) for rank, case in chosen.items()]


def evaluate(
    network: nn.Module,
    load_case: Callable[[str], EvaluationCase],
    case_names: list[str],
    class_names: tuple[str, ...],
    options: WindowOptions,
    world: World,
    tolerance_mm: float = 0.0,
    on_prediction: Callable[[str, np.ndarray], None] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Judge a network; every rank takes every W-th case, and every rank gets all scores.

    Args:
        network: not wrapped; in evaluation mode inside, as before outside.
        load_case: name -> case.
        class_names: of the channels, background first.
        tolerance_mm: of NSD; 0 leaves it out.
        on_prediction: called with (case, uint8 channels on the truth's grid), for example to write it.
        progress: show a bar on rank 0.
    """
    scores: list[OrganScore] = []
    views: dict[str, CaseView] = {}
    mine: Iterable[str] = case_names[world.rank :: world.size]
    with evaluating(network):
        for name in tqdm(mine, desc="evaluation", unit="case", disable=not (progress and world.is_main)):
            case = load_case(name)
            predicted = segment_volume(
                network, case.hu, case.affine, case.truth.shape, case.truth_affine, options, world.device
            )
            scores += score_case(name, predicted, case.truth, case.truth_spacing_mm, class_names, tolerance_mm)
            if case.truth_hu is not None:
                views[name] = case_view(name, case.truth_hu, case.truth, predicted, case.truth_spacing_mm)
            if on_prediction is not None:
                on_prediction(name, predicted)
    gathered = gather_objects((scores, views))
    order = {name: number for number, name in enumerate(case_names)}
    joined = sorted((score for part, _ in gathered for score in part), key=lambda score: order[score.case])
    return Evaluation(joined, {name: view for _, part in gathered for name, view in part.items()})
