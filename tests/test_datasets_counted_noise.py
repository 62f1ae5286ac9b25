"""Random fields by key and position: distributions, independence, and the same values however they are asked for."""

import pytest
import torch

from datasets.samples.counted_noise import BLOCK, KEYS, normal_field, random_bits, uniform_field

NUM = 2**20


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


def test_every_bit_is_a_fair_coin():
    bits = random_bits(123456789, NUM)
    for place in range(32):
        assert abs(((bits >> place) & 1).double().mean() - 0.5) < 5 * 0.5 / NUM**0.5, place


def test_positions_of_one_key_are_a_bijection():
    assert len(random_bits(7, NUM).unique()) == NUM


@pytest.mark.parametrize("first", [0, 1, 1000])
def test_a_part_is_what_the_whole_has_there(first):
    assert torch.equal(random_bits(99, 50, first=first), random_bits(99, first + 50)[first:])


@pytest.mark.parametrize("key", [0, 1, 2**27, KEYS - 1])
def test_normal_deviates_have_the_moments_of_the_normal_distribution(key):
    field = normal_field(key, (64, 128, 128)).double().flatten()
    error = len(field) ** -0.5
    assert abs(field.mean()) < 5 * error and abs(field.square().mean() - 1) < 5 * 2**0.5 * error
    assert abs(field.pow(3).mean()) < 5 * 15**0.5 * error and abs(field.pow(4).mean() - 3) < 5 * 96**0.5 * error
    assert 4.2 < field.abs().max() < 4.34
    for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (field.abs() < bound).double().mean() == pytest.approx(share, abs=0.003)


def test_uniform_values_fill_the_unit_interval_evenly():
    field = uniform_field(5, (NUM,))
    assert field.min() >= 0 and field.max() < 1
    counts = torch.histc(field, 64, 0, 1)
    assert (counts - NUM / 64).abs().max() < 5 * (NUM / 64) ** 0.5


@pytest.mark.parametrize("shift", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (16, 0, 0), (0, 5, 7)])
def test_neighbours_are_independent(shift):
    field = normal_field(11, (64, 64, 64))
    assert abs(correlation(field, field.roll(shift, (0, 1, 2)))) < 5 / 512


@pytest.mark.parametrize("other", [12, 11 + 2**26, 11 + 2**27, 11 + 2**52])
def test_keys_are_independent_at_every_shift(other):
    """Fields of two keys, which are drawn at random, must not be shifts of each other."""
    one, two = (torch.fft.rfft(normal_field(key, (NUM,)).double()) for key in (11, other))
    shifts = torch.fft.irfft(one * two.conj()).abs() / NUM
    assert shifts.max() < 7 / NUM**0.5


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 7), (1, BLOCK + 3), (2, BLOCK // 2, 3)])
def test_any_size_gives_the_first_values_of_the_field(shape):
    num = int(torch.Size(shape).numel())
    assert normal_field(3, shape).shape == shape
    assert torch.equal(normal_field(3, shape).flatten(), normal_field(3, (4 * BLOCK,))[:num])


def test_threads_change_nothing():
    fields = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        fields.append(normal_field(8, (3, 333, 333)))
    assert torch.equal(*fields)


@pytest.mark.parametrize("key", [-1, KEYS])
def test_keys_that_do_not_survive_a_float64_are_refused(key):
    with pytest.raises(ValueError, match="less than 2"):
        random_bits(key, 3)
