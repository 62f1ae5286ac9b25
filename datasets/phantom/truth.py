"""Phantom CT, the truth about any point: where it lies in another patient, and what it is part of.

A phantom's landmark file states the seed its patient was drawn from. The patient is drawn again, and its deformation
gives the atlas place of every point, the inverse of another patient's the true place there (Newton, to 1e-6 mm).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.phantom.cases import GENERATOR, PhantomCase
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.patient import Patient
from datasets.phantom.scan import Scan
from datasets.phantom.variants import Shares

MAX_DRIFT_MM = 0.1  # landmark files are rounded to 0.001 mm


@dataclass(frozen=True)
class PhantomTruth:
    """One phantom case drawn again: the patient and the scan."""

    name: str
    patient: Patient
    scan: Scan

    def to_atlas(self, points_mm: np.ndarray) -> np.ndarray:
        """Atlas mm [N, 3] of world points [N, 3] of this case."""
        return self.scan.to_atlas(self.patient, points_mm)

    def from_atlas(self, atlas_mm: np.ndarray) -> np.ndarray:
        """World mm [N, 3] in this case of atlas points [N, 3]."""
        return self.scan.from_atlas(self.patient, atlas_mm)

    def is_scanned(self, points_mm: np.ndarray) -> np.ndarray:
        """bool [N]: which world points [N, 3] lie within the scan's outermost voxels."""
        return self.scan.is_scanned(points_mm, margin_vox=0.5)


def load_truth(landmark_dir: str | Path, names: Sequence[str]) -> dict[str, PhantomTruth]:
    """The patients behind some phantom cases, drawn again from the seeds in `<landmark_dir>/<case>.json`.

    Raises:
        ValueError: a file is missing or states no seed, or today's generator draws another patient from it.
    """
    return {name: _draw_again(Path(landmark_dir) / f"{name}.json", name) for name in names}


def states_seeds(landmark_dir: str | Path, names: Sequence[str]) -> bool:
    """Whether the landmark files of all these cases say what phantom they belong to."""
    return all("seed" in _record(Path(landmark_dir) / f"{name}.json") for name in names)


def _record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a landmark file ({error}); see --landmark_dir") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(record).__name__}; see --landmark_dir")
    return record


def _draw_again(path: Path, name: str) -> PhantomTruth:
    """Draw the patient, and compare its landmarks with the file's."""
    record = _record(path)
    if "seed" not in record or "landmarks_mm" not in record:
        raise ValueError(
            f"{path}: states no seed, so the truth between landmarks is unknown; it needs files by "
            "scripts/make_phantom_dataset.py (--landmark_dir)"
        )
    if record.get("generator") != GENERATOR:
        raise ValueError(
            f"{path}: a phantom of generator {record.get('generator', 1)}, but this is generator {GENERATOR}; make it "
            "again (scripts/make_phantom_dataset.py)"
        )
    seed, labelled, index = record["seed"]
    case = PhantomCase(
        name, seed, index, bool(labelled), record["full_size"], record["scan_range"], shares=Shares(**record["shares"])
    )
    patient, scan, _ = case.sample()
    atlas = atlas_landmarks(patient.anatomy)
    known = [landmark for landmark in record["landmarks_mm"] if landmark in atlas]
    stated = np.array([record["landmarks_mm"][landmark] for landmark in known], dtype=float).reshape(-1, 3)
    drawn = scan.from_atlas(patient, np.array([atlas[landmark] for landmark in known]).reshape(-1, 3))
    drift_mm = float(np.abs(drawn - stated).max(initial=0.0))
    if not known or drift_mm > MAX_DRIFT_MM:
        raise ValueError(
            f"{path}: its landmarks lie up to {drift_mm:.1f} mm from those that seed {record['seed']} gives now, so "
            "the phantom is of another version; make it again (scripts/make_phantom_dataset.py)"
        )
    return PhantomTruth(name, patient, scan)
