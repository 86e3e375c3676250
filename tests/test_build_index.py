"""build_index.py from the command line's side."""

import importlib
import json
import pathlib
import sys

import pytest

import launch
from r1s_jax.retrieval.open import open_corpus
from r1s_jax.types import UserError


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the script's main in this process, in a folder with passages.jsonl."""
    rows = ({"id": i, "title": f"Town {i}", "text": f"It has {i * i} people."} for i in range(20))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "passages.jsonl").write_text(text + '{"id": 3, "contents": "again"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "prepare_environment", lambda: None)

    def run(*args):
        given = ["build_index", "--passages", "passages.jsonl", "--out", "corpus", *args]
        monkeypatch.setattr(sys, "argv", given)
        return importlib.import_module("build_index").main()

    return run


def test_it_builds_what_open_corpus_opens(call, capsys):
    options = ["--embedder", "tfidf", "--bm25", "--skip_bad", "--shard_rows", "6"]
    assert call(*options, "--ann", "exact=true", "--host", "0/1") is None
    out = capsys.readouterr().out
    assert "left out: passages.jsonl:21: field \"id\": '3' stands on line 4 already\n" in out
    assert out.endswith("corpus: finished\n") and "20 of 20 passages embedded" in out
    for backend in ("dense", "bm25", "hybrid"):
        (found,) = open_corpus("corpus", backend).search(["Town 7"], 1)
        assert found[0].id == "7"
    assert call(*options) is None
    made_of = f"passages.jsonl of {pathlib.Path('passages.jsonl').stat().st_size:,} bytes"
    told = f"corpus: is finished, made from {made_of}, and left alone\n"
    assert capsys.readouterr().out == told


def test_an_unknown_model_is_told_before_the_passages_are_read(call, tmp_path):
    """They take an hour: it used to be told after them."""
    told = r"^\./nowhere: no such folder, and no id of the hub \(OWNER/NAME\)$"
    with pytest.raises(UserError, match=told):
        call("--embedder", "./nowhere", "--skip_bad")
    assert not (tmp_path / "corpus").exists()


def test_packages_that_are_missing_are_told_before_the_passages_are_read(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match="bm25s is not installed"):
        call("--embedder", "none", "--bm25", "--skip_bad")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], r"passages\.jsonl:21: field \"id\": '3' stands on line 4 already; --skip_bad leaves"),
        (["--host", "1"], "--host: must be I/N, such as 0/4"),
        (["--host", "4/4"], "host 4 of 4: the last one is 3"),
        (["--ann", "leafs=3"], "--ann leafs=3: must be NAME=VALUE, with exact, leaves, "),
        (["--ann", "leaves=three"], "--ann leaves=three: the value is no int"),
        (["--ann", "exact=1"], "--ann exact=1: the value is no bool"),
        (["--ann", "leaves=1"], r"AnnConfig\.leaves = 1, must be at least 2"),
        (["--ann", "precision=int4"], r"AnnConfig\.precision = 'int4', must be one of"),
        (["--embedder", "none"], "nothing to build"),
        (["--form", "xml"], "argument --form: invalid choice: 'xml'"),
        (["--config", "tiny"], "unrecognized arguments: --config tiny"),
    ],
)
def test_refusals(call, tmp_path, args, told):
    with pytest.raises(UserError, match=told) as e:
        call("--embedder", "tfidf", *args)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "corpus" / "documents.jsonl").exists()
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_the_papers_model_gets_the_papers_instruction(call, monkeypatch):
    """Its files do not name one, and without it the same weights find less."""
    from r1s_jax.retrieval import build

    given = []
    monkeypatch.setattr(build, "build_corpus", lambda config, say: given.append(config))
    call()
    call("--query_instruction", "")
    call("--embedder", "tfidf")
    told = "Represent this sentence for searching relevant passages:"
    assert [c.query_instruction for c in given] == [told, "", None]
    assert [c.embedder for c in given] == ["BAAI/bge-large-en-v1.5"] * 2 + ["tfidf"]
