"""Phantom radiographs: chest and abdomen X-rays of phantom patients, with projected organ masks.

A patient is drawn as for a CT (`cases`), in pixels of 2 mm across and 3 mm deep. Along parallel rays from back to front
the linear attenuation of tissue is integrated, mu = mu_water (1 + HU / 1000) (the definition of HU; mu_water at about
70 keV: NIST XCOM). A detector counts quanta, N = Poisson(N0 exp(-integral)), and the picture is their logarithm with
emphasised detail, as radiographs are shown: bone is bright, air black. No scatter, no magnification.

A pixel of the mask belongs to the organ with the longest path along its ray, if that exceeds 5 mm. Organs are the 13 of
FLARE22 and the lungs.

    <out>/images/Xray_00001.png       unlabelled; 12-bit grey in 16 bits, or 8-bit grey
    <out>/images/Xray_Tr_0001.png     labelled
    <out>/labels/Xray_Tr_0001.png     its mask: label values
    <out>/dataset.json                all of them, and what the label values mean
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from datasets.ct.radiograph import write_grey
from datasets.lists.data_list import Case, write_data_list
from datasets.lists.label_classes import FLARE22
from datasets.phantom.cases import PhantomCase, RenderedCase, atlas_coordinates, render, write_cases
from datasets.phantom.patient import Patient
from datasets.phantom.scan import Scan
from datasets.phantom.shapes import Region
from datasets.phantom.trunk import lung_distance
from datasets.phantom.variants import Artefacts, Shares

MU_WATER_PER_MM = 0.0193
FIELDS = ("chest_upper_abdomen", "abdomen_pelvis")  # ranges of a scan that fill a chest and an abdomen film
PIXEL_MM, FULL_SIZE_PIXEL_MM, DEPTH_MM = 2.0, 1.0, 3.0
LEAST_PATH_MM = 5.0
LUNGS = len(FLARE22) + 1
LARGEST_LUNG_HU = -300.0  # vessels in the lung are denser
LABELS = ("background", *FLARE22, "lungs")
QUANTA = (1.0e5, 4.0e5)  # counted in a pixel without a patient
SHARE_8_BIT, DETECTOR_BITS = 0.3, 12
DETAIL_MM, KEPT_SHADE, DETAIL_GAIN, GAMMA = 20.0, 0.6, 1.8, 1.3
BODY_INTEGRAL = 0.3  # rays that lose less miss the patient
SHOWN_PERCENTILES = (0.5, 99.8)


@dataclass(frozen=True)
class RadiographCase(PhantomCase):
    """What defines a radiograph; the same values make the same files, byte for byte."""

    def sample(self) -> tuple[Patient, Scan, np.random.Generator]:
        """The patient and a scan without table, noise and artefacts, fine across and coarse along the rays."""
        patient, scan, rng = super().sample()
        pixel = (FULL_SIZE_PIXEL_MM if self.full_size else PIXEL_MM) * self.coarsen
        spacing = (pixel, DEPTH_MM * self.coarsen, pixel)
        shape = tuple(round(n * old / new) for n, old, new in zip(scan.shape, scan.spacing_mm, spacing))
        plain = {"noise_hu": 0.0, "table_mm": None, "circle": False, "artefacts": Artefacts(), "breathing": None}
        return patient, replace(scan, shape=shape, spacing_mm=spacing, **plain), rng


def list_radiographs(
    num_unlabelled: int, num_labelled: int, seed: int, full_size: bool = False, shares: Shares | None = None
) -> list[RadiographCase]:
    """The radiographs of a data set, chests and abdomens in turn; sets can be extended."""
    return [
        RadiographCase(name, seed, k, labelled, full_size, FIELDS[(k + 1) % len(FIELDS)], shares=shares or Shares())
        for labelled, num in ((False, num_unlabelled), (True, num_labelled))
        for k in range(1, num + 1)
        for name in [f"Xray_Tr_{k:04d}" if labelled else f"Xray_{k:05d}"]
    ]


def integrate_attenuation(hu: np.ndarray, depth_mm: float) -> np.ndarray:
    """Line integrals of the linear attenuation along the second axis.

    Args:
        hu: [X, Y, Z]; below -1000 counts as air.
        depth_mm: voxel size along Y.

    Returns:
        [X, Z], without unit.
    """
    return MU_WATER_PER_MM * depth_mm * np.clip(1 + hu / 1000, 0, None).sum(axis=1)


def project_labels(label: np.ndarray, depth_mm: float) -> np.ndarray:
    """The label with the longest path along the second axis of [X, Y, Z]: uint8 [X, Z], 0 where none exceeds 5 mm."""
    values = [value for value in np.unique(label).tolist() if value]
    paths_mm = np.stack([np.full(label[:, 0].shape, LEAST_PATH_MM)]
                        + [(label == value).sum(axis=1) * depth_mm for value in values])  # fmt: skip
    return np.array([0, *values], np.uint8)[paths_mm.argmax(axis=0)]


def detect(integral: np.ndarray, quanta: float, rng: np.random.Generator) -> np.ndarray:
    """Minus the logarithm of the share of `quanta` that arrives, with the noise of counting; a dead ray counts one."""
    counts = rng.poisson(quanta * np.exp(-integral))
    return -np.log(np.maximum(counts, 1) / quanta)


def develop(signal: np.ndarray, pixel_mm: float) -> np.ndarray:
    """A detector's logarithmic signal [X, Z] as a picture in [0, 1]: large shades are damped, detail is raised."""
    shade = gaussian_filter(signal, DETAIL_MM / pixel_mm)
    shown = KEPT_SHADE * shade + DETAIL_GAIN * (signal - shade)
    low, high = np.percentile(shown[signal > BODY_INTEGRAL], SHOWN_PERCENTILES)
    low = max(low, 0)  # what missed the patient is black
    return np.clip((shown - low) / (high - low), 0, 1) ** GAMMA


def to_picture(plane: np.ndarray) -> np.ndarray:
    """A plane [X, Z] of the world as a picture [H, W]: head on top, the patient's right on the left."""
    return plane[::-1, ::-1].T


def radiograph_of(case: RadiographCase) -> tuple[np.ndarray, np.ndarray]:
    """The picture, grey uint8 or uint16 [H, W], and the mask of label values, uint8 [H, W]."""
    done = render(case)
    pixel_mm, depth_mm, _ = done.scan.spacing_mm
    rng = np.random.Generator(np.random.PCG64([case.seed, int(case.labelled), case.index, 1]))
    quanta = rng.uniform(*QUANTA)
    bits, dtype = (8, np.uint8) if rng.uniform() < SHARE_8_BIT else (DETECTOR_BITS, np.uint16)
    shown = to_picture(develop(detect(integrate_attenuation(done.hu, depth_mm), quanta, rng), pixel_mm))
    mask = to_picture(project_labels(label_lungs(case, done), depth_mm))
    return np.round(shown * (2**bits - 1)).astype(dtype), mask


def label_lungs(case: RadiographCase, done: RenderedCase) -> np.ndarray:
    """The labels of a rendered case with the lungs' air, uint8 [X, Y, Z]."""
    atlas_mm, _ = atlas_coordinates(case)
    inside = lung_distance(Region((slice(None),) * 3, *atlas_mm)) < 0
    return np.where(inside & (done.hu < LARGEST_LUNG_HU) & (done.label == 0), np.uint8(LUNGS), done.label)


def radiograph_files(out_dir: Path, case: RadiographCase) -> Case:
    """The files of one radiograph."""
    label = out_dir / "labels" / f"{case.name}.png" if case.labelled else None
    return Case(case.name, out_dir / "images" / f"{case.name}.png", label)


def write_radiograph(out_dir: Path, case: RadiographCase) -> bool:
    """Make and write one radiograph; returns False when all its files are there already."""
    files = radiograph_files(out_dir, case)
    if files.image.exists() and (files.label is None or files.label.exists()):
        return False
    grey, mask = radiograph_of(case)
    _, scan, _ = case.sample()
    pixel_mm = (scan.spacing_mm[2], scan.spacing_mm[0])
    if files.label is not None:
        write_grey(files.label, mask, pixel_mm)
    write_grey(files.image, grey, pixel_mm)
    return True


def write_radiographs(out_dir: Path, cases: Sequence[RadiographCase], num_workers: int) -> int:
    """Write all radiographs and dataset.json in `num_workers` processes; returns how many were made anew."""
    num_made = write_cases(partial(write_radiograph, out_dir), cases, num_workers)
    labels = {str(value): name for value, name in enumerate(LABELS)}
    listed = [radiograph_files(out_dir, case) for case in cases]
    write_data_list(out_dir / "dataset.json", out_dir, listed, labels=labels, name="phantom radiographs")
    return num_made
