"""Leaving in good order when a machine is taken away."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

EXIT_TRY_AGAIN = 75  # sysexits' EX_TEMPFAIL: saved, start the same command again


class StopFlag:
    """While it is entered, SIGTERM and the first Ctrl-C set a flag instead of ending the run.

    The loop asks `requested` at a point where it can save, and leaves with EXIT_TRY_AGAIN. A
    second Ctrl-C interrupts at once. Signals reach the main thread, so it is entered there.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self._received is not None

    @property
    def reason(self) -> str:
        """The signal's name, "" while there was none."""
        return "" if self._received is None else signal.Signals(self._received).name

    def __enter__(self) -> StopFlag:
        self._received = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not install and cannot name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _set(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
