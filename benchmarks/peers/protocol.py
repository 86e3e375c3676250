"""How the benchmark talks to a peer: a process that answers each line with one line of JSON.

The first line it writes, unasked, says that it is warmed up. Needs nothing but Python, as peers
may live in environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Command = Callable[..., dict[str, Any]]


def serve(ready: dict[str, Any], commands: dict[str, Command]) -> None:
    """The peer's side: answers `name argument …` until `quit` or the end of the input."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # what libraries print must not come between
        print(json.dumps(ready), file=out)
        for line in sys.stdin:
            name, *arguments = line.split()
            if name == "quit":
                return
            print(json.dumps(commands[name](*arguments)), file=out)


class Peer:
    """The parent's side."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, str] | None = None):
        """Starts it; `settings` are added to the environment."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **(settings or {})},
        )
        self.ready = self._read()

    def ask(self, *words: object) -> dict[str, Any]:
        """Sends a command and waits for its answer; RuntimeError if the peer has ended."""
        print(*words, file=self._process.stdin, flush=True)
        return self._read()

    def quit(self) -> None:
        self._process.communicate("quit\n")

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the peer has ended with exit code {self._process.wait()}")
        return json.loads(line)
