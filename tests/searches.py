"""What the tests of the search pool share: documents, a retriever that records, and a caller."""

import threading
import time

from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.types import Document, RetrievalFailure

NEVER = 3600.0  # a window that is not over while a test runs
SOON = 20.0  # what a test waits at most for something that comes at once


def document(name):
    return Document(id=name, title=name.title(), text=f"about {name}")


OSLO, ROMA, LIMA = document("oslo"), document("roma"), document("lima")


class Recording:
    """Answers a query with a document of its name; keeps what it was asked, and in which thread."""

    def __init__(self, answer=None):
        self.calls, self.threads = [], set()
        self.answer = answer or (lambda queries, k: [(document(q),) * min(k, 1) for q in queries])

    def search(self, queries, k):
        self.calls.append((tuple(queries), k))
        self.threads.add(threading.get_ident())
        return self.answer(queries, k)


def drain(pool, count=None):
    """{ticket: outcome} of all that is pending, or of the first `count`; none comes twice."""
    outcomes, end = {}, time.monotonic() + SOON
    wanted = pool.pending if count is None else count
    while len(outcomes) < wanted:
        assert time.monotonic() < end, f"{wanted - len(outcomes)} of {wanted} never came"
        pool.wait(1.0)
        pool.step()
        for ticket, outcome in pool.finished():
            assert ticket not in outcomes
            outcomes[ticket] = outcome
    return outcomes


def asked(retriever, queries, k=2, *, batch=0, window=NEVER, **options):
    """The outcomes of the queries, in their order; they make one batch unless its size is given."""
    if not batch:
        batch = len(set(queries))
        assert queries.index(queries[-1]) == len(queries) - 1, "it would be full before the last"
    with SearchPool(retriever, batch=batch, window=window, **options) as pool:
        for ticket, query in enumerate(queries):
            pool.submit(ticket, query, k)
        outcomes = drain(pool)
        assert pool.pending == 0 and pool.finished() == []
    return [outcomes[ticket] for ticket in range(len(queries))]


def reasons(outcomes):
    outcomes = list(outcomes)
    assert all(isinstance(o, RetrievalFailure) for o in outcomes)
    return [o.reason for o in outcomes]
