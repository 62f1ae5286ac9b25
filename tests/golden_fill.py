"""Where the golden numbers lie, and the deterministic filling of weights by which they were made.

Tests need no weight files: every tensor is a function of its own name. `ALICE_GOLDEN_DIR` names another folder of
golden data, `ALICE_GOLDEN_SALT` the salt that goes in front of the names there. The clone itself holds a reduced set
(`golden/README.md`): its inputs are drawn from their seeds, and of large outputs it has a part.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_inputs import INPUTS
from tests.shared import SHARED

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
SALT = os.environ.get("ALICE_GOLDEN_SALT", "")
REDUCED = Path(__file__).parent / "golden"
DRAWN = "drawn_inputs"  # array of a reduced set: the names of the arrays to draw from their seeds


def golden_folder() -> Path:
    """The folder of the golden data: `$ALICE_GOLDEN_DIR`, else `golden/` of the shared data, else the reduced set."""
    named, shared = os.environ.get("ALICE_GOLDEN_DIR"), SHARED / "golden"
    if named:
        return Path(named)
    return shared if shared.is_dir() else REDUCED


def golden_file(name: str) -> Path:
    """The path of one golden file; the calling test is skipped where it is absent."""
    path = golden_folder() / name
    if not path.exists():
        pytest.skip(f"golden file {name} is not here ({golden_folder()})")
    return path


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one golden .npz; what a reduced set left out of an array is NaN."""
    with np.load(path) as file:
        arrays = dict(file)
    for name in arrays.pop(DRAWN, np.array([])).tolist():
        arrays[name] = INPUTS[path.name][name]()
    return arrays


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden .npz; the calling test is skipped where it is absent."""
    return read_arrays(golden_file(name))


def golden(name: str) -> dict[str, Tensor]:
    """`golden_arrays` as tensors."""
    return {key: torch.from_numpy(np.asarray(value)) for key, value in golden_arrays(name).items()}


def known(ours: Tensor | np.ndarray, golden: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Both arrays, of one shape, where the golden one has a value: [N] each, N at least 1."""
    ours, golden = torch.as_tensor(ours), torch.as_tensor(golden)
    assert ours.shape == golden.shape, f"{tuple(ours.shape)} for {tuple(golden.shape)}"
    there = ~golden.isnan()
    assert there.any()
    return ours[there], golden[there]


def fill(name: str, shape: tuple[int, ...], salt: str | None = None) -> np.ndarray:
    """The values of a tensor called `name`, before its kind shifts them: float32, standard deviation 0.05.

    Args:
        salt: goes in front of the name; None = `$ALICE_GOLDEN_SALT`, by default none.
    """
    key = (SALT if salt is None else salt) + name
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return generator.standard_normal(tuple(shape)).astype(np.float32) * np.float32(0.05)


def fill_by_name(
    module: nn.Module,
    published: Callable[[str], str] = str,
    kept: tuple[str, ...] = (),
    salt: str | None = None,
) -> nn.Module:
    """Set every tensor of a module's state dict from its name, as the golden data's README says.

    Args:
        published: our name -> the name to fill by.
        kept: ends of names whose tensors stay as they are.
        salt: as in `fill`.
    """
    norm_weights = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, NORM_LAYERS)}
    filled = {}
    for name, tensor in module.state_dict().items():
        if name.endswith(kept):
            filled[name] = tensor
            continue
        if name.endswith("num_batches_tracked"):
            filled[name] = torch.zeros((), dtype=torch.int64)
            continue
        values = fill(published(name), tuple(tensor.shape), salt)
        if name.endswith("running_var"):
            values = 1 + np.abs(values)
        elif name in norm_weights:
            values = 1 + values
        filled[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    module.load_state_dict(filled, strict=True)
    return module
