"""Dataclasses that stand in for the library's configuration in tests of the launcher."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    path: str
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    data: Data
    reward: Literal["format", "f1"] = "format"
    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    seed: int
    stages: tuple[Stage, ...]
    save: bool = True
    mesh: tuple[int, int, int] = (1, 1, 1)
    note: str = ""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
