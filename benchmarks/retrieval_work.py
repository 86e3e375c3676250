"""One step of benchmarks/retrieval.py in a process of its own, so that its memory is its own.

    python retrieval_work.py vectors|exact|build|hnsw FOLDER ... answers with one line of JSON
    python retrieval_work.py serve ours|lean|flat|hnsw FOLDER answers commands, see `peers.protocol`

FOLDER holds vectors.npy and queries.npy; `exact` adds exact.npy, `build` a folder of the searcher,
`hnsw` hnsw.faiss.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
from peers.protocol import serve  # noqa: E402

K = 5
BATCH = 64
BLOCK = 50_000
HNSW_LINKS, HNSW_EFFORT = 32, 80  # M, efConstruction
EFFORTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024)
RECALL = 0.95
Search = Callable[[np.ndarray, int], np.ndarray]  # (queries, k) -> rows


def vectors(folder: Path, fitted: str, count: int, dim: int, queries: int) -> dict[str, Any]:
    """Draws vectors and queries from the process fitted to the real vectors in `fitted`."""
    import retrieval_vectors as drawn

    real_ND, asked_QD = (np.load(Path(fitted) / f"{n}.npy") for n in ("passages", "queries"))
    process = drawn.fit(real_ND, asked_QD)
    if dim > process.dim:
        process = process.widened(dim, np.random.default_rng(dim))
    rng = np.random.default_rng(1)
    alike_ND, components_N = process.passages(rng, len(real_ND))
    some = rng.choice(len(alike_ND), len(asked_QD))
    alike_QD = process.queries(rng, alike_ND[some], components_N[some])
    begin = time.perf_counter()
    drawn.write(folder, process, count, queries, seed=0)
    shares = {"real": (asked_QD, real_ND), "drawn": (alike_QD, alike_ND)}
    return {
        "seconds": time.perf_counter() - begin,
        "gaps": {
            name: {n: np.quantile(g, drawn.QUANTILES).tolist() for n, g in drawn.gaps(*of).items()}
            for name, of in shares.items()
        },
        "leaves": {name: drawn.found_in_leaves(*of) for name, of in shares.items()},
    }


def exact(folder: Path) -> dict[str, Any]:
    """The K nearest of every query, by products in blocks; and how near they are."""
    vectors_ND, queries_QD = _read(folder)
    best = np.full((len(queries_QD), K + 1), -np.inf, np.float32)
    rows = np.zeros(best.shape, np.int64)
    for start in range(0, len(vectors_ND), BLOCK):
        products = queries_QD @ vectors_ND[start : start + BLOCK].T
        here = np.argpartition(-products, K, axis=1)[:, : K + 1]
        best = np.concatenate([best, np.take_along_axis(products, here, 1)], axis=1)
        rows = np.concatenate([rows, here + start], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, : K + 1]
        best, rows = (np.take_along_axis(a, order, 1) for a in (best, rows))
    np.save(folder / "exact.npy", rows[:, :K])
    return {"first": float(np.median(best[:, 0])), "gap": float(np.median(best[:, 4] - best[:, 5]))}


def build(folder: Path, precision: str) -> dict[str, Any]:
    """Builds our searcher as tpu_scripts/build_index.py would, and saves it."""
    from r1s_jax.retrieval.ann import AnnConfig, build_searcher, resolve

    vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")
    parameters = resolve(AnnConfig(exact=False, precision=precision), *vectors_ND.shape)
    target = folder / f"scann_{precision}"
    shutil.rmtree(target, ignore_errors=True)
    begin = time.perf_counter()
    searcher = build_searcher(vectors_ND, parameters)
    seconds = time.perf_counter() - begin
    searcher.save(target)
    settings = dataclasses.asdict(parameters)
    target.with_suffix(".json").write_text(json.dumps(settings))
    disk = sum(file.stat().st_size for file in target.iterdir())
    return {"seconds": seconds, "disk": disk, "parameters": settings, **memory()}


def ours(
    folder: Path, precision: str, leaves_to_search: int | None = None
) -> tuple[Search, dict[str, Any]]:
    """With as many leaves as it was built for, or others."""
    from r1s_jax.retrieval.ann import AnnParameters, load_searcher

    vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")
    saved = folder / f"scann_{precision}"
    settings = json.loads(saved.with_suffix(".json").read_text())
    if leaves_to_search is not None:
        settings["leaves_to_search"] = leaves_to_search
    searcher = load_searcher(saved, vectors_ND, AnnParameters(**settings))
    return lambda queries, k: searcher.search(queries, k)[0], {"parameters": settings}


def lean(folder: Path, precision: str) -> tuple[Search, dict[str, Any]]:
    """Ours with just as many leaves as the recall takes."""
    return _enough(folder, lambda effort: ours(folder, precision, effort))


def flat(folder: Path) -> tuple[Search, dict[str, Any]]:
    vectors_ND, _ = _read(folder)
    begin = time.perf_counter()
    faiss = _faiss()
    # Always by matrix products. FAISS 1.15 has them only from 128,000 numbers in a batch on (334
    # queries of width 384), which pays on machines of many cores; two took six times as long.
    faiss.cvar.distance_compute_blas_threshold = 1
    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    _add(index, vectors_ND)
    seconds = time.perf_counter() - begin
    return lambda queries, k: index.search(queries, k)[1], {"seconds": seconds}


def build_hnsw(folder: Path) -> dict[str, Any]:
    vectors_ND, _ = _read(folder)
    faiss = _faiss()
    begin = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors_ND.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_EFFORT
    _add(index, vectors_ND)
    seconds = time.perf_counter() - begin
    found = {"seconds": seconds, **memory()}
    faiss.write_index(index, str(folder / "hnsw.faiss"))
    return found


def hnsw(folder: Path) -> tuple[Search, dict[str, Any]]:
    """With just as large an `efSearch` as the recall takes."""
    index = _faiss().read_index(str(folder / "hnsw.faiss"))
    settings = {"M": HNSW_LINKS, "efConstruction": index.hnsw.efConstruction}

    def with_effort(effort: int) -> tuple[Search, dict[str, Any]]:
        index.hnsw.efSearch = effort
        search: Search = lambda queries, k: index.search(queries, k)[1]  # noqa: E731
        return search, {"parameters": settings | {"efSearch": effort}}

    return _enough(folder, with_effort)


def _enough(
    folder: Path, make: Callable[[int], tuple[Search, dict[str, Any]]]
) -> tuple[Search, dict[str, Any]]:
    """The search of the least effort that meets the recall on queries that are not measured."""
    _, queries_QD = _read(folder)
    wanted = np.load(folder / "exact.npy")
    half = len(queries_QD) // 2
    made = make(EFFORTS[0])
    for effort in EFFORTS[1:]:
        if recall(made[0](queries_QD[half:], K), wanted[half:]) >= RECALL:
            break
        made = make(effort)
    return made


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the wanted rows that were found, over all queries."""
    return float((found[:, :, None] == wanted[:, None, :]).any(axis=1).mean())


def memory() -> dict[str, float]:
    """Bytes of this process: the peak, what it holds itself, and mapped pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    names = {"peak": "VmHWM", "held": "RssAnon", "mapped": "RssFile"}
    return {name: int(values[field]) * 1024 for name, field in names.items()}


def commands(search: Search, folder: Path) -> dict[str, Callable[..., dict[str, Any]]]:
    """Measured on the first half of the queries; `_enough` has seen the other one."""
    _, queries_QD = _read(folder)
    wanted = np.load(folder / "exact.npy")
    half = len(queries_QD) // 2

    def found() -> dict[str, Any]:
        rows = [search(queries_QD[i : i + BATCH], K) for i in range(0, half, BATCH)]
        return {"recall": recall(np.concatenate(rows)[:half], wanted[:half]), **memory()}

    def rate(seconds: str) -> dict[str, Any]:
        count, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < float(seconds):
            start = count % (half - BATCH)
            search(queries_QD[start : start + BATCH], K)
            count += BATCH
        return {"rate": count / spent}

    def single(seconds: str) -> dict[str, Any]:
        took, begin = [], time.perf_counter()
        while time.perf_counter() - begin < float(seconds):
            i = len(took) % half
            start = time.perf_counter()
            search(queries_QD[i : i + 1], K)
            took.append(time.perf_counter() - start)
        p50, p99 = np.quantile(took, (0.5, 0.99)).tolist()
        return {"p50": p50, "p99": p99}

    return {"found": found, "rate": rate, "single": single}


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")


def _add(index: Any, vectors_ND: np.ndarray) -> None:
    """In blocks, so that the file's pages are not counted as the index's."""
    for start in range(0, len(vectors_ND), BLOCK):
        index.add(np.array(vectors_ND[start : start + BLOCK]))


def _faiss() -> Any:
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    return faiss


def main() -> int:
    name, *arguments = sys.argv[1:]
    if name == "serve":
        kind, folder, *rest = arguments
        search, ready = {"ours": ours, "lean": lean, "flat": flat, "hnsw": hnsw}[kind](
            Path(folder), *rest
        )
        serve({**ready, **memory()}, commands(search, Path(folder)))
        return 0
    folder, *rest = arguments
    numbers = [int(word) if word.isdigit() else word for word in rest]
    step: Any = {"vectors": vectors, "exact": exact, "build": build, "hnsw": build_hnsw}[name]
    print(json.dumps(step(Path(folder), *numbers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
