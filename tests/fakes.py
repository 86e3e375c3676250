"""Stand-ins for the slow or outside parts of the system."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from r1s_jax.engine.engine import Engine, Step, Work, Written
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.engine.state import EngineConfig
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import Document, RetrievalFailure


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryRetriever:
    """Answers the queries of a dictionary, every other query with `default`."""

    mapping: Mapping[str, tuple[Document, ...]]
    default: tuple[Document, ...] = ()

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        return [self.mapping.get(query, self.default)[:k] for query in queries]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailingRetriever:
    """Fails on the queries that contain `pattern` (on all, by default), else asks `inner`."""

    inner: DictionaryRetriever = dataclasses.field(
        default_factory=lambda: DictionaryRetriever(mapping={})
    )
    pattern: str = ""
    reason: str = "the fake is down"

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        found = self.inner.search(queries, k)
        return [
            RetrievalFailure(reason=self.reason) if self.pattern in query else documents
            for query, documents in zip(queries, found, strict=True)
        ]


@dataclasses.dataclass(kw_only=True)
class ScriptedRow:
    """One slot of the scripted engine: everything it was fed, and what it sampled."""

    question: str
    sample: int
    ids: list[int]
    sampled: list[tuple[int, int, float]]  # (position, token, log-probability)
    to_write: list[int]
    turn: int = 0
    budget: int = 0
    live: bool = True
    turn_bytes: bytes = b""


class ScriptedEngine(Engine):
    """The public methods of `r1s_jax.engine.engine.Engine`, without a model.

    `script(question id, sample, turn)` is the text of a turn (str) or its very token ids (list).
    A text that ends without a stop string is followed by EOS. `rows[question id, sample]` keeps
    what the engine saw of an episode, for comparison with the trajectory. It has one slot a row.
    Misuse (extending or releasing a slot that decodes, an empty extension) fails at once.
    """

    def __init__(
        self,
        script: Callable[[str, int, int], str | list[int]],
        *,
        config: EngineConfig,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        weights_version: int = 0,
        chunk_seconds: float = 0.0,
    ):
        self.config, self.weights_version = config, weights_version
        self.rows: dict[tuple[str, int], ScriptedRow] = {}
        self.prefilled: list[tuple[int, ...]] = []
        self.chunks, self.was_reset, self._work = 0, False, Work()
        self._script, self._tokenizer, self._seconds = script, tokenizer, chunk_seconds
        self._stops = [s.encode() for s in stop_strings]
        self._names: dict[bytes, tuple[str, int]] = {}
        self._slots: list[ScriptedRow | None] = [None] * config.rows
        self._open = False

    def expect(
        self,
        names: Sequence[str],
        samples: int,
        *,
        seed: int = 0,
        phase: str = "train",
        step: int = 0,
        attempt: int = 0,
    ) -> None:
        """Tells the engine whose sampling keys it will see: that is how it knows an episode."""
        for name in names:
            for sample in range(samples):
                key = row_seed(seed, phase, step, name, attempt, sample)
                self._names[key.tobytes()] = (name, sample)

    def match_end(self, turn_bytes: bytes) -> tuple[int, int] | None:
        found = [(turn_bytes.find(s), i, s) for i, s in enumerate(self._stops)]
        ends = [(at + len(s), i) for at, i, s in found if at >= 0]
        return min(ends)[::-1] if ends else None

    def prefill(self, tokens: Sequence[int]) -> int | None:
        assert len(tokens) <= self.config.longest_prompt
        if self._open or None not in self._slots:
            return None
        self._open = True
        self.prefilled.append(tuple(tokens))
        return len(self.prefilled) - 1

    def insert(self, prompt: int, *, seed: np.ndarray, budget: int) -> int | None:
        if None not in self._slots:
            return None
        name, sample = self._names[seed.tobytes()]
        assert (name, sample) not in self.rows, f"{name!r}, sample {sample} is played twice"
        row = ScriptedRow(
            question=name, sample=sample, ids=list(self.prefilled[prompt]), sampled=[], to_write=[]
        )
        slot = self._slots.index(None)
        self.rows[name, sample] = self._slots[slot] = row
        self._begin(row, budget)
        return slot

    def drop(self, prompt: int) -> None:
        assert self._open and prompt == len(self.prefilled) - 1
        self._open = False

    def decode_chunk(
        self, sampling: SamplingConfig, *, busy: bool = True, searching: bool = False
    ) -> Step:
        if not busy:
            return Step(written=(), steps=0, extended=0, busy=False, searching=searching)
        written = [self._write(i, row) for i, row in enumerate(self._slots) if row and row.live]
        self.chunks += bool(written)
        time.sleep(self._seconds)
        self._work.sampled_tokens += sum(len(w.tokens) for w in written)
        steps = self.config.chunk if written else 0
        self._work.row_steps += steps * self.config.rows
        return Step(written=tuple(written), steps=steps, extended=0, busy=True, searching=searching)

    def extend(self, slot: int, tokens: Sequence[int], *, budget: int) -> None:
        row = self._slots[slot]
        assert row is not None and not row.live, f"slot {slot} is not parked"
        assert len(tokens) > 0 and budget > 0
        row.ids += tokens
        row.turn += 1
        self._begin(row, budget)

    def release(self, slot: int) -> None:
        row = self._slots[slot]
        assert row is not None and not row.live, f"slot {slot} is not parked"
        self._slots[slot] = None

    def reset(self) -> None:
        self.was_reset = True

    def _begin(self, row: ScriptedRow, budget: int) -> None:
        text = self._script(row.question, row.sample, row.turn)
        ids = self._tokenizer.encode(text) if isinstance(text, str) else list(text)
        row.to_write = [*ids, self._tokenizer.eos_ids[0]]
        row.budget, row.live, row.turn_bytes = budget, True, b""
        assert len(row.ids) + budget <= self.config.context

    def _write(self, slot: int, row: ScriptedRow) -> Written:
        tokens, logprobs, stop = [], [], Stop.RUNNING
        while row.live and len(tokens) < self.config.chunk:
            token = row.to_write.pop(0)
            tokens.append(token)
            logprobs.append(-(1 + (31 * len(row.ids) + 7 * row.sample) % 97) / 64)
            row.sampled.append((len(row.ids), token, logprobs[-1]))
            row.ids.append(token)
            row.turn_bytes += self._tokenizer.token_bytes[token]
            row.budget -= 1
            if any(s in row.turn_bytes for s in self._stops):
                stop = Stop.STRING
            elif token in self._tokenizer.eos_ids:
                stop = Stop.EOS
            elif row.budget == 0:
                stop = Stop.BUDGET
            row.live = stop == Stop.RUNNING
        return Written(
            slot=slot,
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            drawn_logprobs=np.array(logprobs, np.float32) / 2,
            stop=stop,
        )
