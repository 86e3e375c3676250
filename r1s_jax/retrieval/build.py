"""Builds a corpus folder, however large: in stages, resumable, embedded by several hosts.

    passages    documents.jsonl and offsets.npy                          host 0
    embedder    a fitted one is saved; vectors.npy gets its full size    host 0
    vectors     in shards of rows: host i of n takes i, i + n, ...       all
    searchers   scann/ and bm25/, when all shards are there              host 0
    manifest    manifest.json                                            host 0

The hosts share nothing but the folder. What is done stands in `building/`, which goes at the end:
passages.json, embedding.json and a marker for each shard, written after its rows are on the disk.
A build that was killed goes on behind what is there; a shard that was begun is embedded anew. A
vector depends on its passage alone, so all that changes nothing in the outcome.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from r1s_jax.retrieval.ann import AnnConfig, build_searcher, resolve
from r1s_jax.retrieval.bm25 import Bm25Index
from r1s_jax.retrieval.corpora import Passages
from r1s_jax.retrieval.documents import DocumentStore, write_documents
from r1s_jax.retrieval.embed import Embedder, TfidfSvdEmbedder
from r1s_jax.retrieval.index import (
    embedder_record,
    open_vectors,
    passage_vectors,
    used_parameters,
)
from r1s_jax.retrieval.manifest import (
    BM25,
    BUILDING,
    EMBEDDER,
    MANIFEST,
    SCANN,
    VECTORS,
    check_fields,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from r1s_jax.retrieval.shards import Shards
from r1s_jax.types import Document, UserError, require_least

TFIDF, NONE = "tfidf", "none"  # embedders that are no models
_PASSAGES, _EMBEDDING = "passages.json", "embedding.json"
_FIT = 100_000  # passages that an embedder of n-grams is fitted on, spread evenly
_ACCELERATOR_TOKENS = 32_768  # of a batch on one device; a CPU gains nothing by more than 512
_POLL, _REPORT = 1.0, 15.0  # seconds

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What is built, from what, and which part of it here.

    Attributes:
        passages, form: see `corpora.Passages`.
        out: the folder.
        embedder: a model (folder or hub id), `tfidf` or `none`.
        pooling, query_instruction, passage_instruction, max_length, dtype: see
            `SentenceEmbedder`; None leaves them to the model's files.
        bm25: whether an index of words is built, too.
        shard_rows: passages between two markers.
        host, hosts: this is host number `host` of `hosts`.
        skip_bad: leave lines out that are no passages, and count them.
    """

    passages: str
    out: str
    form: str | None = None
    embedder: str = TFIDF
    pooling: str | None = None
    query_instruction: str | None = None
    passage_instruction: str | None = None
    max_length: int | None = None
    dtype: str = "float32"
    bm25: bool = False
    shard_rows: int = 65_536
    host: int = 0
    hosts: int = 1
    skip_bad: bool = False
    ann: AnnConfig = dataclasses.field(default_factory=AnnConfig)

    def __post_init__(self) -> None:
        require_least("BuildConfig", self, {"shard_rows": 1, "hosts": 1, "host": 0})
        if self.host >= self.hosts:
            raise UserError(f"host {self.host} of {self.hosts}: the last one is {self.hosts - 1}")
        if self.embedder == NONE and not self.bm25:
            raise UserError("without an embedder and without bm25 there is nothing to build")
        if self.embedder == NONE and self.hosts > 1:
            raise UserError(f"{self.hosts} hosts share the embedding, and there is no embedder")
        if self.embedder in (TFIDF, NONE):
            for name in ("pooling", "query_instruction", "passage_instruction", "max_length"):
                if (value := getattr(self, name)) is not None:
                    raise UserError(f"{name} = {value!r}: embedder {self.embedder!r} has none")


def build_corpus(config: BuildConfig, say: Say = lambda text: None) -> bool:
    """Builds the folder, or this host's part of it; returns whether it is finished.

    What is there is left as it is; a finished folder gets what it lacks (such as bm25/).

    Raises:
        UserError: something in the input is wrong, or the folder holds another corpus, another
            embedder or something else.
    """
    return _Build(config, say).run()


class _Build:
    def __init__(self, config: BuildConfig, say: Say) -> None:
        self.config, self.say = config, say
        self.folder = pathlib.Path(config.out)
        self.state = self.folder / BUILDING
        self.skipped: list[str] = []
        self.source = Passages(
            config.passages, config.form, skipped=self.skipped if config.skip_bad else None
        )

    def run(self) -> bool:
        first, embeds = self.config.host == 0, self.config.embedder != NONE
        finished = self._finished()
        embeds = embeds and not (finished and finished["embedder"])
        bm25 = self.config.bm25 and not (finished and "bm25" in finished["backends"])
        if finished and not embeds and not bm25:
            made_of = "{name} of {bytes:,} bytes".format_map(finished["source"])
            self.say(f"{self.folder}: is finished, made from {made_of}, and left alone")
            return True
        if embeds and self.config.embedder != TFIDF:
            _ = self._model  # what is wrong with it is told before anything slow
        if bm25:
            Bm25Index.build([Document(id="", title="", text="trial")])  # its libraries are there
        if first:
            self._take_folder(finished)
        corpus = finished or self._passages()
        embedder = None
        if embeds:
            embedder = self._embed(corpus)
            if not first:
                self.say(f"{self.folder}: host {self.config.host} is done, host 0 finishes it")
                return False
        if first:
            self._finish(corpus, embedder)
        return first

    # ------------------------------------------------------------ what is there

    def _finished(self) -> dict[str, Any] | None:
        """The manifest, if there is one; it must be of this corpus and embedder."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        manifest = read_manifest(self.folder)
        self._check_source(path, manifest)
        if self.config.embedder == NONE or not manifest["embedder"]:
            return manifest
        self._check_embedder(path, manifest)
        if self.config.ann != AnnConfig():
            wanted = resolve(self.config.ann, manifest["count"], manifest["embedder"]["dim"])
            values = {f"ann.{name}": v for name, v in dataclasses.asdict(wanted).items()}
            check_fields(path, manifest, values, "now it would be")
        return manifest

    def _take_folder(self, finished: dict[str, Any] | None) -> None:
        if not finished and self.folder.is_dir() and not self.state.is_dir():
            for path in self.folder.iterdir():
                raise UserError(f"{self.folder}: holds {path.name}, so it is no corpus folder")
        self.state.mkdir(parents=True, exist_ok=True)

    def _check_source(self, path: pathlib.Path, found: dict[str, Any]) -> None:
        wanted = {f"source.{name}": value for name, value in self._facts_of_source().items()}
        check_fields(path, found, wanted, f"{self.config.passages} has")

    def _facts_of_source(self) -> dict[str, Any]:
        source = self.source
        return {"name": source.path.name, "bytes": source.bytes, "form": source.form}

    def _check_embedder(self, path: pathlib.Path, found: dict[str, Any]) -> Embedder:
        """This run's embedder, which must be the one of `found`."""
        kind = "tfidf_svd" if self.config.embedder == TFIDF else "sentence"
        check_fields(path, found, {"embedder.kind": kind}, "this run has")
        embedder = self._load_embedder()
        if embedder.fingerprint != found["embedder"].get("fingerprint"):
            record = embedder_record(embedder)
            wanted = {f"embedder.{name}": value for name, value in record.items()}
            check_fields(path, found, wanted, "this run has")
        return embedder

    def _wait(self, path: pathlib.Path, what: str) -> None:
        """Until host 0 has written the file."""
        if not path.is_file():
            self.say(f"waiting until host 0 {what} in {self.folder}")
        while not path.is_file():
            time.sleep(_POLL)

    # ------------------------------------------------------------ passages

    def _passages(self) -> dict[str, Any]:
        """{"source", "count", "corpus_hash"} of the passages; host 0 writes them first."""
        path = self.state / _PASSAGES
        if self.config.host:
            self._wait(path, "has written the passages")
        elif not path.is_file():
            count, corpus_hash = write_documents(self.folder, self._counted())
            for fault in self.skipped[:10]:
                self.say(f"left out: {fault}")
            bad = f", {len(self.skipped):,} bad lines left out" if self.skipped else ""
            self.say(f"{count:,} passages{bad}")
            source = self._facts_of_source() | {"skipped": len(self.skipped)}
            write_json(path, {"source": source, "count": count, "corpus_hash": corpus_hash})
        corpus = read_json(path)
        self._check_source(path, corpus)
        return corpus

    def _counted(self) -> Iterator[Document]:
        progress = _Progress(self.say, "passages read")
        for document in self.source:
            yield document
            progress.add(1, self.source.share)

    # ------------------------------------------------------------ vectors

    def _embed(self, corpus: dict[str, Any]) -> Embedder:
        """This host's shards, as far as they are missing; host 0 waits for the others'."""
        host, hosts = self.config.host, self.config.hosts
        embedder, shards = self._plan(corpus)
        store, weight = DocumentStore(self.folder), _title_weight(embedder)
        check_fields(self.state, corpus, {"count": len(store)}, f"{self.folder} holds")
        missing = [s for s in shards.missing() if s % hosts == host]
        total = sum(len(shards.rows(s)) for s in missing)
        self.say(f"{total:,} of {len(store):,} passages to be embedded by host {host} of {hosts}")
        progress = _Progress(self.say, "passages embedded", total)
        for shard in missing:
            shards.write(
                shard,
                lambda rows: passage_vectors(store[rows.start : rows.stop], embedder, weight),
                progress.add,
            )
        said = -math.inf
        while host == 0 and (missing := shards.missing()):
            if time.monotonic() - said > 60:
                late = ", ".join(str(h) for h in sorted({s % hosts for s in missing}))
                self.say(f"waiting for {len(missing)} shards of host {late}")
                said = time.monotonic()
            time.sleep(_POLL)
        return embedder

    def _plan(self, corpus: dict[str, Any]) -> tuple[Embedder, Shards]:
        """Embedder and shards, the same on all hosts: vectors.npy is there afterwards."""
        path = self.state / _EMBEDDING
        if self.config.host:
            self._wait(path, "has prepared the embedding")
        if path.is_file():
            plan = read_json(path)
            rows = {"shard_rows": self.config.shard_rows}
            check_fields(path, plan, rows, "this run has")
            embedder = self._check_embedder(path, plan)
        else:
            embedder = self._load_embedder()
        resolve(self.config.ann, corpus["count"], embedder.dim)  # refuses what does not fit
        made_of = {"embedder": embedder.fingerprint, "corpus_hash": corpus["corpus_hash"]}
        shards = Shards(
            folder=self.folder,
            state=self.state,
            count=corpus["count"],
            dim=embedder.dim,
            shard_rows=self.config.shard_rows,
            made_of=made_of,
        )
        if self.config.host == 0:
            shards.allocate()
            record = embedder_record(embedder)
            write_json(path, {"embedder": record, "shard_rows": self.config.shard_rows})
        return embedder, shards

    def _load_embedder(self) -> Embedder:
        if self.config.embedder == TFIDF:
            if not (self.folder / EMBEDDER).is_dir():
                self._fit()
            return TfidfSvdEmbedder.load(self.folder / EMBEDDER)
        return self._model

    @functools.cached_property
    def _model(self) -> Embedder:
        c = self.config
        import jax

        from r1s_jax.retrieval.sentence import SentenceEmbedder

        tokens = 512 if jax.local_devices()[0].platform == "cpu" else _ACCELERATOR_TOKENS
        return SentenceEmbedder(
            c.embedder,
            pooling=c.pooling,
            query_instruction=c.query_instruction,
            passage_instruction=c.passage_instruction,
            max_length=c.max_length,
            dtype=c.dtype,
            tokens_per_device=tokens,
        )

    def _fit(self) -> None:
        store = DocumentStore(self.folder)
        rows = np.linspace(0, len(store) - 1, min(len(store), _FIT)).astype(int)
        self.say(f"fitting an embedder on {len(rows):,} passages")
        some = [store[int(row)] for row in rows]
        embedder = TfidfSvdEmbedder().fit([d.title for d in some] + [d.text for d in some])
        draft = _emptied(self.state / EMBEDDER)
        embedder.save(draft)
        draft.rename(self.folder / EMBEDDER)

    # ------------------------------------------------------------ searchers and manifest

    def _finish(self, corpus: dict[str, Any], embedder: Embedder | None) -> None:
        """`embedder` is that of this build, None where nothing was embedded in it."""
        record, weight, ann = corpus.get("embedder"), corpus.get("title_weight"), corpus.get("ann")
        if embedder is not None:
            vectors_ND = open_vectors(self.folder / VECTORS)
            parameters = resolve(self.config.ann, *vectors_ND.shape)
            how = "exact" if parameters.exact else parameters
            self.say(f"building the search over {len(vectors_ND):,} vectors: {how}")
            searcher = build_searcher(vectors_ND, parameters)
            shutil.rmtree(self.folder / SCANN, ignore_errors=True)  # of a build that was killed
            draft = _emptied(self.state / SCANN)
            searcher.save(draft)
            if draft.is_dir():
                draft.rename(self.folder / SCANN)
            record, weight = embedder_record(embedder), _title_weight(embedder)
            ann = used_parameters(searcher)
        if self.config.bm25 and not (self.folder / BM25).is_dir():
            self.say(f"building the index of words over {corpus['count']:,} passages")
            draft = _emptied(self.state / BM25)
            Bm25Index.build(DocumentStore(self.folder)).save(draft)
            draft.rename(self.folder / BM25)
        write_manifest(
            self.folder,
            count=corpus["count"],
            corpus_hash=corpus["corpus_hash"],
            source=corpus["source"],
            embedder=record,
            title_weight=weight,
            ann=ann,
        )
        shutil.rmtree(self.state)
        self.say(f"{self.folder}: finished")


class _Progress:
    """Now and then a line: how many so far, how fast, and how long it will still take."""

    def __init__(self, say: Say, what: str, total: int | None = None) -> None:
        self._say, self._what, self._total = say, what, total
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def add(self, count: int, share: float | None = None) -> None:
        """`share` of the work is done now, where there is no total."""
        self._done += count
        now = time.monotonic()
        complete = self._done == self._total
        if now - self._said < _REPORT and not complete:
            return
        self._said, seconds = now, max(now - self._begun, 1e-9)
        share = self._done / self._total if self._total else share or 0.0
        left = f", {_clock(seconds / share - seconds)} left" if share and not complete else ""
        of = f" of {self._total:,}" if self._total else ""
        self._say(f"{self._done:,}{of} {self._what}, {self._done / seconds:,.0f}/s{left}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _title_weight(embedder: Embedder) -> float | None:
    """Models of sentences read `title text`; n-grams are weighed."""
    return 1.0 if isinstance(embedder, TfidfSvdEmbedder) else None


def _emptied(path: pathlib.Path) -> pathlib.Path:
    """A place for a draft: whatever a killed build left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    return path
