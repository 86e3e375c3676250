"""Questions in, groups of trajectories out: what `play` plays, prepared and collected.

With several hosts each one plays the questions whose turn is its own (all samples of a question
stay together), and at the end every host has all groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax

from r1s_jax.engine.engine import Engine, Work
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.protocol.prompts import Prompt
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.retrieval.interface import Retriever
from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.rollout.episode import Episode, EpisodeLimits
from r1s_jax.rollout.hosts import from_all_hosts
from r1s_jax.rollout.play import Samples, Spent, play
from r1s_jax.types import Group, Question, StopReason, Trajectory, UserError, require_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are played."""

    documents: int = 3  # passages per search
    max_searches: int = 8
    max_new_tokens: int = 512  # per turn
    opening: str = ""  # text every response is made to begin with (a control: forced search)
    answered_searches: int | None = None  # later ones bring nothing (a control)
    search_workers: int = 4  # searches that run at a time
    search_batch: int = 64  # queries of one search, at most
    search_window: float = 0.005  # seconds that a query waits for others
    search_timeout: float = 60.0  # seconds after which a search counts as failed

    def __post_init__(self) -> None:
        least = {
            "documents": 0,
            "max_searches": 0,
            "max_new_tokens": 1,
            "search_workers": 1,
            "search_batch": 1,
            "search_window": 0.0,
        }
        require_least("rollout", self, least)
        if not 0.0 < self.search_timeout < math.inf:
            raise UserError(
                f"rollout.search_timeout = {self.search_timeout}, must be more than 0 and finite"
            )
        if self.search_window == math.inf:
            raise UserError("rollout.search_window = inf, must be finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What keys a rollout's randomness besides question and sample."""

    seed: int
    phase: str  # train | eval
    step: int
    attempt: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """Groups in the order of the questions, samples in order; failed episodes are left out."""

    groups: tuple[Group, ...]
    failed: int  # episodes lost to the retriever
    failure: str  # why the first of them was
    dropped_groups: int  # groups left with fewer than `min_survivors` samples
    sampled_tokens: int
    prefilled_tokens: int  # of prompts and documents, each of which is written once
    seconds: float
    retrieval_seconds: float  # while at least one query was out
    retrieval_wait_seconds: float  # while no row could decode because of that
    row_steps: int  # rows times decode steps, empty rows counted

    @property
    def decode_utilization(self) -> float:
        """Sampled tokens per row and step."""
        return self.sampled_tokens / max(1, self.row_steps)


class Rollout:
    """Plays episodes on an engine. One rollout at a time; it leaves the engine drained."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Prompt,
        retriever: Retriever,
        config: RolloutConfig,
    ):
        self._engine, self._tokenizer, self._prompt = engine, tokenizer, prompt
        self._retriever, self._config = retriever, config
        self._limits = EpisodeLimits(
            documents=config.documents,
            max_searches=config.max_searches,
            answered_searches=config.answered_searches,
            max_new_tokens=config.max_new_tokens,
            context=engine.config.context,
        )
        from_all_hosts(None)  # compiles what `run` ends with

    def run(
        self,
        questions: Sequence[Question],
        *,
        samples: int,
        sampling: SamplingConfig,
        call: Call,
        min_survivors: int = 1,
        watch: Callable[[Episode], None] | None = None,
    ) -> RolloutResult:
        """Plays `samples` episodes of every question.

        `watch` is called with an episode whenever it has got new text. Raises UserError, before
        anything runs, for a question whose prompt does not fit.
        """
        everything = self._samples(questions, samples, call)
        mine = everything[jax.process_index() :: jax.process_count()]
        self._engine.take_work()
        with SearchPool(
            self._retriever,
            workers=self._config.search_workers,
            batch=self._config.search_batch,
            window=self._config.search_window,
            timeout=self._config.search_timeout,
        ) as pool:
            spent = play(self._engine, mine, pool, sampling, watch)
        played = [[episode.trajectory() for episode, _ in s.episodes] for s in mine]
        hosts = from_all_hosts((played, spent, self._engine.take_work()))
        return _collect(questions, hosts, min_survivors=min_survivors)

    def _samples(
        self, questions: Sequence[Question], samples: int, call: Call
    ) -> list[Samples[Episode]]:
        """All episodes in (question, sample) order, each with its prompt and key."""
        opening_ids = self._tokenizer.encode(self._config.opening)
        everything = []
        for question in questions:
            ids = [*self._prompt.prompt_ids(self._tokenizer, question.text), *opening_ids]
            if len(ids) > self._engine.config.longest_prompt:
                raise UserError(
                    f"question {question.id!r}: its prompt has {len(ids)} tokens, engine.context = "
                    f"{self._engine.config.context} has no room for it"
                )
            episodes = []
            for sample in range(samples):
                episode = Episode(
                    question,
                    attempt=call.attempt,
                    sample=sample,
                    prompt_ids=ids,
                    tokenizer=self._tokenizer,
                    limits=self._limits,
                    match_end=self._engine.match_end,
                    weights_version=self._engine.weights_version,
                    opening=self._config.opening,
                )
                key = (call.seed, call.phase, call.step, question.id, call.attempt, sample)
                episodes.append((episode, row_seed(*key)))
            everything.append(Samples(prompt_ids=ids, episodes=episodes))
        return everything


def _collect(
    questions: Sequence[Question],
    hosts: Sequence[tuple[list[list[Trajectory]], Spent, Work]],
    *,
    min_survivors: int,
) -> RolloutResult:
    groups, dropped, failed = [], 0, 0
    trajectories, spent, work = zip(*hosts, strict=True)
    for index, question in enumerate(questions):
        played = trajectories[index % len(hosts)][index // len(hosts)]
        alive = [t for t in played if t.stop_reason != StopReason.RETRIEVAL_FAILED]
        failed += len(played) - len(alive)
        if len(alive) >= min_survivors:
            groups.append(Group(question=question, trajectories=tuple(alive)))
        else:
            dropped += 1
    sampled = sum(w.sampled_tokens for w in work)
    return RolloutResult(
        groups=tuple(groups),
        failed=failed,
        failure=next((s.failure for s in spent if s.failure), ""),
        dropped_groups=dropped,
        sampled_tokens=sampled,
        prefilled_tokens=sum(w.extended_tokens for w in work),
        seconds=max(s.seconds for s in spent),
        retrieval_seconds=max(s.retrieval for s in spent),
        retrieval_wait_seconds=max(s.retrieval_wait for s in spent),
        row_steps=sum(w.row_steps for w in work),
    )
