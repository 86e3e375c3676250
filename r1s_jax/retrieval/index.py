"""A dense index of passages: ScaNN where it is installed, an exact numpy search elsewhere.

A passage's vector is the unit vector along `title_weight * embed(title) + embed(text)`: a
passage is mostly looked for by what it is about. A saved index is a directory:

    manifest.json     what it was built from and with; checked on loading
    documents.jsonl   id, title and text of every passage, in the order of the vectors
    vectors.npy       float32 [N, D]
    scann/            ScaNN's tree, only for corpora that are too large for brute force
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from r1s_jax.retrieval.embed import Embedder, TfidfSvdConfig, TfidfSvdEmbedder
from r1s_jax.types import Document, RetrievalFailure, UserError

FORMAT = 1
BRUTE_FORCE_LIMIT = 50_000  # up to here an exact scan of one query takes a few milliseconds


class DenseIndex:
    """Passages and their vectors; an `EmbeddingRetriever`. Made by `build` or `load`."""

    def __init__(
        self,
        documents: Sequence[Document],
        vectors_ND: np.ndarray,
        embedder: Embedder,
        *,
        corpus_hash: str,
        title_weight: float,
        searcher: Any,
    ) -> None:
        self.documents = tuple(documents)
        self.vectors_ND = vectors_ND
        self.embedder = embedder
        self.corpus_hash = corpus_hash
        self.title_weight = title_weight
        self._searcher = searcher

    @classmethod
    def build(
        cls,
        documents: Sequence[Document],
        embedder: Embedder,
        *,
        corpus_hash: str,
        title_weight: float = 1.0,
        brute_force_limit: int = BRUTE_FORCE_LIMIT,
    ) -> DenseIndex:
        """Embeds the passages and builds the searcher. ValueError without any passage."""
        if not documents:
            raise ValueError("an index needs at least one document, got 0")
        vectors_ND = _passage_vectors(documents, embedder, title_weight)
        return cls(
            documents,
            vectors_ND,
            embedder,
            corpus_hash=corpus_hash,
            title_weight=title_weight,
            searcher=_build_searcher(vectors_ND, brute_force_limit),
        )

    @property
    def embeds_on_device(self) -> bool:
        """Whether the embedder runs on a device; see `interface.EmbeddingRetriever`."""
        return bool(getattr(self.embedder, "on_device", False))

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """The k passages of largest inner product per query, best first; see `Retriever`.

        ValueError for k < 1.
        """
        return self.search_vectors(self.embed_queries(queries), queries, k)

    def embed_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """One unit vector per query."""
        return self.embedder.embed(queries, query=True)

    def search_vectors(
        self, vectors_ND: Float[np.ndarray, "N D"], queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        """`search` for queries whose vectors are known.

        Vectors are scored one by one, so that no answer depends on the others of the batch.
        Several threads may search at a time: ScaNN's searchers are read-only then, and leave the
        interpreter to others meanwhile. ValueError for k < 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        k = min(k, len(self.documents))
        found: list[tuple[Document, ...] | RetrievalFailure] = []
        for query_D in vectors_ND:
            indices = _top(self.vectors_ND, self._searcher, query_D, k)
            found.append(tuple(self.documents[i] for i in indices))
        return found

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the directory in one step: it is there whole or not at all.

        Raises:
            UserError: the directory already exists; nothing is overwritten.
        """
        path = pathlib.Path(directory)
        if path.exists():
            raise UserError(f"{path}: already exists, an index is not written over it")
        temporary = _temporary_beside(path)
        try:
            self._write(temporary)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        embedder: Embedder,
        *,
        corpus_hash: str | None = None,
        brute_force_limit: int = BRUTE_FORCE_LIMIT,
    ) -> DenseIndex:
        """Reads a saved index for use with the embedder it was built with.

        Raises:
            UserError: a file is missing or broken, or the manifest disagrees with the
                embedder, the corpus hash asked for, or the files beside it.
        """
        path = pathlib.Path(directory)
        manifest_path = path / "manifest.json"
        if not manifest_path.exists():
            raise UserError(f"{manifest_path}: no such file, {path} holds no index")
        try:
            manifest = json.loads(manifest_path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{manifest_path}: not JSON: {error}") from None
        wanted: dict[str, Any] = {"format": FORMAT, "embedder": embedder.fingerprint}
        wanted["dim"] = embedder.dim
        if corpus_hash is not None:
            wanted["corpus_hash"] = corpus_hash
        _check_manifest(manifest_path, manifest, wanted, "this run has")
        try:
            documents = _read_documents(path / "documents.jsonl")
            vectors_ND = np.load(path / "vectors.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a whole index: {error!r}") from None
        counts = {"count": len(documents), "dim": vectors_ND.shape[1]}
        _check_manifest(manifest_path, manifest, counts, "the files beside it hold")
        _check_manifest(
            manifest_path, manifest, {"count": len(vectors_ND)}, "vectors.npy beside it holds"
        )
        return cls(
            documents,
            vectors_ND,
            embedder,
            corpus_hash=manifest["corpus_hash"],
            title_weight=manifest["title_weight"],
            searcher=_load_searcher(path / "scann", vectors_ND, brute_force_limit),
        )

    def _write(self, path: pathlib.Path) -> None:
        path.mkdir(parents=True)
        np.save(path / "vectors.npy", self.vectors_ND)
        rows = ({"id": d.id, "title": d.title, "text": d.text} for d in self.documents)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / "documents.jsonl").write_bytes(lines.encode())
        scann = _scann()
        if self._searcher is not None and len(self.documents) > 1 and _is_tree(self._searcher):
            (path / "scann").mkdir()
            self._searcher.serialize(str(path / "scann"), relative_path=True)
        manifest = {
            "format": FORMAT,
            "embedder": self.embedder.fingerprint,
            "dim": self.embedder.dim,
            "corpus_hash": self.corpus_hash,
            "count": len(self.documents),
            "title_weight": self.title_weight,
            "scann": None if scann is None else scann[1],
        }
        (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def load_or_build(
    directory: str | os.PathLike[str],
    documents: Sequence[Document],
    *,
    corpus_hash: str,
    config: TfidfSvdConfig | None = None,
    title_weight: float = 1.0,
) -> DenseIndex:
    """An index over the documents with an embedder fitted on them, cached below `directory`.

    The cache folder's name is a hash of the corpus and all settings: nothing stale is ever
    read and nothing overwritten. Two processes may build at once; the first one's stands.
    """
    config = config or TfidfSvdConfig()
    settings = [FORMAT, corpus_hash, len(documents), repr(config), title_weight]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = pathlib.Path(directory) / f"tfidf-svd-{key}"
    if not path.exists():
        temporary = _temporary_beside(path)
        try:
            texts = [d.title for d in documents] + [d.text for d in documents]
            embedder = TfidfSvdEmbedder(config).fit(texts)
            embedder.save(temporary / "embedder")
            index = DenseIndex.build(
                documents, embedder, corpus_hash=corpus_hash, title_weight=title_weight
            )
            index.save(temporary / "index")
            temporary.rename(path)
        except OSError:
            if not path.exists():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    # Also after building: the first run must see the very bytes that later runs see.
    embedder = TfidfSvdEmbedder.load(path / "embedder")
    return DenseIndex.load(path / "index", embedder, corpus_hash=corpus_hash)


def check_embedder(
    index_directory: str | os.PathLike[str], embedder_directory: str | os.PathLike[str]
) -> None:
    """Whether a saved index was built with the saved embedder, from their JSON files alone.

    Raises:
        UserError: it was built with another one, or a file is missing or broken.
    """
    manifest_path = pathlib.Path(index_directory) / "manifest.json"
    embedder_path = pathlib.Path(embedder_directory) / "embedder.json"
    manifest, embedder = _read_object(manifest_path), _read_object(embedder_path)
    wanted = {"embedder": embedder.get("fingerprint")}
    _check_manifest(manifest_path, manifest, wanted, f"{embedder_path} has")


@functools.cache
def _scann() -> tuple[Any, str] | None:
    """ScaNN's numpy interface and its version; None, announced once, where it is absent."""
    try:
        import importlib.metadata

        import scann

        return scann.scann_ops_pybind, importlib.metadata.version("scann")
    except ImportError:
        warnings.warn(
            "ScaNN is not installed here (it ships for Linux only): an exact numpy search "
            "stands in, with the same results and less speed",
            stacklevel=2,
        )
        return None


def _passage_vectors(
    documents: Sequence[Document], embedder: Embedder, title_weight: float
) -> Float[np.ndarray, "N D"]:
    vectors_ND = embedder.embed([d.title for d in documents])
    vectors_ND *= np.float32(title_weight)
    step = 4096  # bounds the memory that the n-grams of long texts take
    for i in range(0, len(documents), step):
        vectors_ND[i : i + step] += embedder.embed([d.text for d in documents[i : i + step]])
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    vectors_ND /= np.maximum(norms_N, np.float32(1e-9))[:, None]
    return vectors_ND


def _build_searcher(vectors_ND: np.ndarray, brute_force_limit: int) -> Any:
    """A ScaNN searcher; None where ScaNN is absent."""
    scann = _scann()
    if scann is None:
        return None
    builder = scann[0].builder(vectors_ND, 10, "dot_product")
    count = len(vectors_ND)
    if count <= brute_force_limit:
        return builder.score_brute_force().build()
    leaves = max(2, round(count**0.5))
    return (
        builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=max(2, leaves // 10),
            training_sample_size=min(count, 250_000),
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(100)
        .build()
    )


def _load_searcher(path: pathlib.Path, vectors_ND: np.ndarray, brute_force_limit: int) -> Any:
    scann = _scann()
    if scann is None or not path.exists():
        return _build_searcher(vectors_ND, brute_force_limit)
    return scann[0].load_searcher(str(path))


def _is_tree(searcher: Any) -> bool:
    return "partitioning" in str(searcher.config())


def _top(vectors_ND: np.ndarray, searcher: Any, query_D: np.ndarray, k: int) -> list[int]:
    if searcher is not None:
        indices, _ = searcher.search(query_D, final_num_neighbors=k)
        return [int(i) for i in indices]
    scores_N = vectors_ND @ query_D
    return np.argsort(-scores_N, kind="stable")[:k].tolist()


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, must be an object")
    return value


def _check_manifest(
    path: pathlib.Path, manifest: dict[str, Any], values: dict[str, Any], whose: str
) -> None:
    for field, value in values.items():
        if manifest.get(field) != value:
            raise UserError(
                f'{path}: field "{field}" is {manifest.get(field)!r}, {whose} {value!r}'
            )


def _read_documents(path: pathlib.Path) -> list[Document]:
    lines = path.read_bytes().decode().split("\n")
    return [Document(**json.loads(line)) for line in lines if line]


def _temporary_beside(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{uuid.uuid4().hex}"
