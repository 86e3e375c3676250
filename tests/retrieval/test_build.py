"""Corpus folders in stages: whatever is killed, and however many hosts embed, the same bytes."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from r1s_jax.retrieval import build as build_module
from r1s_jax.retrieval import shards as shards_module
from r1s_jax.retrieval.ann import AnnConfig
from r1s_jax.retrieval.build import BuildConfig, build_corpus
from r1s_jax.retrieval.documents import DocumentStore
from r1s_jax.retrieval.embed import TfidfSvdEmbedder
from r1s_jax.retrieval.sentence import SentenceEmbedder
from r1s_jax.types import Document, UserError
from tests.sentence_model import sentences, write_model

COUNT = 40
PASSAGES = [
    Document(id=f"p{i}", title=f"T{i}", text=f"{text} é🦉 number {i}")
    for i, text in enumerate(sentences(COUNT))
]
FIXED = ("documents.jsonl", "offsets.npy", "vectors.npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    rows = ({"id": d.id, "title": d.title, "text": d.text} for d in PASSAGES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(passages, tmp_path):
    def make(**changes):
        settings = {"embedder": "tfidf", "shard_rows": 7, "out": str(tmp_path / "corpus")}
        return BuildConfig(passages=str(passages), **{**settings, **changes})

    return make


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(config):
    """The error's line; files that were there are there as they were."""
    folder = pathlib.Path(config.out)
    before = contents(folder)
    with pytest.raises(UserError) as e:
        build_corpus(config)
    assert "\n" not in str(e.value) and before.items() <= contents(folder).items()
    return str(e.value)


# ---------------------------------------------------------------- what is built


def test_a_model_embeds_title_and_text_as_one(config, model, tmp_path):
    said = []
    done = config(embedder=str(model), query_instruction="which ", max_length=20, bm25=True)
    assert build_corpus(done, said.append)
    folder = tmp_path / "corpus"
    assert list(DocumentStore(folder)) == PASSAGES
    embedder = SentenceEmbedder(model, query_instruction="which ", max_length=20)
    vectors_ND = np.load(folder / "vectors.npy")
    assert (vectors_ND == embedder.embed([f"{d.title} {d.text}" for d in PASSAGES])).all()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["embedder"] == {
        "kind": "sentence",
        "model": str(model),
        "pooling": "mean",
        "query_instruction": "which ",
        "passage_instruction": "",
        "max_length": 20,
        "dtype": "float32",
        "fingerprint": embedder.fingerprint,
        "dim": 32,
    }
    assert manifest["backends"] == ["dense", "bm25"] and manifest["title_weight"] is None
    size = (tmp_path / "passages.jsonl").stat().st_size
    source = {"name": "passages.jsonl", "bytes": size, "form": "jsonl", "skipped": 0}
    assert manifest["source"] == source and manifest["count"] == COUNT
    files = {name: len(data) for name, data in contents(folder).items() if name != "manifest.json"}
    assert manifest["files"] == files
    assert not [name for name in files if name.startswith(("building", "."))]
    assert any(line.startswith("40 of 40 passages embedded, ") for line in said)
    assert said[-1] == f"{folder}: finished"


def test_n_grams_are_weighed_and_fitted_on_some(config, tmp_path, monkeypatch):
    """Fitted on passages spread over the whole corpus where there are too many."""
    monkeypatch.setattr(build_module, "_FIT", 14)
    assert build_corpus(config())
    folder = tmp_path / "corpus"
    some = PASSAGES[::3]
    fitted = TfidfSvdEmbedder().fit([d.title for d in some] + [d.text for d in some])
    assert TfidfSvdEmbedder.load(folder / "embedder").fingerprint == fitted.fingerprint
    vectors_ND = fitted.embed([d.title for d in PASSAGES]).astype(np.float64)
    vectors_ND += fitted.embed([d.text for d in PASSAGES])
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(folder / "vectors.npy"), vectors_ND, atol=1e-6)


def test_words_alone(config, tmp_path):
    assert build_corpus(config(embedder="none", bm25=True))
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert (manifest["backends"], manifest["embedder"]) == (["bm25"], None)
    assert not (tmp_path / "corpus" / "vectors.npy").exists()


def test_a_tree_for_a_large_corpus(config, tmp_path):
    pytest.importorskip("scann")
    ann = AnnConfig(exact=False, leaves=4, leaves_to_search=4, training_sample=COUNT)
    assert build_corpus(config(ann=ann))
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["ann"]["leaves"] == 4 and (tmp_path / "corpus" / "scann").is_dir()
    assert any(name.startswith("scann/") for name in manifest["files"])
    told = refused(config(ann=AnnConfig(exact=False, leaves=5)))
    assert 'field "ann.leaves" is 4, now it would be 5' in told
    large = config(ann=AnnConfig(exact=False, leaves=41), out=str(tmp_path / "other"))
    assert "AnnConfig.leaves = 41, the corpus has 40 passages" in refused(large)
    assert not (tmp_path / "other" / "vectors.npy").exists()


def test_bad_lines_are_left_out_and_counted(config, passages, tmp_path):
    lines = passages.read_text().splitlines()
    lines[3:3] = ["{", json.dumps({"id": "p0", "title": "", "text": "again"})]
    passages.write_text("\n".join(lines))
    assert refused(config()).startswith(f"{passages}:4: not a line of JSON")
    said = []
    assert build_corpus(config(skip_bad=True), said.append)
    assert list(DocumentStore(tmp_path / "corpus")) == PASSAGES
    assert f"left out: {passages}:5: field \"id\": 'p0' stands on line 1 already" in said
    assert "40 passages, 2 bad lines left out" in said
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["source"]["skipped"] == 2


# ---------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    pass


def test_a_killed_embedding_goes_on_where_it_was(config, model, tmp_path, monkeypatch):
    """Killed in the middle of shard 2: what it wrote of it is written anew, 0 and 1 are not."""
    settings = {"embedder": str(model), "max_length": 16}
    assert build_corpus(config(**settings, out=str(tmp_path / "whole")))
    monkeypatch.setattr(shards_module, "_BLOCK", 3)
    embedded, embed = [], build_module.passage_vectors

    def watched(documents, *rest):
        embedded.extend(d.id for d in documents)
        if len(embedded) == 7 + 7 + 6 and resumed is None:
            raise Killed
        return embed(documents, *rest)

    monkeypatch.setattr(build_module, "passage_vectors", watched)
    resumed = None
    with pytest.raises(Killed):
        build_corpus(config(**settings))
    folder = tmp_path / "corpus"
    assert not (folder / "manifest.json").exists()
    written = np.abs(np.load(folder / "vectors.npy")).sum(axis=1) > 0
    assert written.tolist() == [True] * 17 + [False] * 23
    markers = sorted(p.name for p in (folder / "building").glob("shard-*"))
    assert markers == ["shard-000000.json", "shard-000001.json"]
    resumed, said = True, []
    embedded.clear()
    assert build_corpus(config(**settings), said.append)
    assert embedded == [d.id for d in PASSAGES[14:]]
    assert any(line.startswith("26 of 40 passages to be embedded") for line in said)
    assert contents(folder) == contents(tmp_path / "whole")


KILLER = """
import os, signal, sys
import sklearn.decomposition
from r1s_jax.retrieval import build, shards
from r1s_jax.retrieval.build import BuildConfig, build_corpus

config = BuildConfig(passages=sys.argv[1], out=sys.argv[2], embedder="tfidf", shard_rows=7)
shards._BLOCK = 3
left = 0

def killing(f):
    def step(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args)
    return step

build.passage_vectors = killing(build.passage_vectors)
os.fsync = killing(os.fsync)
for left in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        build_corpus(config)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
"""


def test_sigkill_in_every_stage(config, tmp_path, passages):
    """Processes that are killed at their n-th step, one after the other, on one folder.

    A step is a block of passages embedded or a file forced to the disk. So: the passages, their
    offsets, the first block, the last block of a shard, and the manifest.
    """
    assert build_corpus(config(out=str(tmp_path / "whole")))
    folder, root = tmp_path / "corpus", pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLER, passages, folder, "1", "2", "5", "9", "26", "999"]
    codes = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.split()
    assert [int(code) for code in codes] == [-signal.SIGKILL] * 5 + [0]
    assert contents(folder) == contents(tmp_path / "whole")


def test_damaged_markers_and_removed_vectors_are_made_anew(config, tmp_path, monkeypatch):
    assert build_corpus(config(out=str(tmp_path / "whole")))
    monkeypatch.setattr(build_module, "write_manifest", lambda *a, **k: 1 / 0)
    for spoil in (
        lambda folder: (folder / "building" / "shard-000001.json").write_text('{"rows":'),
        lambda folder: (folder / "building" / "shard-000005.json").write_text("{}"),
        lambda folder: (folder / "vectors.npy").unlink(),
    ):
        with pytest.raises(ZeroDivisionError):
            build_corpus(config())
        for path in tmp_path.glob("corpus/vectors.npy"):
            assert path.read_bytes() == (tmp_path / "whole" / "vectors.npy").read_bytes()
        spoil(tmp_path / "corpus")
    monkeypatch.undo()
    assert build_corpus(config())
    assert contents(tmp_path / "corpus") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- several hosts


@pytest.mark.parametrize("first", [0, 2])
def test_hosts_share_the_work(config, tmp_path, monkeypatch, first):
    """Whoever begins, host 0 prepares and finishes; each passage is embedded once."""
    monkeypatch.setattr(build_module, "_POLL", 0.01)
    assert build_corpus(config(out=str(tmp_path / "whole")))
    embedded, embed = [], build_module.passage_vectors
    monkeypatch.setattr(
        build_module,
        "passage_vectors",
        lambda documents, *rest: embedded.extend(documents) or embed(documents, *rest),
    )
    finished, said = {}, {host: [] for host in range(3)}

    def run(host):
        finished[host] = build_corpus(config(host=host, hosts=3), said[host].append)

    waits = {
        0: "waiting for 4 shards of host 1, 2",
        2: f"waiting until host 0 has written the passages in {tmp_path / 'corpus'}",
    }
    threads = {host: threading.Thread(target=run, args=(host,)) for host in range(3)}
    threads[first].start()
    end = time.monotonic() + 30
    while waits[first] not in said[first] and time.monotonic() < end:
        time.sleep(0.01)
    for host in set(threads) - {first}:
        threads[host].start()
    for thread in threads.values():
        thread.join(30)
    assert waits[first] in said[first]
    assert finished == {0: True, 1: False, 2: False}
    assert sorted(d.id for d in embedded) == sorted(d.id for d in PASSAGES)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "whole")
    for host in range(3):
        run(host)
        assert finished[host] and said[host][-1].endswith(" bytes, and left alone")


# ---------------------------------------------------------------- folders that hold something


def test_a_finished_folder_is_left_alone_or_gets_what_it_lacks(config, tmp_path, monkeypatch):
    build_corpus(config())
    before = contents(tmp_path / "corpus")
    monkeypatch.setattr(build_module, "passage_vectors", lambda *_: pytest.fail("embedded again"))
    said = []
    assert build_corpus(config(), said.append) and contents(tmp_path / "corpus") == before
    made_of = f"passages.jsonl of {(tmp_path / 'passages.jsonl').stat().st_size:,} bytes"
    assert said == [f"{tmp_path / 'corpus'}: is finished, made from {made_of}, and left alone"]
    with monkeypatch.context() as patch:  # killed when bm25/ is there, before the manifest is
        patch.setattr(build_module, "write_manifest", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_corpus(config(bm25=True))
    assert build_corpus(config(bm25=True))
    after = contents(tmp_path / "corpus")
    assert {name: after[name] for name in FIXED} == {name: before[name] for name in FIXED}
    old, new = (json.loads(c["manifest.json"]) for c in (before, after))
    assert new["backends"] == ["dense", "bm25"]
    for field in ("corpus_hash", "source", "embedder", "title_weight", "ann"):
        assert new[field] == old[field]
    monkeypatch.undo()
    build_corpus(config(embedder="none", bm25=True, out=str(tmp_path / "words")))
    build_corpus(config(out=str(tmp_path / "words")))
    assert (tmp_path / "words" / "vectors.npy").read_bytes() == before["vectors.npy"]
    both = json.loads((tmp_path / "words" / "manifest.json").read_text())
    assert both["backends"] == ["dense", "bm25"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_corpus_or_embedder_is_refused(
    config, model, passages, tmp_path, monkeypatch, finished
):
    same = {"embedder": str(model), "max_length": 16}
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(build_module, "write_manifest", lambda *a, **k: 1 / 0)
        try:
            build_corpus(config(**same))
        except ZeroDivisionError:
            assert not finished
    where = f'/{"manifest" if finished else "building/embedding"}.json: field "embedder.'
    assert f"{where}kind\" is 'sentence', this run has 'tfidf_svd'" in refused(config())
    changed = config(**same, pooling="cls")
    assert f"{where}pooling\" is 'mean', this run has 'cls'" in refused(changed)
    changed = config(**same, query_instruction="q ")
    assert f"{where}query_instruction\" is '', this run has 'q '" in refused(changed)
    other = write_model(tmp_path / "other", seed=1)
    assert f"{where}model\" is '{model}', this run has '{other}'" in refused(
        config(**same | {"embedder": str(other)})
    )
    if not finished:
        told = refused(config(**same, shard_rows=9))
        assert 'embedding.json: field "shard_rows" is 7, this run has 9' in told
    text = passages.read_text()
    passages.write_text(text + '{"id": "new", "title": "", "text": "x"}\n')
    told = refused(config(**same))
    size = len(text.encode())
    assert f'field "source.bytes" is {size}, {passages} has {size + 40}' in told
    passages.write_text(text)
    renamed = passages.rename(passages.with_name("other.jsonl"))
    told = refused(BuildConfig(**{**vars(config(**same)), "passages": str(renamed)}))
    assert "field \"source.name\" is 'passages.jsonl', " in told and "has 'other.jsonl'" in told
    renamed.rename(passages)
    shutil.copytree(model, tmp_path / "moved")
    assert build_corpus(
        config(**same | {"embedder": str(tmp_path / "moved")})
    )  # the same weights elsewhere


def test_other_refusals(config, tmp_path, monkeypatch):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "a.tex").write_text("x")
    assert refused(config(out=str(folder))) == f"{folder}: holds a.tex, so it is no corpus folder"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9))
    assert "vectors.npy: takes " in refused(config()) and "9 are free" in refused(config())
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "passage_vectors", with_nan)
    assert refused(config()).startswith("the vector of passage 2 is not finite")
    for bad, told in (
        ({"host": 2, "hosts": 2}, "host 2 of 2: the last one is 1"),
        ({"shard_rows": 0}, r"BuildConfig\.shard_rows = 0, must be at least 1"),
        ({"embedder": "none"}, "nothing to build"),
        ({"embedder": "none", "bm25": True, "hosts": 2}, "2 hosts share the embedding"),
        ({"pooling": "cls"}, "pooling = 'cls': embedder 'tfidf' has none"),
        ({"passages": "nowhere"}, "nowhere: no such file of passages"),
    ):
        with pytest.raises(UserError, match=told):
            build_corpus(BuildConfig(**{**vars(config()), **bad}))


def with_nan(documents, embedder, title_weight):
    vectors_ND = np.ones((len(documents), embedder.dim), np.float32)
    vectors_ND[2:] = np.nan
    return vectors_ND
