"""Hosts that train together: how they meet, how they agree, and how one that fails tells the rest.

What is computed is in lock-step (all hosts run the same programs in the same order), so a host
that leaves for a reason of its own, a file that is missing or a mistake in its options, would let
the others wait for ever. It therefore says why, through the coordinator's key-value store, and a
thread on each of the others reads it and ends its process with the same line and exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from r1s_jax.rollout.hosts import from_all_hosts
from r1s_jax.run.supervise import ChildOf, Host
from r1s_jax.types import UserError

# (exit code, line for stderr) of an error; None for a bug, whose traceback is shown.
Explain = Callable[[BaseException], tuple[int, str] | None]

# Seconds. A host that is silent for so long is given up; all others have ended well within 30.
HEARTBEAT = 15
_MEETING = 300  # hosts of a pod are not started in one moment
_LEAVING = 60
_VERDICT = HEARTBEAT + 5  # by then the runtime has ended a process whose error is a dead host
_FAREWELL = 5  # for a failing host's last words to arrive
_LISTEN_EVERY = 0.5

_PREFIX = "r1s_jax"


def work(child: ChildOf, fn: Callable[[], int | None], explain: Explain) -> int:
    """Runs `fn` as one of several hosts; returns its exit code when all hosts are done.

    An error on this host ends all of them, with its line and exit code, without returning.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    host = child.host
    print(f"{host} meets the others at {host.coordinator}", file=sys.stderr)
    exchange: _Exchange | None = None
    try:
        exchange = _Exchange(host, _connect(host))
        exchange.require_same_count()
        code = fn() or 0
        from_all_hosts(code)  # the slowest may have a policy to write
        exchange.stop()
        jax.distributed.shutdown()
        return code
    except BaseException as error:
        if _of_the_runtime(error):
            time.sleep(_VERDICT)
        if exchange is not None:
            exchange.begin_to_fail()
        known = explain(error)
        if known is None:
            traceback.print_exc()
            print(f"(the runtime's own words: {child.log})", file=sys.stderr)
            code, line = 1, f"{type(error).__name__}: {error}"
        else:
            code, line = known
            print(line, file=sys.stderr)
        if exchange is not None:
            exchange.tell(code, line)
        _leave(code)


def require_same(mine: Mapping[str, str]) -> None:
    """Compares what each host was given, name by name; all hosts call this together.

    Raises:
        UserError: on all hosts, where one has something else than host 0.
    """
    first, *others = from_all_hosts(dict(mine))
    for index, theirs in enumerate(others, start=1):
        for name in sorted({**first, **theirs}):
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"{name} is {first.get(name, 'not set')} on host 0 and "
                    f"{theirs.get(name, 'not set')} on host {index}: all need the same"
                )


class _Exchange:
    """This host's ear and voice in the coordinator's key-value store."""

    def __init__(self, host: Host, client: Any):
        self._host, self._client = host, client
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # of whoever ends this process; never given back
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def require_same_count(self) -> None:
        """The runtime itself does not mind, and hangs later. Raises UserError."""
        key = f"{_PREFIX}/count"
        if self._host.index == 0:
            self._client.key_value_set(key, str(self._host.count))
        count = int(self._client.blocking_key_value_get(key, _MEETING * 1000))
        if count != self._host.count:
            raise UserError(f"--host: {self._host} here, and host 0 is one of {count}")

    def stop(self) -> None:
        """From here on nobody fails."""
        self._stopped.set()
        self._thread.join()

    def begin_to_fail(self) -> None:
        """From here on only this host's own error is shown; never returns after another's."""
        self._stopped.set()
        self._ending.acquire()

    def tell(self, code: int, line: str) -> None:
        """Lets the others end too, and returns when they have heard why."""
        told = json.dumps([self._host.index, code, " ".join(line.split())])
        # If not: another has failed before, or nobody is left.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_PREFIX}/failed", told)
        self._farewell(failed=True)

    def _listen(self) -> None:
        while not self._stopped.wait(_LISTEN_EVERY):
            try:
                told = self._client.key_value_try_get(f"{_PREFIX}/failed")
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    continue
                return  # the coordinator is gone, and the runtime is about to notice
            index, code, line = json.loads(told)
            if self._ending.acquire(blocking=False):
                line = line.removeprefix("error: ")
                print(f"error: host {index} of {self._host.count}: {line}", file=sys.stderr)
                self._farewell(failed=False)
                _leave(code)
            return

    def _farewell(self, *, failed: bool) -> None:
        """Waits until nobody is left who could take this host's end for the reason of it all.

        So a failed host goes when all others have heard of it, and host 0, whose end is the
        store's, goes last.
        """
        heard, count = f"{_PREFIX}/heard/", self._host.count

        def wait_for(number: int) -> None:
            while time.monotonic() < end and len(self._client.key_value_dir_get(heard)) < number:
                time.sleep(0.05)

        end = time.monotonic() + _FAREWELL
        last = self._host.index == 0
        # If it raises, the store is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if failed and not last:
                wait_for(count - 1)
            self._client.key_value_set(f"{heard}{self._host.index}", "")
            if last:
                wait_for(count)
                time.sleep(0.5)  # in which they end


def _connect(host: Host) -> Any:
    """Meets the other hosts; returns the runtime's client."""
    if host.index == 0:
        _require_free(host.coordinator)
    # A run answers SIGTERM itself, after a step; the service would swallow the signal.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        host.coordinator,
        host.count,
        host.index,
        cluster_detection_method="deactivate",
        initialization_timeout=_MEETING,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=_LEAVING,
    )
    # The store that jax.distributed keeps for itself and for checkpoints; it has no public name.
    from jax._src.distributed import global_state

    return global_state.client


def _require_free(coordinator: str) -> None:
    """The runtime crashes where the port is taken."""
    port = int(coordinator.rsplit(":", 1)[1])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator {coordinator}: port {port} of this host cannot be opened: "
                f"{error.strerror}"
            ) from error


def _of_the_runtime(error: BaseException) -> bool:
    """Whether a dead host may be behind it: a collective that another one left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(seen)
        seen = seen.__cause__ or seen.__context__
    return False


def _end_with_parent() -> None:
    """Its end of the pipe closes, however the parent was ended."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(code: int) -> NoReturn:
    """At once: the interpreter's way out waits minutes for the other hosts."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
