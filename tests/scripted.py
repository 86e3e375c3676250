"""A scripted policy and a dictionary retriever around the real loop."""

import dataclasses

import numpy as np

from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import EngineConfig
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.rollout.loop import Call, Rollout, RolloutConfig
from r1s_jax.types import (
    Document,
    TokenSource,
)
from tests import tiny
from tests.fakes import DictionaryRetriever, ScriptedEngine

TOKENIZER = tiny.tokenizer()
ENGINE = EngineConfig(rows=3, chunk=5, context=400, extend_tokens=16)
CALL = Call(seed=0, phase="train", step=0)
ANSWER = "</think><answer>x</answer>"
FRANCE = Document(id="1", title="France", text="Its capital is Paris.")
PARIS = Document(id="2", title="Paris", text="A city.")
BERLIN = Document(id="3", title="Berlin", text="Another.")
RETRIEVER = DictionaryRetriever(mapping={"France": (FRANCE, BERLIN), "Paris": (PARIS,)})


def ask(query):
    return f"hm <|begin_of_query|> {query} <|end_of_query|>"


def scripted(script, *, names=("q",), samples=1, chunk_seconds=0.0, **engine):
    """`script`: a function, or the turns of every episode."""
    if not callable(script):
        turns = list(script)
        script = lambda name, sample, turn: turns[turn]  # noqa: E731
    played = ScriptedEngine(
        script,
        config=dataclasses.replace(ENGINE, **engine),
        tokenizer=TOKENIZER,
        stop_strings=STOP_STRINGS,
        weights_version=9,
        chunk_seconds=chunk_seconds,
    )
    played.expect(names, samples)
    return played


def run(
    engine, *, names=("q",), samples=1, retriever=RETRIEVER, min_survivors=1, watch=None, **cfg
):
    usual = {"documents": 2, "max_searches": 2, "max_new_tokens": 60, "search_window": 0.0}
    config = RolloutConfig(**usual | cfg)
    rollout = Rollout(engine, TOKENIZER, tiny.PROMPT, retriever, config)
    return rollout.run(
        [tiny.question(n) for n in names],
        samples=samples,
        sampling=SamplingConfig(),
        call=CALL,
        min_survivors=min_survivors,
        watch=watch,
    )


def only(result):
    """The one trajectory of a result."""
    (group,) = result.groups
    (trajectory,) = group.trajectories
    return trajectory


def check(engine, trajectory):
    """Invariants 1 and 2 of one trajectory, against what the engine saw."""
    row = engine.rows[trajectory.question.id, trajectory.sample]
    t = trajectory
    assert t.token_ids_T.tolist() == row.ids[: len(t.token_ids_T)]
    assert len(t.token_ids_T) == len(t.sources_T) == len(t.logprobs_T) <= engine.config.context
    at = [position for position, _, _ in row.sampled]
    assert np.flatnonzero(t.sources_T == TokenSource.SAMPLED).tolist() == at
    logprobs = np.zeros(len(t.token_ids_T), np.float32)
    logprobs[at] = [x for _, _, x in row.sampled]
    np.testing.assert_array_equal(t.logprobs_T, logprobs)
    np.testing.assert_array_equal(t.drawn_logprobs_T, logprobs / 2)
    documents = t.token_ids_T[t.sources_T == TokenSource.OBSERVATION].tolist()
    blocks = [s.text for s in t.segments if s.source == TokenSource.OBSERVATION]
    assert documents == [i for text in blocks for i in TOKENIZER.encode(text)]
    assert (np.diff((t.sources_T == TokenSource.PROMPT).astype(int)) <= 0).all()
    assert t.weights_version == 9
