"""Counting compilations, so that a steady state that compiles is seen."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts programs compiled (or fetched from the persistent cache) since `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def reset(self) -> None:
        self.count = 0

    def close(self) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _EVENT
