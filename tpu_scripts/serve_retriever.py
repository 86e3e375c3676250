"""Serves a corpus for searching: python tpu_scripts/serve_retriever.py --corpus data/wikipedia

    python tpu_scripts/serve_retriever.py --corpus atlas         # the bundled world, to try it
    curl -d '{"queries": ["Where is Kyoto?"], "topk": 3}' http://127.0.0.1:8000/retrieve

Speaks the formats of Search-R1 and verl (POST /retrieve) and of R1-Searcher (POST /queries); GET
/health says what is served, /metrics how it goes (Prometheus). A corpus folder comes from
build_index.py. SIGTERM or Ctrl-C end it, once the requests that are in are answered. It has no
access control: --host 0.0.0.0 lets everybody search who reaches the machine. Needs:
pip install -r requirements-search.txt
"""

import argparse
import json

import launch


def main() -> None:
    parser = launch.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _add(parser)
    args = parser.parse_args()
    from r1s_jax.retrieval.serving import server
    from r1s_jax.retrieval.serving.wire import Limits

    most = args.largest_k
    if most < 1:
        raise launch.UserError(f"--largest_k {most}: must be at least 1")
    if not 1 <= args.topk <= most:
        raise launch.UserError(f"--topk {args.topk}: must be from 1 to {most}, see --largest_k")
    limits = Limits(default_k=args.topk, largest_k=most, queries=args.queries)
    config = server.ServerConfig(limits=limits, workers=args.workers)
    listening = server.listen(args.host, args.port)  # a taken port is told before the corpus loads
    retriever = _open(args)
    app = server.make_app(retriever, config)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{json.dumps(server.facts_of(retriever))}\nserving at http://{host}:{port}", flush=True)
    server.serve(app, listening)


def _open(args: argparse.Namespace):
    if args.corpus == "atlas":
        from r1s_jax.data.atlas_builder import cache_directory, load_atlas
        from r1s_jax.retrieval.index import load_or_build

        atlas = load_atlas()
        folder = cache_directory() / "index"
        return load_or_build(folder, atlas.corpus, corpus_hash=atlas.corpus_hash)
    from r1s_jax.retrieval.open import open_corpus

    return open_corpus(args.corpus, args.backend, model=args.model)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", metavar="FOLDER", required=True, help="of build_index.py, or atlas"
    )
    parser.add_argument("--backend", choices=("dense", "bm25", "hybrid"), default="dense")
    parser.add_argument("--model", help="folder or hub id of the embedder, where it has moved")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--topk", type=int, default=3, help="documents, if a request tells none")
    parser.add_argument("--largest_k", type=int, default=100, help="that a request may ask for")
    parser.add_argument("--queries", type=int, default=4096, help="in one request at most")
    parser.add_argument("--workers", type=int, default=4, help="searches that run at a time")


if __name__ == "__main__":
    launch.run_main(main)
