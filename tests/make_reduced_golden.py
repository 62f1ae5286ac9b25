"""Make `tests/golden/`, the part of the golden data that every clone holds, from the whole set.

    python -m tests.make_reduced_golden ../shared/golden

Inputs that `tests.golden_inputs` draws again to the last bit are left out, and so are arrays that no test reads. Large
floating-point outputs keep evenly spaced values, the others become NaN, which compresses to next to nothing.
"""

import sys
from pathlib import Path

import numpy as np

from tests.golden_fill import DRAWN, REDUCED
from tests.golden_inputs import INPUTS

MOST_BYTES = 1_000_000  # of the whole folder
LARGE = 2000  # values above which an output is thinned
NUM_KEPT = 1024
WHOLE = {"golden_caid.npz": ("train_queue_in",)}  # inputs that no seed gives
LEFT_OUT = {
    "golden_match.npz": ("k_coarse_up", "fine_query_vec", "coarse_query_vec", "xyz_half", "score_half"),
    "golden_loss.npz": ("mask0", "mask1"),
    "golden_simsiam_dino.npz": ("zoom", "swin2d_", "png_", "swin3d_pooled_monai_until_1.4"),
}


def next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


def thinned(array: np.ndarray) -> np.ndarray:
    """The array with `NUM_KEPT` values or fewer; their distance is prime, so that they meet all places of all axes."""
    kept = np.full(array.size, np.nan, dtype=array.dtype)
    step = next_prime(max(2, array.size // NUM_KEPT))
    kept[::step] = array.ravel()[::step]
    return kept.reshape(array.shape)


def reduced(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays to keep of one file.

    Raises:
        ValueError: an input that its seed does not give, or a large output with NaN.
    """
    drawn = INPUTS.get(name, {})
    for key, draw in drawn.items():
        if not np.array_equal(draw(), arrays[key]):
            raise ValueError(f"{name}: tests.golden_inputs draws another {key}")
    kept: dict[str, np.ndarray] = {DRAWN: np.array(sorted(drawn))} if drawn else {}
    for key, array in arrays.items():
        if key in drawn or key.startswith(LEFT_OUT.get(name, ())):
            continue
        is_large = array.dtype.kind == "f" and array.size > LARGE and key not in WHOLE.get(name, ())
        if is_large and np.isnan(array).any():
            raise ValueError(f"{name}: {key} holds NaN, which stands for what was left out")
        kept[key] = thinned(array) if is_large else array
    return kept


def main(source: Path) -> None:
    REDUCED.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.json")):
        (REDUCED / path.name).write_text(path.read_text())
    for path in sorted(source.glob("*.npz")):
        with np.load(path) as file:
            np.savez_compressed(REDUCED / path.name, **reduced(path.name, dict(file)))
    sizes = {path.name: path.stat().st_size for path in sorted(REDUCED.iterdir())}
    for name, size in sizes.items():
        print(f"{size:9,} {name}")
    total = sum(sizes.values())
    print(f"{total:9,} in all")
    if total > MOST_BYTES:
        raise ValueError(f"{REDUCED}: {total:,} bytes, expected at most {MOST_BYTES:,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
