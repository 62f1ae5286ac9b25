"""Patients whose embedding is known: a place is embedded by its position in a common atlas, so matches are exact."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import EmbedderInfo, embedder_checkpoint
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.network import AnatomicalEmbedder

WAVELENGTHS_MM = (900.0, 300.0, 110.0)
AFFINE = np.array([[0, 0, -8.0, 130], [0, -8.0, 0, 90], [8.0, 0, 0, -700], [0, 0, 0, 1]])
SHAPE = (34, 26, 34)
ATLAS_CENTRE_MM = np.array([0.0, -10.0, -570.0])
ATLAS_LANDMARKS_MM = {
    "liver": [-40, 10, -550],
    "spleen": [60, -30, -560],
    "heart": [20, 20, -480],
    "bladder": [0, 15, -640],
    "spine": [0, -55, -600],
}


ORGANS = {1: ((-40, 10, -550), 38.0), 4: ((55, -20, -570), 26.0)}  # value: centre and radius, atlas mm


def patient_map(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A patient's anatomy is the atlas', scaled about its centre and moved: (scale [3], shift [3])."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.9, 1.1, 3), rng.uniform(-12, 12, 3)


def to_patient(seed: int, atlas_mm: np.ndarray) -> np.ndarray:
    scale, shift = patient_map(seed)
    return (np.asarray(atlas_mm, dtype=float) - ATLAS_CENTRE_MM) * scale + ATLAS_CENTRE_MM + shift


def to_atlas(seed: int, patient_mm: np.ndarray) -> np.ndarray:
    scale, shift = patient_map(seed)
    return (patient_mm - shift - ATLAS_CENTRE_MM) / scale + ATLAS_CENTRE_MM


def _grid_mm(shape: tuple, affine: np.ndarray) -> np.ndarray:
    return index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))


def patient_volume(seed: int) -> Volume:
    """An ellipsoid of soft tissue in air, at 8 mm."""
    place = (to_atlas(seed, _grid_mm(SHAPE, AFFINE)) - ATLAS_CENTRE_MM) / [105, 75, 115]
    return Volume(np.where((place**2).sum(-1) < 1, 40, -1024).astype(np.int16), AFFINE, f"patient{seed}")


def patient_landmarks(seed: int) -> dict[str, np.ndarray]:
    return {name: to_patient(seed, place) for name, place in ATLAS_LANDMARKS_MM.items()}


def atlas_labels(seed: int, shape=SHAPE, affine=AFFINE, organs=ORGANS) -> np.ndarray:
    """Round organs of the common atlas (label: centre and radius, mm), as a patient shows them."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    place = to_atlas(seed, index_to_world(affine, index))
    labels = np.zeros(shape, np.uint8)
    for value, (centre, radius) in organs.items():
        labels[np.linalg.norm(place - centre, axis=-1) < radius] = value
    return labels


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def with_noise(embedding: Embedding, amount: float, seed: int) -> Embedding:
    """Every vector is disturbed, so that single matches scatter."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(values: torch.Tensor) -> torch.Tensor:
        noisy = values.float() + amount * torch.randn(values.shape, generator=generator)
        return torch.nn.functional.normalize(noisy, dim=0).half()

    return dataclasses.replace(embedding, fine=disturb(embedding.fine), coarse=disturb(embedding.coarse))


def patient_embedding(seed: int) -> Embedding:
    """Sines and cosines of the atlas position: long waves coarse, all of them fine."""

    def waves(shape: tuple, affine: np.ndarray, wavelengths: tuple) -> torch.Tensor:
        phase = [2 * np.pi * to_atlas(seed, _grid_mm(shape, affine)) / length for length in wavelengths]
        values = np.concatenate([part(p) for p in phase for part in (np.sin, np.cos)], axis=-1)
        return F.normalize(torch.from_numpy(values).permute(3, 0, 1, 2), dim=0).half()

    coarse_affine = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse_shape = tuple(size // 2 for size in SHAPE)
    return Embedding(
        name=f"patient{seed}",
        fine=waves(SHAPE, AFFINE, WAVELENGTHS_MM),
        coarse=waves(coarse_shape, coarse_affine, (WAVELENGTHS_MM[0],) * len(WAVELENGTHS_MM)),
        fine_affine=AFFINE,
        coarse_affine=coarse_affine,
        body=torch.from_numpy(patient_volume(seed).array > -500),
        fingerprint="atlas",
    )


def lower_part(seed: int, num_slices: int) -> Embedding:
    """A patient's embedding without what lies above."""
    whole = patient_embedding(seed)
    return dataclasses.replace(
        whole,
        fine=whole.fine[:, :num_slices],
        coarse=whole.coarse[:, : num_slices // 2],
        body=whole.body[:num_slices],
    )


def compact_options(width: int = 24, embed_dim: int = 64, norm: str = "batch") -> dict:
    """Options of a small network for coarse isotropic grids (4 to 6 mm) and few training minutes.

    Fine output at stride 1, coarse at stride 8, isotropic 3x3x3 kernels: on such a grid a patch of 48 voxels sees most
    of the trunk, which removes far outliers first, and stride 1 keeps the fine output precise.
    """
    return {
        "width": width,
        "embed_dim": embed_dim,
        "stem_kernel": (5, 5, 5),
        "stem_stride": (1, 1, 1),
        "pool_stride": (1, 1, 1),
        "stage_strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        "stage_kernel_depths": (3, 3, 3, 3),
        "norm": norm,
    }


def save_embedder(path: str | Path, network: AnatomicalEmbedder, info: EmbedderInfo, **extra) -> None:
    """Write a checkpoint as `scripts/train_sam.py` does."""
    torch.save(embedder_checkpoint(network, info, **extra), path)
