"""What every retriever is: a batch of queries in, a batch of document lists out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from r1s_jax.types import Document, RetrievalFailure


@runtime_checkable
class Retriever(Protocol):
    """Finds passages. A query's answer depends on nothing but the query and k."""

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """Up to `k` passages per query, best first; same order and length as `queries`.

        A query that cannot be answered gets a `RetrievalFailure`; this never raises for one.
        """
        ...
