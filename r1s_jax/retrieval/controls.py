"""Retrievers for control experiments: does the policy know because it looked?"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from r1s_jax.retrieval.interface import EmbeddingRetriever, Retriever, device_part
from r1s_jax.types import Document, RetrievalFailure


class WrongPassages:
    """Answers with well-formed passages that are not what was asked for.

    Each passage that `retriever` finds is replaced by another one of the same kind (ids like
    `city:1` or `country:NO:geo` name it) which `retriever` did not find for the query and
    whose title neither occurs in the query nor equals a found title. Which one is a hash of
    (seed, query, rank), so the same query always gets the same wrong answer.
    """

    def __init__(self, retriever: Retriever, corpus: Sequence[Document], seed: int = 0) -> None:
        self._retriever = retriever
        self._seed = seed
        self._by_kind: dict[tuple[str, ...], list[Document]] = collections.defaultdict(list)
        for document in sorted(corpus, key=lambda d: d.id):
            self._by_kind[_kind(document)].append(document)

    @property
    def embeds_on_device(self) -> bool:
        """Whether `retriever` does."""
        return device_part(self._retriever) is not None

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """Like `Retriever.search`; failures stay failures.

        ValueError when a kind holds no other passage to give.
        """
        return self._replace_all(queries, self._retriever.search(queries, k))

    def embed_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Those of `retriever`. ValueError if it does not embed on a device."""
        return self._inner().embed_queries(queries)

    def search_vectors(
        self, vectors_ND: Float[np.ndarray, "N D"], queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """`search` for queries whose vectors are known. ValueError as there and above."""
        found = self._inner().search_vectors(vectors_ND, queries, k)
        return self._replace_all(queries, found)

    def _inner(self) -> EmbeddingRetriever:
        inner = device_part(self._retriever)
        if inner is None:
            raise ValueError(f"{type(self._retriever).__name__} does not embed on a device")
        return inner

    def _replace_all(
        self, queries: Sequence[str], answers: list[tuple[Document, ...] | RetrievalFailure]
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        return [
            found if isinstance(found, RetrievalFailure) else self._replace(query, found)
            for query, found in zip(queries, answers, strict=True)
        ]

    def _replace(self, query: str, found: tuple[Document, ...]) -> tuple[Document, ...]:
        taken = {d.id for d in found}
        titles = {d.title.casefold() for d in found}
        asked = query.casefold()
        given = []
        for rank, document in enumerate(found):
            pool = self._by_kind[_kind(document)]
            start = self._draw(query, rank, len(pool))
            for candidate in (pool[(start + i) % len(pool)] for i in range(len(pool))):
                title = candidate.title.casefold()
                if candidate.id not in taken and title not in titles and title not in asked:
                    break
            else:
                raise ValueError(
                    f"none of the {len(pool)} passages of the kind of {document.id!r} can stand "
                    f"in for {len(found)} found ones"
                )
            taken.add(candidate.id)
            given.append(candidate)
        return tuple(given)

    def _draw(self, query: str, rank: int, size: int) -> int:
        if size == 0:
            return 0
        text = f"{self._seed}\x00{rank}\x00{query}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % size


def _kind(document: Document) -> tuple[str, ...]:
    """The id without the part that tells one passage from its likes."""
    parts = document.id.split(":")
    return (parts[0], *parts[2:]) if len(parts) > 1 else ("",)
