"""Many requests' queries, searched for together: a `SearchPool` with a thread of its own."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from r1s_jax.retrieval.interface import EmbeddingRetriever, Retriever, device_part
from r1s_jax.retrieval.pool import Outcome, SearchPool

_TICK = 0.002  # seconds that new queries wait at most while others are out


class Overloaded(Exception):
    """Too many queries wait already, or the dispatcher is closing."""


@dataclasses.dataclass(kw_only=True)
class _Job:
    queries: Sequence[str]
    k: int
    outcomes: list[Outcome | None]
    left: int
    future: concurrent.futures.Future[list[Outcome]]


class Dispatcher:
    """Takes queries from any thread and searches for them in batches.

    Its own thread is the one that embeds, where the retriever does so on a device (see
    `SearchPool`); what a retriever does wrong is a `RetrievalFailure` of that query. Of a request
    whose future was cancelled, the queries that have not been handed to the pool never are.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        workers: int,
        batch: int,
        window: float,
        timeout: float,
        waiting: int,
        observe: Callable[[int], None],
    ) -> None:
        """Starts the threads; `SearchPool` says what the first four numbers are.

        Args:
            waiting: queries that may wait at a time; a request of more is taken when none does.
            observe: is told the size of every batch.
        """
        self._limit = waiting
        self._ahead = 2 * workers * batch  # in the pool: enough that no worker runs dry
        self._pool = SearchPool(
            _Observed(retriever, observe),
            workers=workers,
            batch=batch,
            window=window,
            timeout=timeout,
        )
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the two below, and that nothing comes after the end
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Queries without an answer."""
        return self._waiting

    def search(self, queries: Sequence[str], k: int) -> concurrent.futures.Future[list[Outcome]]:
        """Outcomes in the order of at least one query. Raises Overloaded."""
        count = len(queries)
        job = _Job(
            queries=queries,
            k=k,
            outcomes=[None] * count,
            left=count,
            future=concurrent.futures.Future(),
        )
        with self._lock:
            if self._closed:
                raise Overloaded("the server is going down")
            if self._waiting and self._waiting + count > self._limit:
                raise Overloaded(f"{self._waiting} queries are waiting already")
            self._waiting += count
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Ends the threads; what waits is cancelled."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        numbers = itertools.count()
        tickets: dict[int, tuple[_Job, int]] = {}
        backlog: collections.deque[tuple[_Job, int]] = collections.deque()
        try:
            while (jobs := self._take(block=not (tickets or backlog))) is not None:
                backlog.extend((job, i) for job in jobs for i in range(len(job.queries)))
                while backlog and len(tickets) < self._ahead:
                    job, i = backlog.popleft()
                    if job.future.cancelled():
                        self._settle(job, i, ())
                        continue
                    ticket = next(numbers)
                    tickets[ticket] = (job, i)
                    self._pool.submit(ticket, job.queries[i], job.k)
                self._pool.step()
                for ticket, outcome in self._pool.finished():
                    self._settle(*tickets.pop(ticket), outcome)
                self._pool.wait(_TICK)
        finally:
            self._pool.close()
            with self._lock:
                self._closed = True
            unfinished = {id(job): job for job, _ in (*tickets.values(), *backlog)}
            while not self._jobs.empty():
                if job := self._jobs.get():
                    unfinished[id(job)] = job
            for job in unfinished.values():
                job.future.cancel()

    def _take(self, *, block: bool) -> list[_Job] | None:
        """What has come, at least one job if it may block; None at the end."""
        jobs: list[_Job] = []
        while True:
            try:
                job = self._jobs.get(block=block and not jobs)
            except queue.Empty:
                return jobs
            if job is None:
                return None
            jobs.append(job)

    def _settle(self, job: _Job, i: int, outcome: Outcome) -> None:
        job.outcomes[i] = outcome
        job.left -= 1
        if job.left:
            return
        with self._lock:
            self._waiting -= len(job.queries)
        if job.future.set_running_or_notify_cancel():  # its client may have left
            job.future.set_result(cast(list[Outcome], job.outcomes))


class _Observed:
    """A retriever whose batches are told of; an `EmbeddingRetriever` as much as the other is."""

    def __init__(self, retriever: Retriever, observe: Callable[[int], None]) -> None:
        self._retriever = retriever
        self._observe = observe

    @property
    def embeds_on_device(self) -> bool:
        return device_part(self._retriever) is not None

    def search(self, queries: Sequence[str], k: int) -> Any:
        self._observe(len(queries))
        return self._retriever.search(queries, k)

    def embed_queries(self, queries: Sequence[str]) -> np.ndarray:
        self._observe(len(queries))
        return cast(EmbeddingRetriever, self._retriever).embed_queries(queries)

    def search_vectors(self, vectors_ND: np.ndarray, queries: Sequence[str], k: int) -> Any:
        return cast(EmbeddingRetriever, self._retriever).search_vectors(vectors_ND, queries, k)
