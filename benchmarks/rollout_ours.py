"""Our side of benchmarks/rollout.py: scripted episodes on the real engine and its loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rollout_work import Script, ScriptedRetriever

from r1s_jax.engine.engine import Engine, Work
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.decoder import DecoderConfig, Params
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.rollout.episode import Need
from r1s_jax.rollout.play import Samples, play
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import Document, RetrievalFailure

SAMPLING = SamplingConfig()


class ScriptedEpisode:
    """Plays a script: every turn samples so many tokens, then asks its query.

    With a tokenizer it does an episode's work on texts too, for the time it takes.
    """

    def __init__(self, script: Script, tokenizer: Tokenizer | None):
        self.need, self.query, self.documents = Need.TOKENS, "", 0
        self._script, self._turn, self._tokenizer = script, 0, tokenizer
        self._written: list[int] = []
        self.sampled = 0

    @property
    def budget(self) -> int:
        turns = self._script.turns
        last = self._turn == len(turns)
        return self._script.answer_length if last else turns[self._turn].length

    def write(
        self,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        drawn_logprobs: np.ndarray,
        stop: Stop,
    ) -> None:
        self.sampled += len(tokens)
        self._written += tokens.tolist()
        if stop == Stop.RUNNING:
            return
        if self._tokenizer:
            self._tokenizer.decode(self._written)
        self._written.clear()
        if self._turn == len(self._script.turns):
            self.need = Need.NOTHING
            return
        turn = self._script.turns[self._turn]
        self.need, self.query, self.documents = Need.DOCUMENTS, turn.query, len(turn.documents)

    def observe(self, outcome: tuple[Document, ...] | RetrievalFailure) -> list[int]:
        turn = self._script.turns[self._turn]
        assert outcome == turn.documents, outcome
        self._turn, self.need = self._turn + 1, Need.TOKENS
        ids = list(turn.observation_ids)
        if self._tokenizer:
            assert self._tokenizer.encode(turn.observation) == ids
        return ids


def make_engine(model: DecoderConfig, params: Params, config: EngineConfig) -> Engine:
    """An engine on one device that nothing stops but the budget, every program compiled."""
    engine = Engine(
        model,
        config,
        mesh=make_mesh(MeshConfig()),
        token_bytes=[b""] * model.vocab_size,
        stop_strings=(),
        eos_ids=(),
    )
    engine.set_weights(params, 0)
    engine.warm_up([SAMPLING])
    return engine


def run_scripts(
    engine: Engine,
    scripts: Sequence[Script],
    *,
    tokenizer: Tokenizer | None = None,
    retrieval_seconds: float = 0.0,
) -> dict[str, Any]:
    """Plays all scripts once; samples of one question share their prompt.

    `tokenizer`: of the scripts' texts; none where nothing is read or written as text.
    """
    by_prompt: dict[tuple[int, ...], list[Script]] = {}
    for script in scripts:
        by_prompt.setdefault(script.prompt_ids, []).append(script)
    samples, episodes = [], []
    for ids, group in by_prompt.items():
        pairs = [
            (
                ScriptedEpisode(s, tokenizer),
                row_seed(0, "bench", 0, s.question_id, 0, s.sample),
            )
            for s in group
        ]
        episodes += [episode for episode, _ in pairs]
        samples.append(Samples(prompt_ids=ids, episodes=pairs))
    engine.take_work()
    watching = Watch(engine, len(scripts))
    retriever = ScriptedRetriever(scripts, delay_seconds=retrieval_seconds)
    with SearchPool(retriever) as pool:
        spent = play(engine, samples, pool, SAMPLING, watching)
    work = engine.work
    assert all(e.need == Need.NOTHING for e in episodes)
    assert sum(e.sampled for e in episodes) == sum(s.sampled for s in scripts)
    return {
        "seconds": spent.seconds,
        "retrieval_wait_seconds": spent.retrieval_wait,
        "episodes": len(scripts),
        "tokens": work.sampled_tokens,
        "row_steps": work.row_steps,
        "prefilled": work.extended_tokens,
        "prefilled_padded": work.extended_places,
        "context": sum(s.context for s in scripts),
        **watching.figures(),
    }


@dataclasses.dataclass
class Watch:
    """Notes what was done when the last episode had been started: from there on rows run dry."""

    engine: Engine
    count: int
    started: dict[int, None] = dataclasses.field(default_factory=dict)
    full: Work | None = None

    def __call__(self, episode: ScriptedEpisode) -> None:
        self.started[id(episode)] = None
        if self.full is None and len(self.started) == self.count:
            self.full = self.engine.work

    def figures(self) -> dict[str, Any]:
        assert self.full is not None
        work, full = self.engine.work, self.full
        return {
            "full_tokens": full.sampled_tokens,
            "full_row_steps": full.row_steps,
            "drain_tokens": work.sampled_tokens - full.sampled_tokens,
            "drain_row_steps": work.row_steps - full.row_steps,
        }
