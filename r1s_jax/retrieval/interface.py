"""What every retriever is: a batch of queries in, a batch of document lists out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from r1s_jax.types import Document, RetrievalFailure


@runtime_checkable
class Retriever(Protocol):
    """Finds passages. A query's answer depends on nothing but the query and k.

    `search` may be called by several threads at a time.
    """

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """Up to `k` passages per query, best first; same order and length as `queries`.

        A query that cannot be answered gets a `RetrievalFailure`; this never raises for one.
        """
        ...


@runtime_checkable
class EmbeddingRetriever(Retriever, Protocol):
    """A retriever whose `search` falls into two parts, the first of them for a device.

    Programs are given to the devices by one thread; so whoever searches in threads of its own
    calls `embed_queries` in that one, and only `search_vectors` in the others.
    """

    @property
    def embeds_on_device(self) -> bool:
        """Whether `embed_queries` runs on a device; if not, `search` may be called anywhere."""
        ...

    def embed_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """One vector per query; each depends on its query alone, bit for bit."""
        ...

    def search_vectors(
        self, vectors_ND: Float[np.ndarray, "N D"], queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """`search` for queries whose vectors are known, on the host alone, in any thread."""
        ...


def device_part(retriever: Retriever) -> EmbeddingRetriever | None:
    """The retriever itself where it embeds on a device, else None."""
    if isinstance(retriever, EmbeddingRetriever) and retriever.embeds_on_device:
        return retriever
    return None
