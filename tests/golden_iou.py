"""The golden numbers of SimSiam and DINO with IoU-based positives, and what turns them into a batch for our methods."""

import json
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_fill import SALT, fill_by_name, golden_file, golden_folder, known, read_arrays


class GoldenArrays:
    """The arrays by name as tensors (names as lists); a test that asks for one that is not here is skipped."""

    def __init__(self, name: str = "golden_simsiam_dino.npz") -> None:
        path = golden_folder() / name
        self.arrays = read_arrays(path) if path.is_file() else {}

    def __getitem__(self, name: str):
        if name not in self.arrays:
            pytest.skip(f"golden array {name} is not here (set ALICE_SHARED or ALICE_GOLDEN_DIR)")
        array = self.arrays[name]
        return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(np.asarray(array))


def published_shapes(part: str) -> dict[str, list[int]]:
    """Name -> shape of a published network; the calling test is skipped where the file is absent."""
    return json.loads(golden_file("simsiam_dino_state_dicts.json").read_text())[part]["shapes"]


def fill(module: nn.Module, published: Callable[[str], str] = str, kept: tuple[str, ...] = ()) -> nn.Module:
    """Fill by the published names, with the salt of this set."""
    return fill_by_name(module, published, kept, SALT)


class GivenFeatures(nn.Module):
    """A backbone without weights: the deepest map is what it is given, so that a batch of views holds features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = {32: width}

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        return {32: volumes}

    def encoder_twin(self) -> "GivenFeatures":
        return GivenFeatures(self.channels[32])


def batch_of(*features: Tensor) -> dict[str, Tensor]:
    """Features of V views [B, C] each -> a batch whose views are maps of one place [B, V, C, 1, 1, 1]."""
    views = torch.stack(features, dim=1)[..., None, None, None]
    return {"view": views.clone().requires_grad_()}


def norms_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of each tensor; in float64, since float32 loses 1e-4 over millions of values on a CPU."""
    return torch.stack([tensor.detach().double().norm() for tensor in tensors])


def assert_near(ours: Tensor, golden: Tensor, tolerance: float = 1e-5) -> float:
    """Within `tolerance` of the golden array's largest value; returns the largest deviation as that share."""
    ours = torch.as_tensor(ours).detach().to(torch.float64).reshape(golden.shape)
    ours, golden = known(ours, golden.to(torch.float64))
    deviation = ((ours - golden).abs().max() / golden.abs().max().clamp(min=1e-30)).item()
    assert deviation <= tolerance, f"off by {deviation:.2g} of the largest value"
    return deviation
