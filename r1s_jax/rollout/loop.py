"""The loop between engine, episodes and retriever: questions in, groups of trajectories out.

Between two decode chunks the host reads query spans, asks the retriever, and hands the documents
back to the parked rows, while finished rows' slots take the next episodes. The order in which
this happens cannot change any trajectory: a row's tokens depend on its own ids and key alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence

from r1s_jax.engine.engine import Admission, Engine, Extension, PromptRef
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.protocol.prompts import Prompt
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.retrieval.interface import Retriever
from r1s_jax.rollout.episode import Episode, EpisodeLimits, Need
from r1s_jax.types import (
    Document,
    Group,
    Question,
    RetrievalFailure,
    StopReason,
    Trajectory,
    UserError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are played."""

    documents: int = 3  # passages per search
    max_searches: int = 8
    max_new_tokens: int = 512  # per turn
    opening: str = ""  # text every response is made to begin with (a control: forced search)
    answered_searches: int | None = None  # later ones bring nothing (a control)


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
    seconds: float
    retrieval_seconds: float


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
            max_searches=config.max_searches,
            max_new_tokens=config.max_new_tokens,
            context=engine.config.context,
        )

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
        started = time.perf_counter()
        waiting = deque(self._episodes(questions, samples, call))
        episodes = [e for e, _ in waiting]
        prompts: dict[int, PromptRef] = {}
        playing: dict[int, Episode] = {}
        free = deque(range(self._engine.config.slots))
        retrieval_seconds, failure = 0.0, ""
        while waiting or playing:
            self._admit(waiting, prompts, free, playing, call)
            for slot, written in enumerate(self._engine.decode_chunk(sampling)):
                if len(written.tokens):
                    playing[slot].write(written.tokens, written.logprobs, written.stop)
                    if watch:
                        watch(playing[slot])
            asking = [s for s in sorted(playing) if playing[s].need == Need.DOCUMENTS]
            if asking:
                before = time.perf_counter()
                outcomes = self._retrieve([playing[s] for s in asking])
                retrieval_seconds += time.perf_counter() - before
                failed = [o.reason for o in outcomes if isinstance(o, RetrievalFailure)]
                failure = failure or next(iter(failed), "")
                self._answer([(s, playing[s]) for s in asking], outcomes)
            for slot in [s for s in sorted(playing) if playing[s].need == Need.NOTHING]:
                if watch:
                    watch(playing[slot])
                del playing[slot]
                free.append(slot)
        trajectories = [e.trajectory() for e in episodes]
        return _collect(
            questions,
            trajectories,
            samples=samples,
            min_survivors=min_survivors,
            failure=failure,
            seconds=time.perf_counter() - started,
            retrieval_seconds=retrieval_seconds,
        )

    def _episodes(
        self, questions: Sequence[Question], samples: int, call: Call
    ) -> list[tuple[Episode, list[int]]]:
        """All episodes in (question, sample) order, each with its prompt."""
        opening_ids = self._tokenizer.encode(self._config.opening)
        episodes = []
        for question in questions:
            ids = [*self._prompt.prompt_ids(self._tokenizer, question.text), *opening_ids]
            if len(ids) > self._engine.config.longest_prompt:
                raise UserError(
                    f"question {question.id!r}: its prompt has {len(ids)} tokens, engine.context = "
                    f"{self._engine.config.context} and prompt_buckets = "
                    f"{self._engine.config.prompt_buckets} have no room for it"
                )
            episodes += [
                (
                    Episode(
                        question,
                        attempt=call.attempt,
                        sample=sample,
                        prompt_ids=ids,
                        tokenizer=self._tokenizer,
                        limits=self._limits,
                        match_end=self._engine.match_end,
                        weights_version=self._engine.weights_version,
                        opening=self._config.opening,
                    ),
                    ids,
                )
                for sample in range(samples)
            ]
        return episodes

    def _admit(
        self,
        waiting: deque[tuple[Episode, list[int]]],
        prompts: dict[int, PromptRef],
        free: deque[int],
        playing: dict[int, Episode],
        call: Call,
    ) -> None:
        """Gives free slots to waiting episodes; a question's prompt is prefilled once."""
        admissions = []
        while free and waiting:
            episode, ids = waiting[0]
            if id(ids) not in prompts:
                upcoming: dict[int, list[int]] = {id(i): i for _, i in waiting}
                batch = list(upcoming.items())[: self._engine.config.prefill_rows]
                refs = self._engine.prefill([i for _, i in batch])
                prompts.update(zip((key for key, _ in batch), refs, strict=True))
            waiting.popleft()
            slot = free.popleft()
            playing[slot] = episode
            seed = row_seed(
                call.seed, call.phase, call.step, episode.question.id, call.attempt, episode.sample
            )
            admissions.append(
                Admission(slot=slot, prompt=prompts[id(ids)], seed=seed, budget=episode.budget)
            )
            if not waiting or waiting[0][1] is not ids:
                del prompts[id(ids)]
        if admissions:
            self._engine.insert(admissions)

    def _retrieve(self, asking: list[Episode]) -> list[tuple[Document, ...] | RetrievalFailure]:
        """One outcome per query, whatever the retriever does: its faults are not the policy's."""
        queries = [episode.query for episode in asking]
        try:
            outcomes = list(self._retriever.search(queries, self._config.documents))
        except Exception as e:
            return [RetrievalFailure(reason=f"{type(e).__name__}: {e}")] * len(queries)
        if len(outcomes) != len(queries):
            reason = f"{len(queries)} queries were sent, {len(outcomes)} answers came back"
            return [RetrievalFailure(reason=reason)] * len(queries)
        limit = self._config.answered_searches
        unanswered = [limit is not None and e.search_count >= limit for e in asking]
        return [
            _checked(o, 0 if u else self._config.documents)
            for o, u in zip(outcomes, unanswered, strict=True)
        ]

    def _answer(
        self,
        asking: list[tuple[int, Episode]],
        outcomes: list[tuple[Document, ...] | RetrievalFailure],
    ) -> None:
        extensions = []
        for (slot, episode), outcome in zip(asking, outcomes, strict=True):
            last = episode.last_token
            if tokens := episode.observe(outcome):
                extensions.append(
                    Extension(slot=slot, last=last, tokens=tokens, budget=episode.budget)
                )
        self._engine.extend(extensions)


def _checked(outcome: object, limit: int) -> tuple[Document, ...] | RetrievalFailure:
    """One answer of the retriever: its first `limit` documents, or a failure."""
    if isinstance(outcome, RetrievalFailure):
        return outcome
    if isinstance(outcome, list | tuple) and all(isinstance(d, Document) for d in outcome):
        return tuple(outcome[:limit])
    return RetrievalFailure(reason=f"the answer is no list of documents but {outcome!r:.80}")


def _collect(
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    *,
    samples: int,
    min_survivors: int,
    failure: str,
    seconds: float,
    retrieval_seconds: float,
) -> RolloutResult:
    groups, dropped, failed = [], 0, 0
    for index, question in enumerate(questions):
        played = trajectories[index * samples : (index + 1) * samples]
        alive = [t for t in played if t.stop_reason != StopReason.RETRIEVAL_FAILED]
        failed += len(played) - len(alive)
        if len(alive) >= min_survivors:
            groups.append(Group(question=question, trajectories=tuple(alive)))
        else:
            dropped += 1
    return RolloutResult(
        groups=tuple(groups),
        failed=failed,
        failure=failure,
        dropped_groups=dropped,
        sampled_tokens=sum(t.sampled_count for t in trajectories),
        seconds=seconds,
        retrieval_seconds=retrieval_seconds,
    )
