"""The static shapes of an engine, and what a decode chunk is given and gives back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from r1s_jax.types import require_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Static shapes of a run; every program is compiled for these and no others.

    `rows`, `extend_rows` are of the whole mesh. How many episodes have a place in the cache
    (more than are decoded at a time, because some wait for documents) follows from the memory.
    """

    rows: int = 64  # episodes decoded at a time
    chunk: int = 16  # decode steps between two looks of the host, at most
    context: int = 384  # tokens of one episode, prompt and documents included
    page: int = 64  # tokens of one page of the cache
    extend_rows: int = 8  # prompts and documents are written in blocks, so many at a time
    extend_tokens: int = 32  # tokens of a block
    int8_cache: bool = False  # 8 bits a number, half of bfloat16's memory and a little noise
    tensor: int | None = None  # devices that share one copy of the weights; the mesh's, if None
    scan_layers: bool = False  # compile one layer, not all; slower on CPUs, where it copies weights

    def __post_init__(self) -> None:
        sizes = ("rows", "chunk", "context", "page", "extend_rows", "extend_tokens")
        given = ("tensor",) if self.tensor is not None else ()
        require_least("engine", self, dict.fromkeys((*sizes, *given), 1))

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt: one more has to be sampled."""
        return self.context - 1

    def cache_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """What the cache holds, for a policy that computes in `dtype`."""
        return jnp.int8 if self.int8_cache else dtype

    @property
    def pages_per_episode(self) -> int:
        """Pages of an episode that fills its context."""
        return -(-self.context // self.page)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a decode chunk, as the host hands them in.

    table_RJ: their pages. lengths_R: cached tokens. pending_R: the last token, known but not in
    the cache yet. budget_R: tokens the row may still sample this turn; 0 where the row is empty.
    stop_state_R, ban_state_R: states of the two automata. seeds_R2: the row's sampling key.
    """

    table_RJ: Any
    lengths_R: Any
    pending_R: Any
    budget_R: Any
    stop_state_R: Any
    ban_state_R: Any
    seeds_R2: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a decode chunk wrote, valid up to counts_R, and where it left its rows.

    tokens, logprobs, drawn_logprobs: [R C]. stops_R is a `Stop`. steps: decode steps taken.
    """

    tokens_RC: Any
    logprobs_RC: Any
    drawn_logprobs_RC: Any
    counts_R: Any
    stops_R: Any
    stop_state_R: Any
    ban_state_R: Any
    steps: Any
