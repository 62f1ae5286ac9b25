"""What a stop signal does before, in and after the training."""

import os
import signal

import pytest

from engine.signals import EXIT_INTERRUPTED, STOP_SIGNALS, StopRequest, exiting_when_asked, stop_early_when_asked


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of the tests' own process come back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_after_the_training_changes_nothing_and_one_in_it_is_noted(number):
    """A second signal would otherwise kill a run that has just saved and is about to end with its own code."""
    stop_early_when_asked()
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_training_that_failed_can_be_ended(number):
    stop_early_when_asked()
    with pytest.raises(ValueError), StopRequest():
        raise ValueError
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_work_after_the_training_ends_at_once(number):
    signal.signal(number, signal.SIG_IGN)
    with pytest.raises(SystemExit) as ended, exiting_when_asked():
        os.kill(os.getpid(), number)
    assert ended.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(number) == signal.SIG_IGN
