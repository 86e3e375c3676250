"""What the reports in this folder are made of."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A section of a report."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{self.text}\n\n{table}\n"


def heading(title: str, script: str) -> str:
    """Title, command, machine, date; paths of this machine are left out of the command."""
    words = ("PATH" if os.sep in word else word for word in sys.argv[1:])
    command = " ".join((f"python benchmarks/{Path(script).name}", *words))
    device = jax.devices()[0].device_kind
    return (
        f"# {title}\n\n`{command}`, {os.cpu_count()} cores ({platform.machine()}), "
        f"{device}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"{datetime.date.today()}.\n"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (least to largest)`."""
    parts = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{x:.{digits}f}" for x in parts)
    return f"{middle} ({low} to {high})"
