"""Faults of the infrastructure: left out, counted, and every batch finishes."""

import dataclasses
import random
import time

import pytest

from r1s_jax.types import Document, RetrievalFailure, StopReason
from tests import tiny
from tests.fakes import FailingRetriever
from tests.scripted import (
    ANSWER,
    BERLIN,
    FRANCE,
    PARIS,
    RETRIEVER,
    TOKENIZER,
    ask,
    check,
    only,
    run,
    scripted,
)


class Raising:
    def search(self, queries, k):
        raise ConnectionError("no route")


@dataclasses.dataclass
class Saying:
    """Returns what `answer(queries)` makes."""

    answer: object

    def search(self, queries, k):
        return self.answer(queries)


@pytest.mark.parametrize(
    "retriever",
    [
        FailingRetriever(),
        Raising(),
        Saying(lambda queries: []),
        Saying(lambda queries: [(PARIS,)] * (len(queries) + 1)),
        Saying(lambda queries: None),
        Saying(lambda queries: [None] * len(queries)),
        Saying(lambda queries: [("text",)] * len(queries)),
        Saying(lambda queries: [PARIS] * len(queries)),
        Saying(lambda queries: [iter([PARIS])] * len(queries)),
    ],
    ids=["fails", "raises", "none", "surplus", "None", "of None", "of str", "flat", "iterators"],
)
def test_infrastructure_failures(retriever):
    """Invariant 8: left out and counted, never an empty document, never a crash.

    Bug: a retriever that answered None, or None for a query, ended the whole rollout.
    """
    engine = scripted(
        lambda name, sample, turn: ask("France") if sample % 2 else ANSWER,
        names=("p", "q"),
        samples=4,
    )
    result = run(engine, names=("p", "q"), samples=4, retriever=retriever, min_survivors=2)
    assert (result.failed, result.dropped_groups) == (4, 0)
    for group in result.groups:
        assert [t.sample for t in group.trajectories] == [0, 2]
        assert all(t.stop_reason == StopReason.ANSWER for t in group.trajectories)
    assert all(row.turn == 0 for row in engine.rows.values())  # nothing was fed, empty or not


def test_documents_in_any_list_are_taken():
    """A list of lists will do, as an HTTP client makes it; a tuple of answers too."""
    for answer in ([[PARIS]], ((PARIS,),), ([PARIS],)):
        engine = scripted([ask("x"), ANSWER])
        retriever = Saying(lambda queries, answer=answer: answer)
        t = only(run(engine, retriever=retriever))
        assert t.searches[0].documents == (PARIS,)


def test_too_many_documents_are_cut():
    """A retriever that ignores k cannot lengthen the episode."""
    engine = scripted([ask("x"), ANSWER])
    t = only(run(engine, retriever=Saying(lambda queries: [(FRANCE, PARIS, BERLIN)])))
    assert t.searches[0].documents == (FRANCE, PARIS) and "Berlin" not in t.response


def test_one_failure_among_many():
    """Only the failed query's episode is lost; its group keeps the others, in sample order."""
    engine = scripted(
        lambda name, sample, turn: ANSWER if turn else ask("bad" if sample == 1 else "Paris"),
        samples=4,
    )
    result = run(engine, samples=4, retriever=FailingRetriever(inner=RETRIEVER, pattern="bad"))
    (group,) = result.groups
    assert [t.sample for t in group.trajectories] == [0, 2, 3] and result.failed == 1
    for t in group.trajectories:
        check(engine, t)
        assert t.searches[0].documents == (PARIS,)


@pytest.mark.parametrize("min_survivors, kept, dropped", [(1, "abc", 1), (2, "ab", 2), (4, "a", 3)])
def test_groups_left_with_too_few_are_dropped(min_survivors, kept, dropped):
    """Invariant 8: with 4, 3, 1 and 0 survivors; dropped and counted, the rest in order."""
    lost = {"a": 0, "b": 1, "c": 3, "d": 4}
    engine = scripted(
        lambda name, sample, turn: ask("x") if sample < lost[name] else ANSWER,
        names="abcd",
        samples=4,
    )
    result = run(engine, names="abcd", samples=4, retriever=Raising(), min_survivors=min_survivors)
    assert "".join(g.question.id for g in result.groups) == kept
    assert (result.failed, result.dropped_groups) == (8, dropped)


def test_failure_in_a_later_turn():
    """What was read before does not save the episode; its slot takes the next one."""
    engine = scripted([ask("Paris"), ask("bad")], samples=7)
    result = run(engine, samples=7, retriever=FailingRetriever(inner=RETRIEVER, pattern="bad"))
    assert (result.failed, result.dropped_groups, result.groups) == (7, 1, ())
    assert result.sampled_tokens == sum(len(r.sampled) for r in engine.rows.values())


class Faulty:
    """A tenth of the queries have a fault each, always the same for a query, at any time.

    Some fail, some raise or bring garbage, some lose an answer of their batch: asked once more on
    their own, the others of that batch come through. Some hang, and take their batch with them.
    """

    def __init__(self):
        self.faulty, self.hung = set(), set()

    def search(self, queries, k):
        faults = [self.fault(query) for query in queries]
        if "hangs" in faults:
            self.hung |= set(queries)
            time.sleep(1.0)
        if "raises" in faults:
            raise TimeoutError("slow")
        if "short" in faults:
            return RETRIEVER.search(queries[1:], k)
        outcomes = {"fails": RetrievalFailure(reason="x"), "garbage": ["text", 3]}
        documents = (FRANCE, PARIS, BERLIN)
        fine = [documents[: random.Random(query).randint(0, 3)] for query in queries]
        return [outcomes.get(fault, d) for fault, d in zip(faults, fine, strict=True)]

    def fault(self, query):
        rng = random.Random(f"fault of {query}")
        if rng.random() > 0.1:
            return ""
        self.faulty.add(query)
        kinds = ["fails", "raises", "garbage", "short"]
        return "hangs" if rng.random() < 0.02 else rng.choice(kinds)


def soak_turn(name, sample, turn):
    rng = random.Random(f"{name} {sample} {turn}")
    noise = [rng.randrange(tiny.MODEL.vocab_size - 25) for _ in range(rng.randrange(12))]
    about = f"{name} {sample} {turn}"
    ends = [*[ask(about)] * 3, ANSWER, ANSWER, "", "z" * 70, "<|end_of_query|>"]
    ends += ["<|begin_of_query|> x </answer>", "x<answer>y</answer>\n\n"]
    return [*noise, *TOKENIZER.encode(rng.choice(ends))]


def test_soak():
    """2,000 episodes, 10 % of their searches faulty: all accounted for, every trajectory whole."""
    names, samples = [f"q{i}" for i in range(400)], 5
    engine = scripted(soak_turn, names=names, samples=samples, rows=64, chunk=6, context=240)
    retriever = Faulty()
    result = run(
        engine,
        names=names,
        samples=samples,
        retriever=retriever,
        min_survivors=2,
        search_window=0.001,
        search_timeout=0.3,
    )
    assert len(engine.rows) == 2000 and len(set(engine.prefilled)) == len(engine.prefilled) == 400
    assert result.failed == len(retriever.faulty | retriever.hung) > len(retriever.faulty) > 60
    assert result.failure
    survivors = [t for g in result.groups for t in g.trajectories]
    assert all(len(g.trajectories) >= 2 for g in result.groups)
    assert len(result.groups) + result.dropped_groups == 400
    lone = 2000 - result.failed - len(survivors)
    assert 0 <= lone <= result.dropped_groups
    assert result.sampled_tokens == sum(len(r.sampled) for r in engine.rows.values())
    for t in survivors:
        check(engine, t)
        assert not any(s.query in retriever.faulty for s in t.searches)
    reasons = {t.stop_reason for t in survivors}
    assert reasons == set(StopReason) - {StopReason.RETRIEVAL_FAILED}


class Hostile:
    """What no retriever should bring: a megabyte of text, every tag, no document, too many."""

    HUGE = Document(id="h", title="Huge", text="word " * 200_000)
    TAGS = Document(id="t", title="".join(TOKENIZER.control_strings), text="<|end_of_query|>" * 3)

    def __init__(self):
        self.longest = 0

    def search(self, queries, k):
        self.longest = max(self.longest, *map(len, queries))
        kinds = {"huge": [self.HUGE], "tags": [self.TAGS], "none": [], "many": [PARIS] * 5000}
        return [next((v for n, v in kinds.items() if n in q), [FRANCE]) for q in queries]


@pytest.mark.parametrize(
    "query, reason, documents",
    [
        ("huge", StopReason.CONTEXT_FULL, 1),
        ("tags", StopReason.ANSWER, 1),
        ("none", StopReason.ANSWER, 0),
        ("many", StopReason.ANSWER, 2),
        ("x" * 10_000, StopReason.ANSWER, 1),
    ],
    ids=["a megabyte", "tags", "none", "5,000 documents", "a query of 10,000 characters"],
)
def test_hostile_answers(query, reason, documents):
    """Each has its outcome, none is an error; what does not fit ends the episode as it stands."""
    engine = scripted([ask(query), ANSWER], context=11_000)
    retriever = Hostile()
    result = run(engine, retriever=retriever, max_new_tokens=10_500)
    t = only(result)
    check(engine, t)
    assert (t.stop_reason, len(t.searches[0].documents)) == (reason, documents)
    assert t.searches[0].query == query and retriever.longest == len(query)
    assert result.failed == 0


def test_an_error_of_our_own_leaves_a_clean_engine():
    """Whatever ends a rollout, the engine has forgotten its episodes: the next one may start."""
    engine = scripted([ask("Paris"), ANSWER])

    def watch(episode):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine, watch=watch)
    assert engine.was_reset
