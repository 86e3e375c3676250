"""Nearest neighbours by inner product: a scan of a small corpus, ScaNN's tree over a large one.

A large corpus is searched in three steps (Guo et al. 2020, "Accelerating Large-Scale Inference
with Anisotropic Vector Quantization"): the leaves of a k-means tree nearest to the query, the
passages in them by 4-bit codes, and the best of those anew by their vectors. ScaNN does the first
two; the third reads the rows of vectors.npy itself, so that no second copy of them is in memory or
on disk, a score is the same number whichever way a passage was found, and equal scores go by row.

ScaNN's k-means draws its starting points without a seed: two builds over the same vectors differ a
little in what they find. A built one is saved and answers alike for ever.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import threading
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from r1s_jax.types import UserError, require_least

EXACT_NUMBERS = 20_000_000  # count x width up to which a scan of all takes some milliseconds
_SEARCHED = 128  # leaves
_OF_TREES = ("leaves", "leaves_to_search", "block", "threshold", "training_sample", "reorder")
PRECISIONS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnConfig:
    """What may be set about a search; None leaves it to `resolve`, which knows the corpus.

    Attributes:
        exact: True scans every passage, False builds a tree, None goes by the corpus's size.
        leaves: of the k-means tree.
        leaves_to_search: of them per query; more find more and take longer.
        block: neighbouring dimensions that share a 4-bit code; fewer find more and take longer.
        threshold: of the anisotropic loss: cosines above it are those that codes should keep.
        training_sample: passages that k-means is run on.
        reorder: best passages by their codes that are scored anew.
        precision: of what they are scored by. float32 reads vectors.npy, which may stay on disk;
            bfloat16 and int8 are copies that ScaNN holds in memory, for corpora whose vectors do
            not fit there (its best ones are then scored by float32 as well).
    """

    exact: bool | None = None
    leaves: int | None = None
    leaves_to_search: int | None = None
    block: int | None = None
    threshold: float | None = None
    training_sample: int | None = None
    reorder: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        least = {
            **{"leaves": 2, "leaves_to_search": 1, "block": 1, "threshold": 0},
            **{"training_sample": 2, "reorder": 1},
        }
        given = {name: bound for name, bound in least.items() if getattr(self, name) is not None}
        require_least("AnnConfig", self, given)
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise UserError(f"AnnConfig.precision = {self.precision!r}, must be one of {known}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnParameters:
    """`AnnConfig` with every field settled, as a manifest keeps it (`dataclasses.asdict`).

    Where `exact` is true the others are not looked at, and stand at zero.
    """

    exact: bool
    leaves: int = 0
    leaves_to_search: int = 0
    block: int = 0
    threshold: float = 0.0
    training_sample: int = 0
    reorder: int = 0
    precision: str = "float32"


def resolve(config: AnnConfig, count: int, dim: int) -> AnnParameters:
    """The parameters for `count` vectors of width `dim`.

    128 leaves are looked at whatever their number: what is missed among real and drawn embeddings
    lies in leaves just behind the nearest ones, of which a larger corpus has no more. But the more
    passages there are, the more are as near by their codes, and have to be scored anew. Recall and
    speed: benchmarks/retrieval.md.

    Raises:
        UserError: a setting that this corpus is too small for, or that nothing would use.
    """
    exact = config.exact
    if exact is None:
        exact = count * dim <= EXACT_NUMBERS
        unused = [name for name in _OF_TREES if getattr(config, name) is not None]
        if exact and unused:
            raise UserError(
                f"AnnConfig.{unused[0]} = {getattr(config, unused[0])}, but {count} vectors of "
                f"{dim} numbers are scanned exactly; exact = False builds a tree"
            )
    if exact or count < 2:
        return AnnParameters(exact=True)
    leaves = _given(config.leaves, max(2, round(2 * count**0.5)))
    if leaves > count:
        raise UserError(f"AnnConfig.leaves = {leaves}, the corpus has {count} passages")
    searched = min(leaves, _given(config.leaves_to_search, _SEARCHED))
    return AnnParameters(
        exact=False,
        leaves=leaves,
        leaves_to_search=searched,
        block=min(dim, _given(config.block, 2)),
        threshold=_given(config.threshold, 0.2),
        training_sample=min(count, _given(config.training_sample, max(50_000, 50 * leaves))),
        reorder=_given(config.reorder, max(100, round(count**0.5 / 5))),
        precision=config.precision,
    )


class Searcher:
    """Finds the rows of largest inner product. Made by `build_searcher` or `load_searcher`.

    Queries are looked for one by one, several at a time in threads of its own: what is found for
    one depends on no other. May be called from several threads.
    """

    def __init__(
        self, vectors_ND: np.ndarray, parameters: AnnParameters, tree: Any, threads: int
    ) -> None:
        self.parameters = parameters
        self._vectors_ND = np.asarray(vectors_ND)  # a plain view: cheaper to index than a memmap
        self._tree = tree
        self._threads = threads or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every vector is looked at, by choice or because ScaNN is absent."""
        return self._tree is None

    def search(
        self, vectors_ND: Float[np.ndarray, "N D"], k: int
    ) -> tuple[Int[np.ndarray, "N k"], Float[np.ndarray, "N k"]]:
        """Rows (int64) and inner products (float32) of the k best, best first, equal ones by row.

        With fewer than k vectors all of them are found. ValueError for k < 1, for queries of
        another width, and for numbers that are not finite.
        """
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        count, dim = self._vectors_ND.shape
        if vectors_ND.shape[1] != dim:
            raise ValueError(f"queries have width {vectors_ND.shape[1]}, the vectors {dim}")
        if not np.isfinite(vectors_ND).all():
            raise ValueError("a query's vector is not finite")
        k = min(k, count)
        queries_ND = np.ascontiguousarray(vectors_ND, np.float32)
        rows_Nk = np.empty((len(queries_ND), k), np.int64)
        scores_Nk = np.empty((len(queries_ND), k), np.float32)

        def fill(i: int) -> None:
            rows_Nk[i], scores_Nk[i] = self._one(queries_ND[i], k)

        if len(queries_ND) > 1 and self._threads > 1:
            list(self._executor().map(fill, range(len(queries_ND))))
        else:
            for i in range(len(queries_ND)):
                fill(i)
        return rows_Nk, scores_Nk

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tree into a new folder; an exact search has nothing to write."""
        if self._tree is None:
            return
        path = pathlib.Path(folder)
        path.mkdir(parents=True)
        self._tree.serialize(str(path), relative_path=True)

    def _one(self, query_D: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._tree is None:
            scores_N = _products(self._vectors_ND, query_D)
            rows = largest(scores_N, k)
            return rows, scores_N[rows]
        rows = np.sort(self._candidates(query_D, k).astype(np.int64))
        scores_R = _products(self._vectors_ND[rows], query_D)
        best = largest(scores_R, k)
        return rows[best], scores_R[best]

    def _candidates(self, query_D: np.ndarray, k: int) -> np.ndarray:
        """Rows among which the k best are chosen: at least k."""
        p = self.parameters
        by_codes = max(p.reorder, k)
        wanted = by_codes if p.precision == "float32" else min(by_codes, 4 * k)
        rows, _ = self._tree.search(query_D, wanted, by_codes, p.leaves_to_search)
        if len(rows) < k:  # the leaves hold too few: k is large, or the leaves are uneven
            rows, _ = self._tree.search(query_D, wanted, by_codes, p.leaves)
        return rows

    def _executor(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "ann")
            return self._pool


def build_searcher(
    vectors_ND: Float[np.ndarray, "N D"], parameters: AnnParameters, *, threads: int = 0
) -> Searcher:
    """A searcher over float32 vectors, which it keeps (they may be memory-mapped).

    `threads` build and search, 0 means one for each core. Where ScaNN is absent the search is
    exact, which is announced once.
    """
    scann = None if parameters.exact else _scann()
    if scann is None:
        return Searcher(vectors_ND, parameters, None, threads)
    from scann.scann_ops.py.scann_builder import ReorderType

    p = parameters
    builder = (
        scann.builder(np.asarray(vectors_ND), 10, "dot_product")
        .set_n_training_threads(threads)
        .tree(p.leaves, p.leaves_to_search, training_sample_size=p.training_sample)
        .score_ah(p.block, anisotropic_quantization_threshold=p.threshold)
    )
    if p.precision != "float32":
        builder = builder.reorder(p.reorder, quantize=ReorderType[p.precision.upper()])
    return Searcher(vectors_ND, p, builder.build(), threads)


def load_searcher(
    folder: str | os.PathLike[str],
    vectors_ND: Float[np.ndarray, "N D"],
    parameters: AnnParameters,
    *,
    threads: int = 0,
) -> Searcher:
    """The searcher that was saved in `folder`, over the same vectors; finds what that one found.

    Raises:
        UserError: the folder is not there, is broken, or is of another number of vectors.
    """
    scann = None if parameters.exact else _scann()
    if scann is None:
        return Searcher(vectors_ND, parameters, None, threads)
    path = pathlib.Path(folder)
    if not (path / "scann_assets.pbtxt").is_file():
        raise UserError(f"{path}: holds no searcher; build the index again")
    try:
        tree = scann.load_searcher(str(path))
        count = tree.size()
    except Exception as error:  # the extension raises RuntimeError and others for broken files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the searcher cannot be read: {reason}") from None
    if count != len(vectors_ND):
        raise UserError(f"{path}: a searcher of {count} vectors, there are {len(vectors_ND)}")
    return Searcher(vectors_ND, parameters, tree, threads)


def scann_version() -> str | None:
    """ScaNN's version, None where it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("scann")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _scann() -> Any:
    """ScaNN's numpy interface; None, announced once, where it is absent."""
    try:
        import scann

        return scann.scann_ops_pybind
    except ImportError:
        warnings.warn(
            "ScaNN is not installed here (it ships for Linux only): an exact numpy search "
            "stands in, with the same results and less speed",
            stacklevel=2,
        )
        return None


def _products(vectors_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """Inner products, each a sum over its own row alone.

    Not BLAS, whose sums change with the number of rows and threads.
    """
    return np.einsum("nd,d->n", vectors_ND, query_D)


def largest(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, largest first, equal ones by index."""
    if k < len(scores_N):
        least = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
        indices = np.flatnonzero(scores_N >= least)
    else:
        indices = np.arange(len(scores_N))
    return indices[np.argsort(-scores_N[indices], kind="stable")[:k]]


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
