"""What a retriever can do wrong in a pool's threads: each fault is a failure with a reason."""

import re
import subprocess
import sys
import threading
import time

import pytest

from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.types import Document, RetrievalFailure
from tests.searches import LIMA, OSLO, ROMA, SOON, Recording, asked, document, drain, reasons


class Gate:
    """Queries that hold "hang" wait until the gate is opened; the others are answered."""

    def __init__(self):
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def search(self, queries, k):
        if any("hang" in q for q in queries):
            self.entered.release()
            self.opened.wait(SOON)
        return [(document(q),) for q in queries]


@pytest.fixture()
def gate():
    made = Gate()
    yield made
    made.opened.set()


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


def raising(error):
    def answer(queries, k):
        raise error

    return answer


@pytest.mark.parametrize(
    "answer, reason",
    [
        (raising(ConnectionError("no route")), "ConnectionError: no route"),
        (raising(SystemExit(3)), "SystemExit: 3"),
        (raising(Unspeakable()), "Unspeakable"),
        (raising(OSError("\ud800" + "x" * 10_000)), r"OSError: \\ud800xxx"),
        (lambda queries, k: None, "no list but None"),
        (lambda queries, k: "oslo roma", "no list but 'oslo roma'"),
        (lambda queries, k: [], "queries were sent, 0 answers came back"),
        (lambda queries, k: [(OSLO,)] * (len(queries) + 1), r"answers came back"),
        (lambda queries, k: [None] * len(queries), "no list of documents but None"),
        (lambda queries, k: ["oslo"] * len(queries), "no list of documents but 'oslo'"),
        (lambda queries, k: [OSLO] * len(queries), "no list of documents but Document"),
        (lambda queries, k: [iter([OSLO])] * len(queries), "no list of documents but <"),
        (lambda queries, k: [("oslo",)] * len(queries), "no document: 'oslo'"),
        (lambda queries, k: [(OSLO, ROMA, None)] * len(queries), "no document: None"),
        (lambda queries, k: [[Unspeakable()]] * len(queries), "no document: <Unspeakable"),
        (
            lambda queries, k: [(Document(id="a", title="t", text=b"x"),)] * len(queries),
            "a document without texts: Document",
        ),
        (lambda queries, k: [RetrievalFailure(reason="500")] * len(queries), "^500$"),
        (lambda queries, k: [RetrievalFailure(reason=None)] * len(queries), "None"),
        (lambda queries, k: [RetrievalFailure(reason="")] * len(queries), "gave no reason"),
    ],
)
@pytest.mark.parametrize("queries", [["a"], ["a", "a", "b"]], ids=["one", "two"])
def test_every_fault_is_a_failure(answer, reason, queries):
    """Never an exception, never an empty document; the reason can be printed and is no novel."""
    outcomes = asked(Recording(answer), queries)
    for text in reasons(outcomes):
        assert re.search(reason, text), text
        assert 0 < len(text.encode()) < 600


def test_documents_in_any_list_are_taken_and_cut_to_k():
    def answer(queries, k):
        return ([OSLO, ROMA, LIMA], (LIMA, OSLO), [ROMA], ())

    outcomes = asked(Recording(answer), ["a", "b", "c", "d"])
    assert outcomes == [(OSLO, ROMA), (LIMA, OSLO), (ROMA,), ()]


def test_a_poisonous_query_fails_alone():
    """Its companions are asked again, each alone and once; so a lost answer is found again."""

    def answer(queries, k):
        if "poison" in queries:
            raise UnicodeError("cannot")
        return [(document(q),) for q in queries]

    retriever = Recording(answer)
    good, bad, *rest = asked(retriever, ["oslo", "poison", "roma", "poison", "lima"], workers=1)
    assert [good, rest[0], rest[2]] == [(OSLO,), (ROMA,), (LIMA,)]
    assert reasons([bad, rest[1]]) == ["UnicodeError: cannot"] * 2
    alone = [(("oslo",), 2), (("poison",), 2), (("roma",), 2), (("lima",), 2)]
    assert retriever.calls == [(("oslo", "poison", "roma", "lima"), 2), *alone]


def test_one_failure_among_many_is_not_asked_again():
    def answer(queries, k):
        return [RetrievalFailure(reason="x") if q == "b" else (document(q),) for q in queries]

    retriever = Recording(answer)
    outcomes = asked(retriever, ["a", "b", "c"])
    assert reasons(outcomes[1:2]) == ["x"] and outcomes[::2] == [(document("a"),), (document("c"),)]
    assert len(retriever.calls) == 1


def test_hung_workers_are_replaced(gate):
    """More hang than there are workers; each fails after its time, and the others are answered."""
    with SearchPool(gate, workers=2, batch=1, window=0.0, timeout=0.3) as pool:
        started = time.monotonic()
        for ticket in range(5):
            pool.submit(ticket, f"hang {ticket}", 1)
        for ticket in range(5, 9):
            pool.submit(ticket, f"q{ticket}", 1)
        outcomes = drain(pool)
        assert time.monotonic() - started >= 3 * 0.3
    assert reasons(outcomes[t] for t in range(5)) == ["no answer within 0.3 s"] * 5
    assert all(outcomes[t] == (document(f"q{t}"),) for t in range(5, 9))


def test_one_hangs_and_the_others_go_on(gate):
    with SearchPool(gate, workers=2, batch=1, timeout=SOON) as pool:
        pool.submit(0, "hang", 1)
        for ticket in range(1, 20):
            pool.submit(ticket, "oslo", 1)
        assert drain(pool, 19) == dict.fromkeys(range(1, 20), (OSLO,))
        assert pool.pending == 1
        gate.opened.set()
        assert drain(pool) == {0: (document("hang"),)}


def test_a_late_answer_is_dropped(gate):
    """Also when its ticket is in use again, for another query."""
    with SearchPool(gate, workers=1, batch=1, timeout=0.2) as pool:
        pool.submit(0, "hang", 1)
        assert gate.entered.acquire(timeout=SOON)
        assert reasons(drain(pool).values()) == ["no answer within 0.2 s"]
        pool.submit(0, "hang again", 1)
        assert gate.entered.acquire(timeout=SOON)  # by another thread: the first one still hangs
        gate.opened.set()
        assert drain(pool) == {0: (document("hang again"),)}
        pool.wait(0.05)
        assert pool.finished() == []


def test_queries_asked_again_have_no_more_time_than_the_others():
    """Nothing but slow failures: all come within one time-out, not within one for each query."""

    def answer(queries, k):
        time.sleep(0.3)
        raise ConnectionError("down")

    started = time.monotonic()
    retriever = Recording(answer)
    outcomes = asked(retriever, [f"q{i}" for i in range(40)], workers=1, timeout=1.0)
    assert time.monotonic() - started < 5  # 12 s one after the other
    assert len(retriever.calls) <= 5  # nor is one asked whose time is over
    given_up = "no answer within 1 s (asked again after: ConnectionError: down)"
    assert set(reasons(outcomes)) == {"ConnectionError: down", given_up}


def test_closing_leaves_hung_threads_behind(gate):
    """Those given up are not waited for, those in their time not for long; the queue is dropped."""
    pool = SearchPool(gate, workers=2, batch=1, timeout=0.2)
    pool.submit(0, "hang", 1)
    assert gate.entered.acquire(timeout=SOON)
    drain(pool)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 0.8
    pool = SearchPool(gate, workers=1, batch=1)
    for ticket in range(3):
        pool.submit(ticket, "hang", 1)
    assert gate.entered.acquire(timeout=SOON)
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 5 and pool.pending == 0
    pool.wait(None)
    assert pool.finished() == []


def test_a_closed_pool_has_no_threads():
    before = set(threading.enumerate())
    with SearchPool(Recording(), workers=3, window=0.0) as pool:
        pool.submit(0, "a", 1)
        drain(pool)
        mine = set(threading.enumerate()) - before
        assert len(mine) == 3 and all(thread.daemon for thread in mine)
    for thread in mine:
        thread.join(SOON)
        assert not thread.is_alive()


HANGING = """
import sys, time
from r1s_jax.retrieval.pool import SearchPool

class Hanging:
    def search(self, queries, k):
        print("asked", flush=True)
        time.sleep(600)

pool = SearchPool(Hanging(), batch=1, timeout=0.2)
pool.submit(0, "a", 1)
pool.wait(None)
print(pool.finished())
pool.submit(1, "b", 1)
time.sleep(0.2)
"""

SEARCHING = """
import numpy as np
from r1s_jax.retrieval.index import DenseIndex
from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.types import Document

class Embedder:
    dim, fingerprint = 256, ""
    def embed(self, texts, *, query=False):
        return np.random.default_rng(0).normal(size=(len(texts), 256)).astype(np.float32)

documents = [Document(id=str(i), title="", text="") for i in range(20000)]
pool = SearchPool(DenseIndex.build(documents, Embedder(), corpus_hash=""), batch=40)
for ticket in range(20000):
    pool.submit(ticket, str(ticket), 1)
pool.wait(None)
assert 0 < len(pool.finished()) < 20000
"""


@pytest.mark.parametrize("program, said", [(HANGING, "no answer within 0.2 s"), (SEARCHING, "")])
def test_the_interpreter_exits(program, said):
    """An open pool keeps no process alive. Bug: one in the middle of a ScaNN search aborted it."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and time.monotonic() - started < 60
