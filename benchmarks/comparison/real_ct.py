"""Frozen probes on one labelled real CT, as a check of direction: some axial planes teach, others judge.

    python -m benchmarks.comparison.real_ct --weights results/pretrain/mim/seed0/student.safetensors \\
        --ct_dir ../shared/ct --output real.json

One scan has no second patient to judge with, and neighbouring planes are nearly equal. So slabs of axial planes teach
and judge in turn, and between any two of them lies a gap as thick as a masked block of pretraining. Slabs are thinner
than gaps, so that most organs reach from a slab that teaches to one that judges; those that do not are background in
that fold. Four folds shift the slabs by a quarter of their period.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.labels_from_phantoms import read_truth
from benchmarks.real_ct_matching import ABDOMEN
from datasets.ct.geometry import resample
from datasets.ct.nifti import Volume, read_ct
from datasets.lists.label_classes import LabelClasses
from datasets.samples.probe_voxels import TISSUE_HU, CaseVoxels, choose_voxels
from datasets.store.files import write_text
from engine.features import FeatureExtractor, load_features
from engine.flags import DeviceOptions, RunInfo, add_options, make_parser, run_main
from engine.segmentation.metrics import nan_mean, score_case
from engine.watch.frozen_mlp import draw_taught, fit_mlp, maps_reader, segment_by_mlp
from engine.watch.probe import ProbeOptions, probe_encoder

NUM_FOLDS = 4
PATCH = 8  # planes of a gap: voxels of a masked block
SLAB = 3  # planes
LEAST_VOXELS = 10  # of an organ, in the part that teaches and in the part that judges
NUM_VOXELS = 200  # of each class, that teach or judge a probe
WINDOWS = {"overlap": 0.25, "window_batch": 8}


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=str, required=True, help="extracted weights")
    parser.add_argument("--ct_dir", type=str, required=True, help=f"folder of {ABDOMEN}.nii.gz and its label")
    parser.add_argument("--output", type=str, required=True, help="JSON file")
    add_options(parser, DeviceOptions)
    return parser


@dataclass(frozen=True)
class Fold:
    """One fold, as `engine.watch.probe.probe_encoder` reads it.

    Attributes:
        hu: int16 [D, H, W].
        channels: [D, H, W], the class of every voxel.
        classes: those that lie in both parts.
        teaches, judges: bool [D], the planes of both parts.
        taught, judged: the chosen voxels of each.
    """

    hu: np.ndarray
    channels: np.ndarray
    classes: LabelClasses
    teaches: np.ndarray
    judges: np.ndarray
    taught: list[CaseVoxels]
    judged: list[CaseVoxels]

    def read_hu(self, name: str) -> np.ndarray:
        """The scan; there is one only."""
        return self.hu


def slab_parts(num_planes: int, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Planes that teach and planes that judge, bool [num_planes] each; a gap lies between any two slabs."""
    half = SLAB + PATCH
    place = (np.arange(num_planes) + fold * 2 * half // NUM_FOLDS) % (2 * half)
    return place < SLAB, (place >= half) & (place < half + SLAB)


def make_fold(hu: np.ndarray, labels: np.ndarray, known: LabelClasses, fold: int) -> Fold:
    """Choose classes and voxels of one fold.

    Args:
        hu, labels: [D, H, W].
        known: what the labels mean.
    """
    teaches, judges = slab_parts(len(hu), fold)
    parts = [
        np.bincount(known.to_classes(labels[planes]).ravel(), minlength=len(known)) for planes in (teaches, judges)
    ]
    shared = [
        number for number in range(len(known)) if number == 0 or min(part[number] for part in parts) >= LEAST_VOXELS
    ]
    classes = LabelClasses(*(tuple(values[number] for number in shared) for values in (known.values, known.names)))
    channels = classes.to_classes(labels)
    is_candidate, rng = (hu > TISSUE_HU) | (channels > 0), np.random.default_rng(fold)
    sides = []
    for planes in (teaches, judges):
        chosen = choose_voxels(channels, is_candidate & planes[:, None, None], len(classes), NUM_VOXELS, rng)
        sides.append([CaseVoxels(ABDOMEN, *chosen)])
    return Fold(hu, channels, classes, teaches, judges, *sides)


def probe_fold(extractor: FeatureExtractor, fold: Fold, spacing_mm: tuple[float, float, float]) -> dict:
    """Balanced accuracy of k-NN and linear probe, and the frozen MLP's mean Dice over organs, in the judged planes."""
    known = extractor.preprocessing
    options = ProbeOptions(known.roi, known.hu_min, known.hu_max, **WINDOWS, precision=extractor.windows.precision)
    found = probe_encoder(extractor.backbone.encode, fold, options, extractor.device)
    maps = maps_reader(extractor.backbone, options, extractor.device)(fold.hu)
    may_teach = np.broadcast_to(fold.teaches[:, None, None], fold.hu.shape)
    drawn = draw_taught(maps, fold.channels, np.random.default_rng(0), may_teach)
    predicted = segment_by_mlp(fit_mlp(drawn, len(fold.classes)), maps, fold.hu.shape)
    judged = (volume[fold.judges] for volume in (predicted, fold.channels))
    scores = score_case(ABDOMEN, *judged, spacing_mm, fold.classes.names, tolerance_mm=0.0)
    accuracies = {probe: scored["balanced_accuracy"] for probe, scored in found.items()}
    return accuracies | {"mlp": nan_mean([score.dice for score in scores]), "organs": list(fold.classes.names[1:])}


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    scan, truth = read_ct(Path(flags.ct_dir) / f"{ABDOMEN}.nii.gz"), read_truth(Path(flags.ct_dir))
    extractor = load_features(flags.weights, flags.device, flags.precision, **WINDOWS)
    volume = extractor.preprocessing.on_own_grid(scan)
    labels = on_same_grid(truth, volume)
    known = LabelClasses.built_in("flare22")
    folds = [make_fold(volume.array, labels, known, fold) for fold in range(NUM_FOLDS)]
    found = {"folds": [probe_fold(extractor, fold, volume.spacing_mm) for fold in folds]}
    write_text(Path(flags.output), json.dumps(found, indent=1) + "\n")
    RunInfo.collect(flags).write_beside(flags.output)
    print(json.dumps(found, indent=1))


def on_same_grid(truth: Volume, volume: Volume) -> np.ndarray:
    """Labels, which have the scan's own grid, at the voxel size that the scan was brought to."""
    return resample(truth.array, truth.affine, volume.spacing_mm, order=0)[0]


if __name__ == "__main__":
    run_main(main)
