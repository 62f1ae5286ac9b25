"""Matches whose truth is known: landmarks, and mined pairs of phantoms, with the error of each and what it belongs to.

Landmarks are few, distinct places; training crops around mined pairs, which lie anywhere in the body and often in a
part of it that the other scan does not show. Trust in pairs is therefore judged on mined ones where that is possible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from datasets.phantom.structures import region_of_landmark, regions_at, structure_of_landmark, structures_at
from datasets.phantom.truth import PhantomTruth
from sam_embed.judging.evaluate import PairErrors


@dataclass(frozen=True)
class Judged:
    """N matches with known truth; those without a match are left out.

    Attributes:
        query, key: text [N], case names.
        score: [N], similarity in [-1, 1].
        cycle_mm, spread_mm: [N], mm; NaN where it was not measured.
        error_mm: [N], distance to the true place, mm.
        structure, region: text [N], what the query point belongs to.
        is_possible: bool [N], False where the true place lies beyond the key's scan, so that no match can be right.
    """

    query: np.ndarray
    key: np.ndarray
    score: np.ndarray
    cycle_mm: np.ndarray
    spread_mm: np.ndarray
    error_mm: np.ndarray
    structure: np.ndarray
    region: np.ndarray
    is_possible: np.ndarray

    def __len__(self) -> int:
        return len(self.error_mm)

    def chosen(self, mask: np.ndarray) -> "Judged":
        """Those where the mask [N] is True."""
        return Judged(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def judge_landmarks(results: Sequence[PairErrors]) -> Judged:
    """The matched landmarks of all pairs of cases; a landmark that both cases share can always be found."""
    names = [name for result in results for name in result.landmarks]
    lengths = [len(result.landmarks) for result in results]
    error_mm = np.concatenate([result.error_mm["sam"] for result in results])
    judged = Judged(
        query=np.repeat([result.query for result in results], lengths),
        key=np.repeat([result.key for result in results], lengths),
        score=np.concatenate([result.score for result in results]),
        cycle_mm=np.concatenate([result.cycle_mm for result in results]),
        spread_mm=np.full(len(error_mm), np.nan),
        error_mm=error_mm,
        structure=np.array([structure_of_landmark(name) for name in names]),
        region=np.array([region_of_landmark(name) for name in names]),
        is_possible=np.ones(len(names), dtype=bool),
    )
    return judged.chosen(np.isfinite(error_mm))


def judge_rows(
    rows: np.ndarray, case_names: Sequence[str], truth: Mapping[str, PhantomTruth], show_progress: bool = True
) -> Judged:
    """The pairs of a correspondence table of phantoms, each against the true place of its query point.

    Args:
        rows: `ROW_DTYPE` rows; of large tables a sample will do.
        case_names: what their case numbers stand for.
        truth: of `datasets.phantom.truth.load_truth`, for all cases that occur.
        show_progress: a progress bar.
    """
    names = np.array(case_names)
    error_mm, is_possible = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    structure, region = np.zeros(len(rows), dtype="U40"), np.zeros(len(rows), dtype="U12")
    queries = np.unique(rows["query_case"])
    for query in tqdm(queries, desc="judging pairs", unit="case", disable=not show_progress):
        patient = truth[case_names[query]]
        of_query = np.flatnonzero(rows["query_case"] == query)
        points_mm, number = np.unique(rows["query_mm"][of_query], axis=0, return_inverse=True)
        number = number.ravel()
        atlas_mm = patient.to_atlas(points_mm.astype(np.float64))
        structure[of_query] = structures_at(patient.patient, atlas_mm)[number]
        region[of_query] = regions_at(atlas_mm)[number]
        for key in np.unique(rows["key_case"][of_query]):
            of_key = rows["key_case"][of_query] == key
            chosen, true_mm = of_query[of_key], truth[case_names[key]].from_atlas(atlas_mm[number[of_key]])
            error_mm[chosen] = np.linalg.norm(rows["key_mm"][chosen] - true_mm, axis=1)
            is_possible[chosen] = truth[case_names[key]].is_scanned(true_mm)
    measured = (rows[name].astype(np.float64) for name in ("score", "cycle_mm", "spread_mm"))
    cases = names[rows["query_case"]], names[rows["key_case"]]
    return Judged(*cases, *measured, error_mm, structure, region, is_possible)
