"""Plays episodes to their end: the one place where engine, episodes and retriever meet.

Between two chunks the host reads what was written, hands queries to the search pool and documents
back to the rows that wait for them, and gives free slots to the next episodes. Nobody waits for
anybody: a row whose query is out leaves the batch, the others decode on. In which order things
happen cannot change any episode: a row's tokens depend on its own ids and key alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import jax
import numpy as np

from r1s_jax.engine.engine import Engine, PromptRef
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.rollout.episode import Need
from r1s_jax.types import Document, RetrievalFailure

# With several hosts, the longest time in seconds that one waits for its own queries only.
_HOST_WAIT = 0.02


class Playable(Protocol):
    """What can be played: `rollout.episode.Episode` is one.

    need: what it waits for. query, documents: what it asks for, and how many passages at most.
    budget: tokens that its next turn may have.
    """

    need: Need
    query: str

    @property
    def documents(self) -> int: ...

    @property
    def budget(self) -> int: ...

    def write(
        self,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        drawn_logprobs: np.ndarray,
        stop: Stop,
    ) -> None: ...

    def observe(self, outcome: tuple[Document, ...] | RetrievalFailure) -> list[int]: ...


P = TypeVar("P", bound=Playable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Generic[P]):
    """The episodes of one prompt, each with its sampling key."""

    prompt_ids: Sequence[int]
    episodes: Sequence[tuple[P, np.ndarray]]


@dataclasses.dataclass(kw_only=True)
class Spent:
    """Where the time of a play went, in seconds, and why the first failed search failed.

    retrieval: while at least one query was out, a host's or another's, in whole chunks.
    retrieval_wait: the part of it in which no row could decode, embedding on the device included.
    """

    seconds: float = 0.0
    retrieval: float = 0.0
    retrieval_wait: float = 0.0
    failure: str = ""


def play(
    engine: Engine,
    samples: Sequence[Samples[P]],
    pool: SearchPool,
    sampling: SamplingConfig,
    watch: Callable[[P], None] | None = None,
) -> Spent:
    """Plays all episodes of this host; returns when no host has one left.

    `watch` is called with an episode whenever it has got new text. After an exception the engine
    has forgotten its episodes.
    """
    try:
        return _Play(engine, samples, pool, sampling, watch).run()
    except BaseException:
        engine.reset()
        raise


class _Play(Generic[P]):
    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Samples[P]],
        pool: SearchPool,
        sampling: SamplingConfig,
        watch: Callable[[P], None] | None,
    ):
        self.engine, self.pool, self.sampling, self.watch = engine, pool, sampling, watch
        self.waiting = deque(samples)
        self.opened: list[tuple[PromptRef, deque[tuple[P, np.ndarray]]]] = []
        self.playing: dict[int, P] = {}
        self.spent = Spent()

    def run(self) -> Spent:
        started = before = time.perf_counter()
        while True:
            self.admit()
            step = self.engine.decode_chunk(
                self.sampling,
                busy=bool(self.waiting or self.opened or self.playing),
                searching=self.pool.pending > 0,
            )
            if not step.busy:
                break
            for written in step.written:
                episode = self.playing[written.slot]
                episode.write(
                    written.tokens, written.logprobs, written.drawn_logprobs, written.stop
                )
                self.go_on(written.slot)
            out, asking = step.searching or self.pool.pending > 0, time.perf_counter()
            self.pool.step()
            if not (step.steps or step.extended):
                self.pause(step.searching)
            waited = time.perf_counter() - asking
            for slot, outcome in self.pool.finished():
                self.answer(slot, outcome)
            now = time.perf_counter()
            if out:
                self.spent.retrieval_wait += waited
                self.spent.retrieval += now - before
            before = now
        self.spent.seconds = time.perf_counter() - started
        return self.spent

    def admit(self) -> None:
        """Gives free slots to waiting episodes; a prompt is prefilled once for its samples."""
        while True:
            for ref, left in self.opened:
                while left:
                    episode, seed = left[0]
                    slot = self.engine.insert(ref, seed=seed, budget=episode.budget)
                    if slot is None:
                        break
                    self.playing[slot] = episode
                    left.popleft()
                if not left:
                    self.engine.drop(ref)
            self.opened = [(ref, left) for ref, left in self.opened if left]
            ref = self.engine.prefill(self.waiting[0].prompt_ids) if self.waiting else None
            if ref is None:
                return
            self.opened.append((ref, deque(self.waiting.popleft().episodes)))

    def answer(self, slot: int, outcome: tuple[Document, ...] | RetrievalFailure) -> None:
        """Hands a query's outcome to its episode, and its documents to the row."""
        if isinstance(outcome, RetrievalFailure):
            self.spent.failure = self.spent.failure or outcome.reason
        episode = self.playing[slot]
        tokens = episode.observe(outcome)
        if tokens:
            self.engine.extend(slot, tokens, budget=episode.budget)
        self.go_on(slot)

    def go_on(self, slot: int) -> None:
        """Looks at what an episode needs now."""
        episode = self.playing[slot]
        if self.watch:
            self.watch(episode)
        if episode.need == Need.DOCUMENTS:
            self.pool.submit(slot, episode.query, episode.documents)
        elif episode.need == Need.NOTHING:
            del self.playing[slot]
            self.engine.release(slot)

    def pause(self, searching: bool) -> None:
        """Nothing ran anywhere: waits for a search, this host's or another's."""
        if not searching:
            raise RuntimeError("no episode can go on, and none waits for a search")
        if jax.process_count() == 1:
            self.pool.wait(None)
        elif self.pool.pending:
            self.pool.wait(_HOST_WAIT)
