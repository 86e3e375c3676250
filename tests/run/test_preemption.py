"""The stop flag: set by signals, handlers given back."""

import os
import signal

import pytest

from r1s_jax.run.preemption import EXIT_TRY_AGAIN, StopFlag


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_handlers_come_back(number):
    before = handlers()
    with StopFlag() as stop:
        assert not stop.requested and stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name
    assert handlers() == before
    assert stop.requested  # still to be read after leaving
    with stop:
        assert not stop.requested


def test_second_interrupt_interrupts():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_exit_code():
    assert EXIT_TRY_AGAIN == 75
