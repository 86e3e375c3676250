"""Searches in worker threads, so that rows without a query decode on while a retriever is slow.

    with SearchPool(retriever) as pool:
        pool.submit(ticket, query, k)
        ...                                   # decode a chunk
        pool.step()
        for ticket, outcome in pool.finished(): ...

What a retriever does wrong becomes a `RetrievalFailure` here and nothing else: it may raise, hang,
or answer with anything at all. Whoever reads the outcomes has nothing left to check.
"""

from __future__ import annotations

import atexit
import dataclasses
import math
import reprlib
import threading
import time
from collections import deque

import numpy as np

from r1s_jax.retrieval.interface import Retriever, device_part
from r1s_jax.types import Document, RetrievalFailure

Outcome = tuple[Document, ...] | RetrievalFailure

_GRACE = 2.0  # seconds that `close` gives to the searches still running
_LONGEST_REASON = 500  # characters; a server's error page has more


@dataclasses.dataclass(kw_only=True, eq=False)
class _Batch:
    """Queries that are asked together, each with the tickets that wait for it."""

    k: int
    tickets: dict[str, list[int]]
    opened: float  # when its first query came
    vectors_ND: np.ndarray | None = None
    due: float | None = None  # by when an answer has to come, once a worker has begun
    fault: str = ""  # why its query is asked again, alone

    def singles(self, fault: str) -> list[_Batch]:
        """A batch for each query, in order."""
        return [
            dataclasses.replace(
                self,
                tickets={query: tickets},
                vectors_ND=None if self.vectors_ND is None else self.vectors_ND[i : i + 1],
                fault=fault,
            )
            for i, (query, tickets) in enumerate(self.tickets.items())
        ]


class SearchPool:
    """A retriever behind worker threads; queries that come within `window` are asked as one batch.

    A query's outcome is up to k documents or a `RetrievalFailure`. When a batch of several fails
    as a whole (a raise, no list, a list of the wrong length), each of its queries is asked once
    more, alone, so that one poisonous query does not fail its companions. A batch that hangs is
    given up `timeout` seconds after it was first asked, and so are its queries asked alone: they
    fail, an answer that comes later is dropped, and another thread takes the hung one's place.
    Equal queries of a batch are asked once.

    A retriever with a device part (`interface.EmbeddingRetriever`) embeds within `step`, on the
    caller's thread, and only then searches in a worker: programs are given to the devices by one
    thread, in an order of its own. Any other retriever is called in the workers alone, by several
    at a time, and `step` has nothing to do for it.

    The methods are meant for one caller's thread; `wait` alone blocks. A pool has to be closed,
    or its threads stay.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        workers: int = 4,
        batch: int = 64,
        window: float = 0.005,
        timeout: float = 60.0,
    ) -> None:
        """Starts the workers.

        Args:
            retriever: what answers; each of its calls gets at most `batch` distinct queries.
            workers: calls of the retriever that may run at a time.
            batch: a batch of so many distinct queries does not wait for its window to end.
            window: seconds that the first query of a batch waits for others.
            timeout: seconds after which a call counts as hung.

        Raises:
            ValueError: an argument is out of its range.
        """
        if workers < 1 or batch < 1:
            raise ValueError(f"workers = {workers} and batch = {batch} must be at least 1")
        if not (0 <= window < math.inf and 0 < timeout < math.inf):
            raise ValueError(
                f"window = {window} and timeout = {timeout} must be finite, the one at least 0 "
                "and the other more"
            )
        self._retriever, self._device = retriever, device_part(retriever)
        self._batch, self._window, self._timeout = batch, window, timeout
        lock = threading.Lock()  # guards all below
        self._work = threading.Condition(lock)  # the workers' and
        self._news = threading.Condition(lock)  # the caller's reasons to look again
        self._gathering: dict[int, _Batch] = {}  # by k
        self._full: deque[_Batch] = deque()  # to be embedded
        self._ready: deque[_Batch] = deque()  # for the next worker
        self._running: dict[_Batch, threading.Thread] = {}
        self._tickets: set[int] = set()  # all that `finished` has not handed out
        self._outcomes: list[tuple[int, Outcome]] = []
        self._closed = False
        for _ in range(workers):
            self._hire()
        atexit.register(self.close)  # see there

    @property
    def pending(self) -> int:
        """Tickets that were submitted and have not come back from `finished`."""
        with self._news:
            return len(self._tickets)

    def submit(self, ticket: int, query: str, k: int) -> None:
        """Asks for up to `k` documents; never blocks. With k = 0 the answer is () at once.

        Raises:
            ValueError: `ticket` is pending, `k` is negative, or the pool is closed.
        """
        with self._news:
            if self._closed:
                raise ValueError(f"ticket {ticket}: the pool is closed")
            if ticket in self._tickets:
                raise ValueError(f"ticket {ticket} is pending already")
            if k < 0:
                raise ValueError(f"k is {k}, must be at least 0")
            self._tickets.add(ticket)
            if k == 0:
                self._outcomes.append((ticket, ()))
                return
            batch = self._gathering.get(k)
            opens = batch is None
            if batch is None:
                batch = self._gathering[k] = _Batch(k=k, tickets={}, opened=time.monotonic())
            batch.tickets.setdefault(query, []).append(ticket)
            fills = len(batch.tickets) >= self._batch
            if fills:
                del self._gathering[k]
                (self._full if self._device else self._ready).append(batch)
            if opens or fills:
                self._work.notify_all()

    def step(self) -> None:
        """Embeds the batches that are full or whose window is over, and hands them to workers.

        For the caller to do between chunks. It takes as long as the device takes to embed, and
        nothing where the retriever has no device part: its workers watch the windows themselves.
        """
        if self._device is None:
            return
        with self._news:
            now = time.monotonic()
            for k in [k for k, batch in self._gathering.items() if self._is_over(batch, now)]:
                self._full.append(self._gathering.pop(k))
            batches = list(self._full)
            self._full.clear()
        for batch in batches:
            self._embed(batch)

    def finished(self) -> list[tuple[int, Outcome]]:
        """(ticket, outcome) of all that came since the last call, in any order; never blocks."""
        with self._news:
            self._give_up(time.monotonic())
            outcomes, self._outcomes = self._outcomes, []
            self._tickets.difference_update(ticket for ticket, _ in outcomes)
            return outcomes

    def wait(self, timeout: float | None) -> None:
        """Blocks until `finished` or `step` has something to do, or for `timeout` seconds.

        Returns at once when no ticket is pending.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._news:
            while self._tickets and not self._outcomes and not self._full and not self._closed:
                now = time.monotonic()
                self._give_up(now)
                windows = self._gathering.values() if self._device else ()
                if self._outcomes or now >= end or any(self._is_over(b, now) for b in windows):
                    return
                times = [end, *(b.due for b in (*self._running, *self._ready) if b.due is not None)]
                times += [batch.opened + self._window for batch in windows]
                left = min(times) - now
                self._news.wait(None if left == math.inf else left)

    def close(self) -> None:
        """Drops all that is pending and ends the workers; what was finished can still be read.

        Also called at the interpreter's exit, since an exit in the middle of a native search
        aborts the process. It waits for what is running, but two seconds at most, and not at all
        for what was given up: such threads are left behind, they keep no process alive.
        """
        with self._news:
            self._closed = True
            running = list(self._running.values())
            for waiting in (self._gathering, self._full, self._ready, self._running):
                waiting.clear()
            self._tickets = {ticket for ticket, _ in self._outcomes}
            self._work.notify_all()
            self._news.notify_all()
        end = time.monotonic() + _GRACE
        for thread in running:
            thread.join(max(0.0, end - time.monotonic()))
        atexit.unregister(self.close)

    def __enter__(self) -> SearchPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hire(self) -> None:
        threading.Thread(target=self._serve, name="search", daemon=True).start()

    def _serve(self) -> None:
        """A worker's life: it ends with the pool, or when the worker was taken for hung."""
        while (batch := self._take()) is not None:
            if not self._settle(batch, self._ask(batch)):
                return

    def _take(self) -> _Batch | None:
        """The next batch to ask for, once there is one; None when the pool is closed."""
        with self._work:
            while not self._closed:
                now = time.monotonic()
                batch = self._next(now)
                if batch is not None:
                    if batch.due is None:
                        batch.due = now + self._timeout
                    self._running[batch] = threading.current_thread()
                    self._news.notify_all()  # there is one more to be given up in time
                    return batch
                ends = [] if self._device else [b.opened for b in self._gathering.values()]
                self._work.wait(min(ends) + self._window - now if ends else None)
        return None

    def _next(self, now: float) -> _Batch | None:
        if self._ready:
            return self._ready.popleft()
        for k, batch in () if self._device else self._gathering.items():
            if self._is_over(batch, now):
                return self._gathering.pop(k)
        return None

    def _is_over(self, batch: _Batch, now: float) -> bool:
        return now >= batch.opened + self._window

    def _ask(self, batch: _Batch) -> list[Outcome] | str:
        """Outcomes in the order of the queries, or what is wrong with the batch as a whole."""
        queries = list(batch.tickets)
        try:
            if self._device is None:
                answers = self._retriever.search(queries, batch.k)
            else:
                assert batch.vectors_ND is not None
                answers = self._device.search_vectors(batch.vectors_ND, queries, batch.k)
            return _outcomes(answers, len(queries), batch.k)
        except BaseException as e:  # whatever ended this thread would leave its tickets pending
            return _told(e)

    def _settle(self, batch: _Batch, outcomes: list[Outcome] | str) -> bool:
        """Publishes the outcomes or has the queries asked alone; False if nobody waits any more."""
        with self._news:
            if self._running.pop(batch, None) is None:
                return False
            if isinstance(outcomes, list):
                self._publish(batch, outcomes)
            elif len(batch.tickets) == 1:
                self._fail(batch, outcomes)
            else:
                self._ready.extendleft(reversed(batch.singles(outcomes)))
                self._work.notify_all()
            return True

    def _embed(self, batch: _Batch) -> None:
        """Gives the batch its vectors; where that fails, its queries alone."""
        assert self._device is not None
        queries = list(batch.tickets)
        try:
            vectors_ND = self._device.embed_queries(queries)
            if len(vectors_ND) != len(queries):
                raise ValueError(f"{len(queries)} queries have {len(vectors_ND)} vectors")
        except Exception as e:
            if len(queries) > 1:
                for single in batch.singles(_told(e)):
                    self._embed(single)
            else:
                with self._news:
                    self._fail(batch, _told(e))
            return
        batch.vectors_ND = vectors_ND
        with self._work:
            if not self._closed:
                self._ready.append(batch)
                self._work.notify()

    def _give_up(self, now: float) -> None:
        """Fails what has waited too long. The lock is held."""
        late = [b for b in self._running if b.due is not None and b.due <= now]
        for batch in late:
            del self._running[batch]
            self._hire()
        again = [b for b in self._ready if b.due is not None and b.due <= now]
        for batch in again:
            self._ready.remove(batch)
        for batch in (*late, *again):
            why = f" (asked again after: {batch.fault})" if batch.fault else ""
            self._fail(batch, f"no answer within {self._timeout:g} s{why}")

    def _fail(self, batch: _Batch, reason: str) -> None:
        self._publish(batch, [RetrievalFailure(reason=_readable(reason))] * len(batch.tickets))

    def _publish(self, batch: _Batch, outcomes: list[Outcome]) -> None:
        """The lock is held."""
        for tickets, outcome in zip(batch.tickets.values(), outcomes, strict=True):
            self._outcomes += [(ticket, outcome) for ticket in tickets]
        self._news.notify_all()


def _outcomes(answers: object, count: int, k: int) -> list[Outcome] | str:
    """One outcome for each of `count` queries, or what is wrong with the answers as a whole."""
    if not isinstance(answers, list | tuple):
        return f"the answers are no list but {reprlib.repr(answers)}"
    if len(answers) != count:
        return f"{count} queries were sent, {len(answers)} answers came back"
    return [_outcome(answer, k) for answer in answers]


def _outcome(answer: object, k: int) -> Outcome:
    """An answer's first `k` documents, or a failure."""
    if isinstance(answer, RetrievalFailure):
        return RetrievalFailure(reason=_readable(answer.reason))
    if not isinstance(answer, list | tuple):
        reason = f"the answer is no list of documents but {reprlib.repr(answer)}"
        return RetrievalFailure(reason=_readable(reason))
    for found in answer:
        kind = "no document"
        if isinstance(found, Document):
            if all(isinstance(text, str) for text in (found.id, found.title, found.text)):
                continue
            kind = "a document without texts"
        reason = f"the answer holds {kind}: {reprlib.repr(found)}"
        return RetrievalFailure(reason=_readable(reason))
    return tuple(answer[:k])


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # it has a __str__ of its own, which is no better than the rest
        return type(error).__name__


def _readable(reason: object) -> str:
    """A text that can be logged: not empty, not endless, without halves of surrogate pairs."""
    text = reason if isinstance(reason, str) else reprlib.repr(reason)
    text = text[:_LONGEST_REASON].encode(errors="backslashreplace").decode()
    return text or "the retriever gave no reason"
