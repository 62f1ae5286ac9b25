"""Process groups and what they set up: a CPU run repeats itself."""

import torch

from engine import distributed


def gradient_of_gathering() -> torch.Tensor:
    """The gradient of a small table that many rows are gathered from, as with relative position biases."""
    torch.manual_seed(0)
    table = torch.randn(50, 3, requires_grad=True)
    rows = torch.randint(0, 50, (200_000,))
    (table[rows] * torch.randn(200_000, 3)).sum().backward()
    return table.grad


def test_gathering_repeats_exactly_on_the_cpu():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        world = distributed.start("cpu")
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.are_deterministic_algorithms_enabled()
        first = gradient_of_gathering()
        assert all(torch.equal(first, gradient_of_gathering()) for _ in range(10))
    finally:
        distributed.stop()
        torch.use_deterministic_algorithms(before)
