"""The sampler as the host sees it: slots, four verbs, and every program compiled up front."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1s_jax.engine import programs
from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.programs import Stop, StopTables
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import EngineConfig, EngineState, Prefix, empty_state
from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.sharding import check_divisible, named_sharding, replicated
from r1s_jax.types import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRef:
    """Where a prompt's KV stands: row `row` of `prefix`; its last token is still to be fed."""

    prefix: Prefix
    row: int
    length: int
    pending: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admission:
    """An episode that starts in a slot: its prompt, its sampling key, its first turn's budget."""

    slot: int
    prompt: PromptRef
    seed: np.ndarray
    budget: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extension:
    """Tokens on top of a parked slot: its last sampled token, the documents, the next budget."""

    slot: int
    last: int
    tokens: Sequence[int]
    budget: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What one slot wrote in a chunk."""

    tokens: np.ndarray
    logprobs: np.ndarray
    stop: Stop


class Engine:
    """Holds weights and state on the device. The host keeps text and bookkeeping elsewhere.

    Every program has one fixed row count, so a row's numbers do not depend on its companions.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        *,
        mesh: Mesh,
        token_bytes: Sequence[bytes],
        stop_strings: Sequence[str],
        eos_ids: Sequence[int],
        dtype: Any = jnp.float32,
    ):
        if config.context > model.max_position_embeddings:
            raise UserError(
                f"engine.context = {config.context}, the model reaches only to "
                f"max_position_embeddings = {model.max_position_embeddings}"
            )
        if len(token_bytes) != model.vocab_size:  # a table that is too short would be read clamped
            raise ValueError(
                f"token_bytes has {len(token_bytes)} entries, vocab_size = {model.vocab_size}"
            )
        check_divisible(mesh, "engine.slots", (config.slots,), ("rows",))
        heads = model.num_key_value_heads
        check_divisible(mesh, "num_key_value_heads", (heads,), ("kv_heads",))
        self.model, self.config, self.mesh, self.dtype = model, config, mesh, dtype
        self.weights_version = -1
        # An end of sequence is no text: a ban on `<|` must not reach `<|im_end|>`.
        ends = set(eos_ids)
        self._free_bytes = [b"" if i in ends else b for i, b in enumerate(token_bytes)]
        self._stops = StopAutomaton.build(stop_strings, token_bytes)
        self._eos_ids = np.array(list(eos_ids) or [-1], np.int32)
        self._tables: dict[tuple[str, ...], StopTables] = {}
        self._params: Params | None = None
        self._state = empty_state(model, config, mesh, dtype)
        state_layout = jax.tree.map(lambda x: x.sharding, self._state)
        chunk_layout = jax.tree.map(lambda _: replicated(mesh), _chunk_form())
        _, axes = abstract_params(model)
        layout = jax.tree.map(
            lambda names: named_sharding(mesh, names),
            axes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        self._place = jax.jit(
            lambda params: jax.tree.map(lambda p: p.astype(dtype), params), out_shardings=layout
        )
        self._prefill = jax.jit(partial(programs.prefill, model))
        self._insert = jax.jit(programs.insert, donate_argnums=0, out_shardings=state_layout)
        self._extend = jax.jit(
            partial(programs.extend, model), donate_argnums=1, out_shardings=state_layout
        )
        self._decode = jax.jit(
            partial(programs.decode_chunk, model),
            static_argnums=(0, 1),
            donate_argnums=4,
            out_shardings=(state_layout, chunk_layout),
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._stops.stop_strings

    def match_end(self, turn_bytes: bytes) -> tuple[int, int] | None:
        """(index of the stop string, its end in bytes) of a turn's bytes, if one is complete."""
        return self._stops.match_end(turn_bytes)

    def set_weights(self, params: Params, version: int) -> None:
        """Takes the learner's parameters in the engine's dtype and layout; slots must be idle.

        KV in the cache belongs to the old weights, so the caller drains its episodes before.
        """
        self._params = self._place(params)
        self.weights_version = version

    def warm_up(self, samplings: Sequence[SamplingConfig]) -> None:
        """Compiles every program for every bucket, so that steady state compiles nothing."""
        rows = self.config.extend_rows
        idle = np.full(self.config.slots, -1, np.int32)
        for bucket in self.config.prompt_buckets:
            prefix = self._prefill(self._weights, _zeros(self.config.prefill_rows, bucket))
            self._state = self._insert(self._state, prefix, idle, *self._registers())
        absent = np.full(rows, self.config.slots, np.int32)
        none = [np.zeros(rows, np.int32) for _ in range(3)]
        piece = _zeros(rows, self.config.extend_tokens)
        self._state = self._extend(self._weights, self._state, absent, piece, *none)
        for sampling in samplings:
            self.decode_chunk(sampling)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[PromptRef]:
        """KV of prompts, one row each. Raises ValueError if one fits no bucket."""
        by_bucket: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_bucket[self.prompt_bucket(len(prompt))].append(index)
        refs: dict[int, PromptRef] = {}
        for bucket, indices in by_bucket.items():
            for start in range(0, len(indices), self.config.prefill_rows):
                group = indices[start : start + self.config.prefill_rows]
                tokens = _zeros(self.config.prefill_rows, bucket)
                for row, index in enumerate(group):
                    tokens[row, : len(prompts[index]) - 1] = prompts[index][:-1]
                prefix = self._prefill(self._weights, tokens)
                for row, index in enumerate(group):
                    refs[index] = PromptRef(
                        prefix=prefix,
                        row=row,
                        length=len(prompts[index]) - 1,
                        pending=prompts[index][-1],
                    )
        return [refs[i] for i in range(len(prompts))]

    def prompt_bucket(self, length: int) -> int:
        """The smallest bucket for a prompt of `length` tokens."""
        fitting = [b for b in self.config.prompt_buckets if b >= length - 1]
        if length < 1 or not fitting:
            raise ValueError(
                f"a prompt of {length} tokens fits none of the buckets {self.config.prompt_buckets}"
            )
        return min(fitting)

    def insert(self, admissions: Sequence[Admission]) -> None:
        """Starts episodes in their slots."""
        by_prefix: dict[int, list[Admission]] = defaultdict(list)
        for admission in admissions:
            by_prefix[id(admission.prompt.prefix)].append(admission)
        for group in by_prefix.values():
            source = np.full(self.config.slots, -1, np.int32)
            lengths, pending, budget, seeds = self._registers()
            for a in group:
                source[a.slot] = a.prompt.row
                lengths[a.slot], pending[a.slot] = a.prompt.length, a.prompt.pending
                budget[a.slot], seeds[a.slot] = a.budget, a.seed
            self._state = self._insert(
                self._state, group[0].prompt.prefix, source, lengths, pending, budget, seeds
            )

    def decode_chunk(self, sampling: SamplingConfig) -> list[Written]:
        """Up to `chunk` tokens for every live slot; one entry per slot, empty where not live."""
        tables = self._stop_tables(sampling.banned)
        self._state, chunk = self._decode(
            sampling, self.config.chunk, self._weights, tables, self._state
        )
        tokens, logprobs, counts, stops = jax.device_get(
            (chunk.tokens_BC, chunk.logprobs_BC, chunk.counts_B, chunk.stops_B)
        )
        return [
            Written(tokens=tokens[b, :n], logprobs=logprobs[b, :n], stop=Stop(int(stops[b])))
            for b, n in enumerate(counts.tolist())
        ]

    def extend(self, extensions: Sequence[Extension]) -> None:
        """Writes documents on top of parked slots, in pieces, and sets the slots live again."""
        rows, width = self.config.extend_rows, self.config.extend_tokens
        pieces: dict[int, list[tuple[Extension, list[int], bool]]] = defaultdict(list)
        for e in extensions:
            feed = [e.last, *e.tokens[:-1]]
            for start in range(0, len(feed), width):
                last = start + width >= len(feed)
                pieces[start].append((e, feed[start : start + width], last))
        for start in sorted(pieces):
            for first in range(0, len(pieces[start]), rows):
                slots = np.full(rows, self.config.slots, np.int32)
                tokens = _zeros(rows, width)
                counts, pending, budget = (np.zeros(rows, np.int32) for _ in range(3))
                for row, (e, feed, last) in enumerate(pieces[start][first : first + rows]):
                    slots[row], counts[row] = e.slot, len(feed)
                    tokens[row, : len(feed)] = feed
                    if last:
                        pending[row], budget[row] = e.tokens[-1], e.budget
                self._state = self._extend(
                    self._weights, self._state, slots, tokens, counts, pending, budget
                )

    @property
    def state(self) -> EngineState:
        """The device state, for tests and for sizing; immutable, replaced by every verb."""
        return self._state

    @property
    def _weights(self) -> Params:
        if self._params is None:
            raise ValueError("the engine has no weights yet: call set_weights first")
        return self._params

    def _registers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Zeroed lengths, pending tokens, budgets and seeds of all slots."""
        slots = self.config.slots
        numbers = (np.zeros(slots, np.int32) for _ in range(3))
        return (*numbers, np.zeros((slots, 2), np.uint32))  # type: ignore[return-value]

    def _stop_tables(self, banned: tuple[str, ...]) -> StopTables:
        if banned not in self._tables:
            ban = StopAutomaton.build(banned, self._free_bytes if banned else [b""])
            put = partial(jax.device_put, device=replicated(self.mesh))
            self._tables[banned] = StopTables(
                next_SV=put(self._stops.table.astype(np.int32)),
                accepting_S=put(self._stops.accepting),
                eos_ids=put(self._eos_ids),
                banned_next_SV=put(ban.table.astype(np.int32)),
                banned_accepting_S=put(ban.accepting),
            )
        return self._tables[banned]


def _zeros(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), np.int32)


def _chunk_form() -> programs.Chunk:
    return programs.Chunk(tokens_BC=0, logprobs_BC=0, counts_B=0, stops_B=0)  # type: ignore[arg-type]
