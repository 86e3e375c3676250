"""Stand-ins for the slow or outside parts of the system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from r1s_jax.types import Document, RetrievalFailure


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryRetriever:
    """Answers the queries of a dictionary, every other query with `default`."""

    mapping: Mapping[str, tuple[Document, ...]]
    default: tuple[Document, ...] = ()

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        return [self.mapping.get(query, self.default)[:k] for query in queries]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailingRetriever:
    """Fails on the queries that contain `pattern` (on all, by default), else asks `inner`."""

    inner: DictionaryRetriever = dataclasses.field(
        default_factory=lambda: DictionaryRetriever(mapping={})
    )
    pattern: str = ""
    reason: str = "the fake is down"

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        found = self.inner.search(queries, k)
        return [
            RetrievalFailure(reason=self.reason) if self.pattern in query else documents
            for query, documents in zip(queries, found, strict=True)
        ]
