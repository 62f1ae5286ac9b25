"""How far matches lie from known landmarks, beside what is reached without learning.

A landmark's place in one case is matched to every other case that shares it; the error is the distance in mm to its
true place there. Landmark files are `<case>.json` with {"landmarks_mm": {name: [x, y, z]}} in world mm.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.judging.baselines import Body, match_by_affine, match_by_box
from sam_embed.matching.match import cycle_error_mm, match_points

CLOSE_MM, CORRECT_MM, FAR_MM = 10.0, 15.0, 30.0
CYCLE_LIMITS_MM = (5.0, 10.0, 20.0)

Landmarks = dict[str, np.ndarray]


@dataclass(frozen=True)
class PairErrors:
    """Errors of one ordered pair of cases; arrays follow `landmarks`.

    Attributes:
        query, key: case names.
        landmarks: the names that both cases share.
        query_mm, key_mm: float64 [N, 3], their true places in both cases.
        match_mm: float64 [N, 3], where the embedding puts them in the key; NaN where it has no match.
        score, cycle_mm: [N].
        error_mm: method ("sam", "body_box", "body_affine") -> float64 [N].
    """

    query: str
    key: str
    landmarks: list[str]
    query_mm: np.ndarray
    key_mm: np.ndarray
    match_mm: np.ndarray
    score: np.ndarray
    cycle_mm: np.ndarray
    error_mm: dict[str, np.ndarray]


def load_landmarks(landmark_dir: str | Path, names: Sequence[str]) -> dict[str, Landmarks]:
    """Landmarks of those cases that have a file: case -> landmark -> world mm [3].

    Raises:
        ValueError: fewer than two cases have a file, or a file is not what it should be.
    """
    found = {}
    for name in names:
        path = Path(landmark_dir) / f"{name}.json"
        if not path.is_file():
            continue
        try:
            places = json.loads(path.read_text())["landmarks_mm"]
            found[name] = {landmark: np.array(place, dtype=np.float64).reshape(3) for landmark, place in places.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected {{'landmarks_mm': {{name: [x, y, z]}}}} in world mm ({error})"
            ) from error
    if len(found) < 2:
        raise ValueError(f"{landmark_dir}: {len(found)} of {len(names)} cases have landmarks, expected at least 2")
    return found


def evaluate_pairs(
    embedding_of: Callable[[str], Embedding],
    landmarks: Mapping[str, Landmarks],
    bodies: Mapping[str, Body] | None = None,
    show_progress: bool = True,
) -> list[PairErrors]:
    """Match the shared landmarks of every ordered pair of cases.

    Args:
        embedding_of: case name -> its embedding (an `EmbeddingCache`'s `__getitem__`).
        landmarks: of `load_landmarks`.
        bodies: outlines of the same cases for the two baselines; None leaves the baselines out.
        show_progress: a progress bar.
    """
    pairs = [(one, other) for one, other in itertools.permutations(sorted(landmarks), 2)]
    results = []
    for query, key in tqdm(pairs, desc="landmarks", unit="pair", disable=not show_progress):
        if set(landmarks[query]) & set(landmarks[key]):
            results.append(_evaluate_pair(embedding_of(query), embedding_of(key), landmarks, bodies))
    if not results:
        raise ValueError("no two cases share a landmark; check that --landmark_dir belongs to these cases")
    return results


def _evaluate_pair(
    query: Embedding, key: Embedding, landmarks: Mapping[str, Landmarks], bodies: Mapping[str, Body] | None
) -> PairErrors:
    shared = sorted(set(landmarks[query.name]) & set(landmarks[key.name]))
    query_mm, key_mm = (np.stack([landmarks[case.name][name] for name in shared]) for case in (query, key))
    matches = match_points(query, key, query_mm)
    placed = {"sam": matches.points_mm}
    if bodies is not None:
        placed["body_box"] = match_by_box(bodies[query.name], bodies[key.name], query_mm)
        placed["body_affine"] = match_by_affine(bodies[query.name], bodies[key.name], query_mm)
    return PairErrors(
        query=query.name,
        key=key.name,
        landmarks=shared,
        query_mm=query_mm,
        key_mm=key_mm,
        match_mm=matches.points_mm,
        score=matches.score,
        cycle_mm=cycle_error_mm(query, key, query_mm, matches),
        error_mm={method: np.linalg.norm(place - key_mm, axis=1) for method, place in placed.items()},
    )


def summarise(results: Sequence[PairErrors]) -> dict:
    """Figures over all matches of all pairs, plain values fit for JSON.

    Returns:
        `num_cases`, `num_pairs`, `num_matches`, `num_unmatched` (landmarks outside of the embedded body); under each
        method `error_figures`; under `cycle` the same for the matches whose cycle error stays below a limit.
    """
    errors = {method: np.concatenate([result.error_mm[method] for result in results]) for method in results[0].error_mm}
    cycle = np.concatenate([result.cycle_mm for result in results])
    score = np.concatenate([result.score for result in results])
    unmatched = np.isnan(errors["sam"])
    limits = {f"below_{limit:g}mm": cycle < limit for limit in CYCLE_LIMITS_MM}
    return {
        "num_cases": len({result.query for result in results} | {result.key for result in results}),
        "num_pairs": len(results),
        "num_matches": len(unmatched),
        "num_unmatched": int(unmatched.sum()),
        **{method: error_figures(values[~unmatched]) for method, values in errors.items()},
        "mean_score": float(np.nanmean(score)),
        "median_cycle_mm": float(np.nanmedian(cycle)),
        "cycle": {
            name: {"share": float(chosen.mean()), **error_figures(errors["sam"][chosen])}
            for name, chosen in limits.items()
        },
    }


def error_figures(error_mm: np.ndarray) -> dict:
    """`num_matches`, and of the errors [N] `median_mm`, `mean_mm`, `p90_mm`, `share_within_10mm`, `share_within_15mm`
    and `share_beyond_30mm`; only the number where it is 0.
    """
    if not len(error_mm):
        return {"num_matches": 0}
    shares = {f"share_within_{limit:g}mm": float((error_mm <= limit).mean()) for limit in (CLOSE_MM, CORRECT_MM)}
    return {
        "num_matches": len(error_mm),
        "median_mm": float(np.median(error_mm)),
        "mean_mm": float(error_mm.mean()),
        "p90_mm": float(np.percentile(error_mm, 90)),
        **shares,
        f"share_beyond_{FAR_MM:g}mm": float((error_mm > FAR_MM).mean()),
    }


def errors_by_landmark(results: Sequence[PairErrors]) -> dict[str, dict]:
    """The embedding's figures per landmark, worst median first."""
    by_name: dict[str, list[float]] = {}
    for result in results:
        for name, error in zip(result.landmarks, result.error_mm["sam"]):
            if np.isfinite(error):
                by_name.setdefault(name, []).append(float(error))
    figures = {name: error_figures(np.array(values)) for name, values in by_name.items()}
    return dict(sorted(figures.items(), key=lambda item: -item[1]["median_mm"]))
