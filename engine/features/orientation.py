"""Encoders that learnt arrays in another axis order: published ones mostly know MONAI's "RAS", ours is "SPL"."""

from collections.abc import Callable

from torch import Tensor

from datasets.ct.geometry import CANONICAL_AXCODES

WORLD_AXIS = {letter: axis for axis, pair in enumerate(("RL", "AP", "SI")) for letter in pair}


def check_axcodes(axcodes: str) -> None:
    """Raise ValueError for text that names no axis order."""
    if sorted(WORLD_AXIS.get(letter, -1) for letter in axcodes) != [0, 1, 2]:
        raise ValueError(
            f"--axcodes {axcodes}: expected one letter each of R or L, A or P, S or I, as in RAS: where indices grow to"
        )


def in_axis_order(encode: Callable[[Tensor], dict[int, Tensor]], axcodes: str) -> Callable[[Tensor], dict[int, Tensor]]:
    """`encode` for windows in our axis order, where it expects them in the order of `axcodes`.

    Args:
        encode: windows [B, 1, ...] in that order -> {stride: map in that order}.
        axcodes: world direction in which the index of each axis grows, e.g. "RAS".

    Returns:
        Windows [B, 1, D, H, W] -> {stride: map [B, C, d, h, w]}, both in our order; `encode` itself where that is it.
    """
    if axcodes == CANONICAL_AXCODES:
        return encode
    ours = [WORLD_AXIS[letter] for letter in CANONICAL_AXCODES]
    sources = [2 + ours.index(WORLD_AXIS[letter]) for letter in axcodes]  # their axis 2 + i is our axis sources[i]
    flipped = [2 + i for i, letter in enumerate(axcodes) if letter not in CANONICAL_AXCODES]
    back = [2 + sources.index(axis) for axis in (2, 3, 4)]

    def turned(windows: Tensor) -> dict[int, Tensor]:
        maps = encode(windows.permute(0, 1, *sources).flip(flipped).contiguous())
        return {stride: one.flip(flipped).permute(0, 1, *back) for stride, one in maps.items()}

    return turned
