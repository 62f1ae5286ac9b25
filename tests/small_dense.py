"""Small batches with points, vectors and matches, for tests of the dense term."""

import torch
from torch import Tensor

from models.backbones.interface import Size3
from tests.small_alice import NOW, ROI, small_alice, small_batch

NUM_POINTS = 6
VECTOR_DIM = 10
VARIANTS = ("distil", "across", "across_contrast", "coordinates")
WITH_DENSE = NOW | {"lambda4": 2.0}


def dense_alice(variant: str = "distil", **options):
    """A small Alice of restoration and the dense term."""
    dense = {"lambda4": 2.0, "dense_variant": variant, "dense_points": NUM_POINTS, "dense_hidden_dim": 16}
    alone = {"lambda1": 0.0, "lambda2": 0.0, "vector_dim": VECTOR_DIM}
    return small_alice(**(dense | alone | options))


def dense_batch(num_samples: int, variant: str = "distil", seed: int = 0, roi: Size3 = ROI) -> dict[str, Tensor]:
    """`small_batch` with random points; the last crop of every batch has no place in the patient."""
    generator = torch.Generator().manual_seed(seed + 100)
    shape = (num_samples, 2, NUM_POINTS)

    def places() -> Tensor:
        return torch.rand(*shape, 3, generator=generator) * torch.tensor(roi) - 0.5

    has_anatomy = torch.ones(num_samples, 2, dtype=torch.bool)
    has_anatomy[-1, -1] = False
    batch = small_batch(num_samples, seed, roi) | {
        "points_vox": places(),
        "points_mm": 50 * torch.randn(*shape, 3, generator=generator),
        "anatomy": torch.randn(*shape, 3 if variant == "coordinates" else VECTOR_DIM, generator=generator),
        "has_anatomy": has_anatomy,
    }
    if variant.startswith("across"):
        batch["match_vox"], batch["match_mm"] = places(), 50 * torch.randn(*shape, 3, generator=generator)
        batch["match_weight"] = torch.rand(*shape, generator=generator) * has_anatomy[..., None]
    return batch
