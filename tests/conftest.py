"""Shared fixtures."""

from unittest import mock

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Computes a module's tests with one thread, as each of two ranks does: sums then have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def without_collecting():
    """Between the jobs of a comparison memory is not collected: beside all that tests have loaded it takes longer."""
    with mock.patch("gc.collect"):
        yield
