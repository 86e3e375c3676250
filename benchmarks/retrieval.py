"""Searching passages, beside an exact search and FAISS: writes benchmarks/retrieval.md.

    pip install faiss-cpu                                   # only for this
    python benchmarks/retrieval.py [--only real|scale] [--scratch DIR]

real: the 7,372 passages beside the project, embedded by MiniLM (which the tests' helpers fetch):
recall of ScaNN, and gold answers among what is found. scale: a million vectors of 384 and of 1,024
numbers, drawn from a process that is fitted to the real ones (benchmarks/retrieval_vectors.py).
Each index lives in a process of its own; they take turns within one run. Both parts' sections are
kept in DIR, so that they can be measured one after the other, and so are the drawn vectors and
FAISS' HNSW for the next run. Half an hour on two cores; needs 18 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# Older OpenBLAS needs them on some machines; the one in these wheels is slowed by them.
for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(variable, None)

import numpy as np  # noqa: E402
import retrieval_paper as paper  # noqa: E402
import retrieval_real as real  # noqa: E402
from calibrate import calibrate  # noqa: E402
from peers.protocol import Peer  # noqa: E402
from report import Table, heading, spread  # noqa: E402
from retrieval_vectors import QUANTILES, SHARES  # noqa: E402

from r1s_jax.retrieval.index import DenseIndex  # noqa: E402
from r1s_jax.retrieval.sentence import SentenceEmbedder  # noqa: E402
from tests.real import minilm  # noqa: E402

WORK = HERE / "retrieval_work.py"
DATA = HERE.parents[1] / "shared/data/r1_searcher"
COUNT, WIDTHS, QUERIES = 1_000_000, (384, 1024), 2000
GB = 1e9


def step(*words: object) -> dict[str, Any]:
    """One step of the work, in a process of its own."""
    command = [sys.executable, str(WORK), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` answered when it was done, be it in an earlier run."""
    if not path.is_file():
        found = make()
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def index_of_passages(scratch: Path, data: Path) -> DenseIndex:
    """The real passages with MiniLM's vectors, kept in scratch."""
    embedder, folder = SentenceEmbedder(minilm()), scratch / "passages"
    if not folder.exists():
        documents = real.read_passages(data)
        made = DenseIndex.build(documents, embedder, corpus_hash="passages", title_weight=None)
        made.save(folder)
    return DenseIndex.load(folder, embedder)


def real_part(index: DenseIndex, data: Path) -> list[Table]:
    episodes = [e for name in real.POLICIES.values() for e in real.read_episodes(data / name)]
    asked = sorted({query for episode in episodes for query in episode.queries})
    sets = {
        "released queries": index.embed_queries(asked),
        "questions": index.embed_queries(real.read_questions(data)),
    }
    return [real.recalls(np.asarray(index.vectors_ND), sets), real.coverage(index, data)]


def scale_part(index: DenseIndex, data: Path, scratch: Path, rounds: int) -> list[Table]:
    episodes = [e for name in real.POLICIES.values() for e in real.read_episodes(data / name)]
    fitted = scratch / "fitted"
    fitted.mkdir(exist_ok=True)
    queries = sorted({query for episode in episodes for query in episode.queries})
    np.save(fitted / "passages.npy", index.vectors_ND)
    np.save(fitted / "queries.npy", index.embed_queries(queries))
    drawn, measured, tables = {}, {}, []
    for dim in WIDTHS:
        folder = scratch / str(dim)
        folder.mkdir(exist_ok=True)
        words = ("vectors", folder, fitted, COUNT, dim, QUERIES)
        drawn[dim] = kept(folder / "drawn.json", lambda w=words: step(*w) | step("exact", w[1]))
        say(f"{COUNT:,} x {dim} drawn, exact neighbours known")
        table, measured[dim] = compare(folder, dim, rounds)
        tables.append(table)
    cores = os.cpu_count() or 1
    searches = sum(len(e.queries) for e in episodes) / len(episodes)
    wide = measured[1024]
    demand = paper.pod(
        wide, cores, searches, sampled_tokens(episodes), calibrate().matmul, HERE / "rollout.md"
    )
    return [alike(drawn), *tables, paper.host(wide, cores), *([demand] if demand else [])]


def compare(folder: Path, dim: int, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Ours, as built and with just enough leaves, FAISS flat and (narrow only) FAISS HNSW in turns.

    Also what was measured of ours as built.
    """
    names = {"ours": "ScaNN tree", "lean": "the same, fewer leaves", "flat": "FAISS flat"}
    made = {}
    if dim < 512:
        names["hnsw"] = "FAISS HNSW"
        made["hnsw"] = kept(folder / "hnsw.json", lambda: step("hnsw", folder))
        say(f"HNSW is built: {made['hnsw']}")
    made["ours"] = made["lean"] = built = step("build", folder, "float32")
    say(f"ours is built in {built['seconds']:.0f} s")
    peers = {}
    for kind in names:
        extra = ("float32",) if kind in ("ours", "lean") else ()
        peers[kind] = Peer([sys.executable, str(WORK), "serve", kind, str(folder), *extra])
        say(f"{names[kind]} is ready: {peers[kind].ready}")
    found = {kind: peer.ask("found") for kind, peer in peers.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in peers}
    singles: dict[str, list[dict[str, float]]] = {kind: [] for kind in peers}
    for _ in range(rounds):
        for kind, peer in peers.items():
            rates[kind].append(peer.ask("rate", 6)["rate"])
            singles[kind].append(peer.ask("single", 3))
    for peer in peers.values():
        peer.quit()
    matmul = calibrate().matmul
    rows = []
    for kind, name in names.items():
        builder = made.get(kind, peers[kind].ready)
        seconds, peak = builder["seconds"], max(builder["peak"], found[kind]["peak"])
        ratio = statistics.median(a / b for a, b in zip(rates[kind], rates["flat"], strict=True))
        rows.append(
            [
                name,
                f"{seconds:.0f}",
                f"{peak / GB:.1f}",
                f"{found[kind]['held'] / GB:.2f}",
                f"{found[kind]['recall']:.4f}",
                spread(rates[kind], 0),
                f"**{ratio:.1f}x**" if kind != "flat" else "1",
                *(
                    f"{1e3 * statistics.median(s[q] for s in singles[kind]):.2f}"
                    for q in ("p50", "p99")
                ),
            ]
        )
    ours = built["parameters"]
    multiplied = 2 * COUNT * dim * statistics.median(rates["flat"]) / 1e9
    say(f"{dim}: {rows}")
    table = Table(
        title=f"Scale: {COUNT:,} x {dim}",
        text=(
            f"ScaNN: {ours['leaves']:,} leaves, {ours['leaves_to_search']} looked at, "
            f"{ours['block']} dimensions a code, {ours['reorder']} scored anew from the mapped "
            "file; fewer leaves, just enough for a recall of .95 of other queries: "
            f"{peers['lean'].ready['parameters']['leaves_to_search']}. "
            + (
                f"HNSW, its efSearch likewise: {peers['hnsw'].ready['parameters']}. "
                if "hnsw" in peers
                else ""
            )
            + f"Recall@5 against an exact search, {QUERIES // 2:,} queries. Peak: while building "
            "and serving, mapped pages of the file included; held: memory of the serving process "
            "alone, without them. Queries/s in batches of 64: median (least to largest) of "
            f"{rounds} rounds in turns; the ratio is the median of the rounds'. At this machine's "
            f"matmul rate of {matmul:.0f} GFLOP/s an exact search could make "
            f"{matmul * 1e9 / (2 * COUNT * dim):.0f} queries/s; FAISS flat runs at "
            f"{multiplied:.0f} GFLOP/s. It is told to multiply matrices for batches of any size "
            "(`distance_compute_blas_threshold`): by default FAISS 1.15 does not for such batches, "
            "which takes several times as long on few cores."
        ),
        header=[
            *("index", "build, s", "peak, GB", "held, GB", "recall@5", "queries/s, batch 64"),
            *("against flat", "one query, p50, ms", "p99, ms"),
        ],
        rows=rows,
    )
    known = {"count": COUNT, "dim": dim, "parameters": built["parameters"]}
    known |= {"rate": statistics.median(rates["ours"]), "held": found["ours"]["held"]}
    return table, known


def alike(drawn: dict[int, dict[str, Any]]) -> Table:
    """Whether the drawn vectors are as near to each other as the real ones."""
    rows = []
    for dim, found in drawn.items():
        for name in found["gaps"]["real"]:
            for which in ("real", "drawn") if dim == WIDTHS[0] else ("drawn",):
                label = "real, 384" if which == "real" else f"drawn, {dim:,}"
                values = found["gaps"][which][name]
                rows.append([f"{name}: {label}", *(f"{value:.3f}" for value in values)])
    rows.sort(
        key=lambda row: list(next(iter(drawn.values()))["gaps"]["real"]).index(row[0].split(":")[0])
    )
    leaves = "; ".join(
        f"{name} " + ", ".join(f"{share:.3f}" for share in shares)
        for name, shares in (
            ("real", drawn[WIDTHS[0]]["leaves"]["real"]),
            *((f"drawn {dim:,}", found["leaves"]["drawn"]) for dim, found in drawn.items()),
        )
    )
    here = ", ".join(
        f"{found['first']:.3f} and {found['gap']:.4f} ({dim:,})" for dim, found in drawn.items()
    )
    return Table(
        title="Drawn vectors beside real ones",
        text=(
            "Cosines of a query with its 1st, 5th and 10th neighbour among 7,372 passages, and "
            "the gaps between them: quantiles over the released queries (real) and as many drawn "
            "ones. Share of the 5 nearest in the nearest "
            f"{', '.join(f'{share:.0%}' for share in SHARES)} of 86 k-means leaves: {leaves}. "
            f"Among a million, the median 1st neighbour and gap from 5th to 6th are {here}: more "
            "passages lie closer, as in a larger corpus."
        ),
        header=["", *(f"{quantile:.0%}" for quantile in QUANTILES)],
        rows=rows,
    )


def sampled_tokens(episodes: Sequence[real.Episode]) -> float:
    """WordPiece tokens that a policy wrote in an episode."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([e.written for e in episodes], add_special_tokens=False)
    return statistics.mean(len(e.ids) for e in encoded)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("real", "scale"))
    parser.add_argument("--scratch", default="/tmp/r1s_jax_retrieval")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default=str(DATA), help="the files of R1-Searcher's release")
    args = parser.parse_args()
    scratch, data = Path(args.scratch), Path(args.data)
    scratch.mkdir(parents=True, exist_ok=True)
    index = index_of_passages(scratch, data)
    parts = {
        "real": lambda: real_part(index, data),
        "scale": lambda: scale_part(index, data, scratch, args.rounds),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            (scratch / f"{name}.md").write_text("\n".join(map(str, part())))
    sections = [p.read_text() for name in parts if (p := scratch / f"{name}.md").is_file()]
    head = heading("Searching passages", __file__)
    (HERE / "retrieval.md").write_text("\n".join([head, *sections]))


if __name__ == "__main__":
    main()
