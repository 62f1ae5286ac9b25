"""MR-like files of a few kilobytes for tests: organs in a body, at an arbitrary scale."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.labelled_corpus import NAMES, SPACING_MM, labelled_volume

# Signals of the background of the body and of three organs, as T1 and T2 weighting show them.
SIGNALS = ({0: 0.35, 1: 0.55, 2: 0.45, 5: 0.15}, {0: 0.3, 1: 0.2, 2: 0.8, 5: 0.6})
AFFINE = np.diag([*SPACING_MM, 1.0])


def mr_volume(seed: int, num_channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """float32 intensities [X, Y, Z] (or [X, Y, Z, C]) and uint8 labels [X, Y, Z]; every channel has its own scale."""
    hu, label = labelled_volume(seed)
    rng = np.random.default_rng([seed, 1])
    channels = []
    for signals in SIGNALS[:num_channels]:
        signal = np.where(hu > -500, np.vectorize(signals.get)(label), 0.0)
        signal = np.hypot(signal + rng.normal(0, 0.02, signal.shape), rng.normal(0, 0.02, signal.shape))
        channels.append(signal * rng.uniform(300, 20000))
    array = np.stack(channels, axis=-1).astype(np.float32)
    return (array[..., 0] if num_channels == 1 else array), label


def make_mr_corpus(folder: Path, num_training: int = 2, num_validation: int = 1, num_channels: int = 1) -> Path:
    """images/, labels/ and list.json of cases named mr0, mr1, ..."""
    entries = []
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(num_training + num_validation):
        array, label = mr_volume(number, num_channels)
        entry = {"image": f"images/mr{number}.nii.gz", "label": f"labels/mr{number}.nii.gz", "name": f"mr{number}"}
        nib.save(nib.Nifti1Image(array, AFFINE), folder / entry["image"])
        nib.save(nib.Nifti1Image(label, AFFINE), folder / entry["label"])
        entries.append(entry)
    content = {"modality": {"0": "MRI"}, "labels": NAMES}
    content |= {"training": entries[:num_training], "validation": entries[num_training:]}
    (folder / "list.json").write_text(json.dumps(content))
    return folder
