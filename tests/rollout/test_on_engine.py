"""Whole rollouts of the real engine: what a trajectory may depend on, and what is computed once."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.rollout.loop import Call, Rollout, RolloutConfig
from r1s_jax.run.compiles import CompileCounter
from r1s_jax.sharding import MeshConfig
from r1s_jax.types import StopReason, TokenSource
from tests import tiny
from tests.fakes import DictionaryRetriever
from tests.turns import assert_same_trajectories

SAMPLES = 4
CONFIG = RolloutConfig(documents=2, max_searches=2, max_new_tokens=48)
CALL = Call(seed=0, phase="train", step=3)
RETRIEVER = DictionaryRetriever(mapping={}, default=tiny.DOCUMENTS)


def play(
    engine, questions=tiny.QUESTIONS, *, retriever=RETRIEVER, sampling=tiny.SAMPLED, call=CALL
):
    """{(question id, sample): trajectory}."""
    rollout = Rollout(engine, tiny.tokenizer(), tiny.PROMPT, retriever, CONFIG)
    result = rollout.run(questions, samples=SAMPLES, sampling=sampling, call=call)
    assert [g.question for g in result.groups] == list(questions)
    return {(t.question.id, t.sample): t for g in result.groups for t in g.trajectories}


@functools.cache
def base():
    """The rollout that the others are compared with: 20 episodes, four at a time."""
    return play(tiny.engine())


def assert_same(got, expected=None):
    """Bit for bit: ids, sources, log-probs, searches and stop reason."""
    expected = expected or base()
    assert_same_trajectories(got, expected)


@functools.cache
def scorer():
    return jax.jit(lambda params, tokens: token_logprobs(tiny.MODEL, params, tokens)[0])


def assert_teacher_forced(trajectories):
    """Invariant 3: the learner's log-prob of each sampled token is the sampler's, within 1e-5."""
    rows = list(trajectories.values())
    tokens = np.zeros((len(base()), tiny.CONFIG.context), np.int32)
    for row, t in enumerate(rows):
        tokens[row, : len(t.token_ids_T)] = t.token_ids_T
    learner = np.asarray(scorer()(tiny.params(), jax.numpy.asarray(tokens)))
    for row, t in enumerate(rows):
        sampled = t.sources_T == TokenSource.SAMPLED
        ours = learner[row, : len(sampled)]
        np.testing.assert_allclose(t.logprobs_T[sampled], ours[sampled], atol=1e-5, rtol=0)
        assert (t.logprobs_T[~sampled] == 0).all() and (t.logprobs_T[sampled] < 0).all()


def test_the_base_rollout_is_worth_comparing_with():
    """It searches, once and twice, answers, and ends in several ways."""
    searches = [len(t.searches) for t in base().values()]
    assert max(searches) == 2 and sum(searches) >= 8
    assert len({t.stop_reason for t in base().values()}) >= 5
    longest = max(np.diff(np.flatnonzero(t.sources_T != 2)).max() for t in base().values())
    assert longest > 2 * tiny.CONFIG.extend_tokens  # blocks of three pieces


def test_learner_agrees_with_sampler():
    """Invariant 3 on multi-turn episodes."""
    assert_teacher_forced(base())


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_admission_order_does_not_matter(order):
    """Invariant 7: other slots, other companions, other times: the same bits."""
    assert_same(play(tiny.engine(), [tiny.QUESTIONS[i] for i in order]))


def test_companions_do_not_matter():
    """Invariant 7: a question on its own gets what it got in company."""
    for question in tiny.QUESTIONS[1:3]:
        got = play(tiny.engine(), [question])
        assert len(got) == SAMPLES
        assert_same(got)


def test_a_shared_beginning_does_not_matter():
    """Invariant 7: whose pages a prompt begins with, its own or another's, changes no bit.

    Four questions begin with the same words, two full pages, which are written once.
    """
    start = "the same words at the beginning of every question, "
    questions = [
        tiny.question(f"s{i}", start + end) for i, end in enumerate(("", "a", "bcd", "e?"))
    ]
    together = play(tiny.engine(), questions)
    alone = {k: t for q in questions for k, t in play(tiny.engine(), [q]).items()}
    assert_same(together, alone)
    prompts = sum(len(tiny.PROMPT.prompt_ids(tiny.tokenizer(), q.text)) - 1 for q in questions)
    rollout = Rollout(tiny.engine(), tiny.tokenizer(), tiny.PROMPT, RETRIEVER, CONFIG)
    result = rollout.run(questions, samples=SAMPLES, sampling=tiny.SAMPLED, call=CALL)
    read = sum(int((t.sources_T == TokenSource.OBSERVATION).sum()) for t in together.values())
    assert len(tiny.tokenizer().encode(start)) // tiny.CONFIG.page == 2
    assert result.prefilled_tokens == read + prompts - 3 * 2 * tiny.CONFIG.page


@dataclasses.dataclass
class SlowRetriever:
    """Late by an irregular time."""

    calls: int = 0

    def search(self, queries, k):
        self.calls += 1
        time.sleep(0.003 * (self.calls % 3))
        return RETRIEVER.search(queries, k)


def test_retrieval_delay_does_not_matter():
    """Invariant 7: the same bits, whenever the documents come."""
    retriever = SlowRetriever()
    assert_same(play(tiny.engine(), retriever=retriever))
    assert retriever.calls > 3


def test_every_part_of_the_key_matters():
    """Another seed, phase, step or attempt draws other episodes, and the same key the same."""
    one = [tiny.QUESTIONS[0]]
    for change in ({"seed": 1}, {"phase": "eval"}, {"step": 4}, {"attempt": 1}):
        got = play(tiny.engine(), one, call=dataclasses.replace(CALL, **change))
        ids = [t.token_ids_T.tolist() for t in got.values()]
        assert not any(t.token_ids_T.tolist() in ids for t in base().values())
        assert all(t.attempt == change.get("attempt", 0) for t in got.values())
    assert len({t.token_ids_T.tobytes() for t in base().values()}) == len(base())


def test_nothing_is_computed_twice():
    """Invariant 5: a prompt is written once for its samples, a later turn feeds only its documents.

    All but the last token of a prompt is written; of a block, the last sampled token before it and
    all but its own last one. 20 episodes of 5 questions would else write their prompts 20 times.
    """
    rollout = Rollout(tiny.engine(), tiny.tokenizer(), tiny.PROMPT, RETRIEVER, CONFIG)
    result = rollout.run(tiny.QUESTIONS, samples=SAMPLES, sampling=tiny.SAMPLED, call=CALL)
    got = {(t.question.id, t.sample): t for g in result.groups for t in g.trajectories}
    read = sum(int((t.sources_T == TokenSource.OBSERVATION).sum()) for t in got.values())
    prompts = [tiny.PROMPT.prompt_ids(tiny.tokenizer(), q.text) for q in tiny.QUESTIONS]
    assert result.prefilled_tokens == read + sum(len(p) - 1 for p in prompts)
    assert read > 400
    assert_same(got)


@functools.cache
def other_engine():
    """An engine of other shapes, and what it compiled after its warm-up."""
    engine = tiny.new_engine(rows=3, chunk=5, page=8, extend_rows=1, extend_tokens=40)
    engine.warm_up([tiny.SAMPLED, tiny.BANNED])
    counter = CompileCounter()
    sampled = play(engine)
    engine.set_weights(tiny.params(), 7)
    greedy = play(engine, sampling=tiny.BANNED)
    counter.close()
    return counter.count, sampled, greedy


def test_waiting_for_a_search_is_measured():
    """One episode: while its query is out nothing else can run."""
    delay = 0.1

    class Late:
        def search(self, queries, k):
            time.sleep(delay)
            return RETRIEVER.search(queries, k)

    searches = {question: len(t.searches) for (question, i), t in base().items() if i == 0}
    asked = max(tiny.QUESTIONS, key=lambda q: searches[q.id])
    rollout = Rollout(tiny.engine(), tiny.tokenizer(), tiny.PROMPT, Late(), CONFIG)
    result = rollout.run([asked], samples=1, sampling=tiny.SAMPLED, call=CALL)
    waited = result.retrieval_wait_seconds
    assert 0 < delay * searches[asked.id] <= waited <= result.retrieval_seconds <= result.seconds


def test_nothing_compiles_after_warm_up():
    """Invariant 10: sampled and greedy-with-bans rollouts and new weights, no compilation."""
    assert other_engine()[0] == 0


def test_other_slot_counts_and_chunk_lengths():
    """Invariant 7: the keys stay, so but for a rare flip the episodes do; log-probs within 1e-5."""
    _, sampled, _ = other_engine()
    assert_teacher_forced(sampled)
    assert_nearly_same(sampled)


def assert_nearly_same(got):
    same = [np.array_equal(got[k].token_ids_T, t.token_ids_T) for k, t in base().items()]
    assert sum(same) >= len(same) - 1
    for key, equal in zip(base(), same, strict=True):
        if equal:
            np.testing.assert_allclose(
                got[key].logprobs_T, base()[key].logprobs_T, atol=1e-5, rtol=0
            )


def test_controls_ban_strings():
    """Greedy without the query tag: nobody searches, all samples of a question are one."""
    _, _, greedy = other_engine()
    for (name, _), t in greedy.items():
        assert not any(s in t.written for s in tiny.BANNED.banned)
        assert not t.searches and t.stop_reason != StopReason.EMPTY_QUERY
        np.testing.assert_array_equal(t.token_ids_T, greedy[name, 0].token_ids_T)
    assert_teacher_forced(greedy)


@pytest.mark.slow  # eight devices that talk at every step can starve each other on two cores
def test_a_mesh_plays_the_same_rollouts():
    """2x2x2 devices: the same keys, log-probs within 1e-5 (invariants 3 and 7 across meshes)."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    got = play(tiny.new_engine(mesh=mesh))
    assert_teacher_forced(got)
    assert_nearly_same(got)
