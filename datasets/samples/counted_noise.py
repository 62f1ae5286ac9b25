"""Random fields by key and position: value i of a field is a function of (key, i), the same bits on every device.

PyTorch's generators give other numbers on a GPU than on a CPU. Here a hash of integers and a table of quantiles make
them, so that a view is the same wherever it is made. The hash is two rounds of the xor-shift-multiply mixer with the
constants of C. Wellons' hash prospector (lowbias32), with one half of the scrambled key before each. It serves
pictures, not cryptography. Normal deviates come in 2**16 values, at most 4.33 in size; drawing them takes as long as
`torch.randn` on one CPU core.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

KEYS = 2**53  # keys lie below it: float64, in which they travel among other draws, holds them exactly
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed 32-bit numbers
BLOCK = 2**16  # values that are made at a time on a CPU: what is needed in between stays in its cache


def random_bits(key: int, num: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """32 random bits for each position from `first` on, int32 [num].

    Args:
        key: 0 <= key < `KEYS`.
    """
    if not 0 <= key < KEYS:
        raise ValueError(f"key {key}: expected 0 or more and less than 2**53")
    halves = np.frombuffer(np.uint64(_scrambled(key)).tobytes(), np.int32).tolist()
    bits = torch.arange(first, first + num, dtype=torch.int32, device=device)
    for block in bits.split(BLOCK if bits.device.type == "cpu" else max(num, 1)):
        _mix(_mix(block.add_(halves[0])).bitwise_xor_(halves[1]))
    return bits


def _scrambled(key: int) -> int:
    """64 bits, of which neighbouring keys share about half: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Keys that differed in their lower half alone would give the same field, shifted.
    """
    bits = (key + 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def _mix(bits: Tensor) -> Tensor:
    """A bijection of 32 bits, in place. Shifts of signed numbers repeat the sign, hence the masks."""
    for shift, multiplier in zip((16, 15), MULTIPLIERS):
        bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(multiplier)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def uniform_field(key: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Uniform in [0, 1), in steps of 2**-24, float32 of this shape."""
    num = int(torch.Size(shape).numel())
    return (random_bits(key, num, device) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24).view(shape)


def normal_field(key: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Normal deviates of mean 0 and deviation 1, float32 of this shape; one hash makes two of them."""
    num = int(torch.Size(shape).numel())
    table, field = _quantiles(torch.device(device)), torch.empty(num + num % 2, device=device)
    block = 2 * BLOCK if field.device.type == "cpu" else len(field)
    for start in range(0, num, block):
        part = field[start : start + block]
        halves = random_bits(key, len(part) // 2, device, start // 2).view(torch.int16).int()
        part.copy_(table.index_select(0, halves.add_(2**15)))
    return field[:num].view(shape)


@cache
def _quantiles(device: torch.device) -> Tensor:
    """The normal distribution's quantiles in the middles of 2**16 equal shares, scaled to a deviation of 1."""
    with torch.inference_mode(False):
        shares = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
        quantiles = torch.special.ndtri(shares)
        return (quantiles / quantiles.square().mean().sqrt()).float().to(device)
