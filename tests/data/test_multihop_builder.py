import dataclasses
import hashlib
import http.server
import json
import pathlib
import subprocess
import sys
import threading

import pytest

from r1s_jax.data import multihop_builder
from r1s_jax.data.multihop import SOURCES
from r1s_jax.data.multihop_builder import load_questions
from r1s_jax.data.questions import read_questions
from r1s_jax.types import UserError
from tests.data import published

REAL = pathlib.Path(__file__).parents[3] / "shared/data/r1_searcher"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1S_JAX_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def manual(cache):
    """Puts files into the manual folder of a data set."""

    def put(data_set, files):
        folder = cache / "manual" / data_set
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    return put


@pytest.fixture
def server(monkeypatch):
    """A server on this machine in place of the real ones; `pages` and `asked` are the test's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            page = pages.get(self.path)
            self.send_response(200 if page is not None else 404)
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_):
            pass

    class Server:
        def publish(self, name, page, **changes):
            source = SOURCES[name]
            pages[f"/{source.file.replace(' ', '_')}"] = page
            url = f"http://127.0.0.1:{listening.server_port}/{source.file.replace(' ', '_')}"
            changed = dataclasses.replace(source, url=url, **{"sha256": "", **changes})
            monkeypatch.setitem(SOURCES, name, changed)
            return url

    pages, asked = {}, []
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    made = Server()
    made.pages, made.asked = pages, asked
    yield made
    listening.shutdown()
    listening.server_close()
    thread.join()


def _left(cache):
    """What is prepared, or was left half prepared."""
    return (
        [p.name for p in (cache / "questions").iterdir()] if (cache / "questions").exists() else []
    )


HTML = b"<!DOCTYPE html><html><title>Sign in</title></html>"


# ---------------------------------------------------------------- files put there by hand


def test_a_file_put_there_by_hand(cache, manual):
    manual("hotpotqa", {"hotpot_train_v1.1.json": json.dumps(published.HOTPOTQA).encode()})
    questions = load_questions("hotpotqa:train")
    found = [(q.id, q.text, q.answers, q.kind, q.gold_documents) for q in questions]
    assert found == published.HOTPOTQA_READ
    assert load_questions("hotpotqa:train") == questions
    assert [name.split("-")[:2] for name in _left(cache)] == [["hotpotqa", "train"]]


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_or_what_was_in_it(packed, manual):
    files = published.twowiki_members()
    files = {"data_ids_april7.zip": published.archive(files)} if packed else files
    manual("2wikimultihopqa", {k: v for k, v in files.items() if "/" not in k})
    questions = load_questions("2wikimultihopqa:validation")
    assert [q.answers for q in questions] == published.TWOWIKI_ANSWERS
    assert len(load_questions("2wikimultihopqa:train")) == 1


def test_a_file_that_is_not_the_published_one_is_told(manual, monkeypatch, capsys):
    data = published.json_lines(published.R1_SEARCHER)
    folder = manual("r1_searcher", {"stage_1.jsonl": data})
    told = f"r1_searcher:stage1: {folder / 'stage_1.jsonl'} is not the published file: "
    for _ in range(2):  # also when it is read from the cache
        load_questions("r1_searcher:stage1")
        assert f"{told}2 rows, 350 were published\n" in capsys.readouterr().err
    source = SOURCES["r1_searcher:stage1"]
    for sha256, strange in (("0" * 64, True), (hashlib.sha256(data).hexdigest(), False)):
        changed = dataclasses.replace(source, rows=2, sha256=sha256)
        monkeypatch.setitem(SOURCES, "r1_searcher:stage1", changed)
        load_questions("r1_searcher:stage1")
        assert (f"{told}sha256 " in capsys.readouterr().err) == strange


def test_nothing_stale_is_read(cache, manual):
    rows = published.R1_SEARCHER
    manual("r1_searcher", {"stage_1.jsonl": published.json_lines(rows)})
    assert [q.id for q in load_questions("r1_searcher:stage1")] == ["37653", "2"]
    folder = manual("r1_searcher", {"stage_1.jsonl": published.json_lines(rows[::-1])})
    assert [q.id for q in load_questions("r1_searcher:stage1")] == ["2", "37653"]
    assert load_questions("r1_searcher:stage1") == read_questions(folder / "stage_1.jsonl")
    assert len(_left(cache)) == 2


def test_bad_rows_are_named_also_when_they_come_from_the_cache(cache, manual, monkeypatch):
    rows = [published.MUSIQUE[0], {"id": "x", "question": "Q"}, *published.MUSIQUE[1:], 7]
    name = "musique_ans_v1.0_dev.jsonl"
    path = manual("musique", {name: published.json_lines(rows)}) / name
    for _ in range(2):
        with pytest.raises(UserError) as error:
            load_questions("musique:validation")
        message = f'{path}:2: field "answer" is missing; 1 more bad rows (--skip_bad leaves '
        assert str(error.value).startswith(message)
        skipped = []
        assert len(load_questions("musique:validation", skipped=skipped)) == 2
        assert skipped == [
            f'{path}:2: field "answer" is missing',
            f"{path}:4: must be a JSON object, is a int",
        ]
        monkeypatch.setattr(multihop_builder, "_prepare", lambda *_: pytest.fail("prepared again"))


def test_a_file_that_is_broken_leaves_nothing(cache, manual):
    text = json.dumps(published.HOTPOTQA).encode()
    folder = manual("hotpotqa", {"hotpot_dev_distractor_v1.json": text[:-1]})
    with pytest.raises(UserError) as error:
        load_questions("hotpotqa:validation")
    assert str(error.value) == f"{folder / 'hotpot_dev_distractor_v1.json'}: after row 2: cut off"
    folder = manual("musique", {"musique_v1.0.zip": published.archive({"readme": b""})})
    path = folder / "musique_v1.0.zip"
    with pytest.raises(UserError) as error:
        load_questions("musique:train")
    member = "musique_ans_v1.0_train.jsonl"
    assert str(error.value) == f"{path} ({member}): holds no {member}"
    path.write_bytes(HTML)
    with pytest.raises(UserError, match=r"cannot be read: File is not a zip file$"):
        load_questions("musique:train")
    assert _left(cache) == []


def test_an_archive_whose_content_is_damaged(cache, manual):
    """Some damage shows only when a member is unpacked, as zlib's own error."""
    data = bytearray(published.archive({"musique_ans_v1.0_dev.jsonl": b"x" * 10_000}))
    start = data.index(b".jsonl") + len(b".jsonl")
    data[start : start + 8] = b"\xff" * 8
    manual("musique", {"musique_v1.0.zip": bytes(data)})
    with pytest.raises(UserError, match=r"musique_v1\.0\.zip .*: cannot be read: Error -3"):
        load_questions("musique:validation")


@pytest.mark.parametrize("skipped", [None, []])
def test_a_file_without_a_good_row(skipped, cache, manual):
    folder = manual("hotpotqa", {"hotpot_dev_distractor_v1.json": b"[]"})
    path = folder / "hotpot_dev_distractor_v1.json"
    with pytest.raises(UserError) as error:
        load_questions("hotpotqa:validation", skipped=skipped)
    assert str(error.value) == f"{path}: holds no questions"
    path.write_bytes(b"[1]")
    with pytest.raises(
        UserError, match=r"no questions; 1 bad rows, the first is .* row 1: must be"
    ):
        load_questions("hotpotqa:validation", skipped=skipped)


def test_a_cache_that_cannot_be_written(cache, manual):
    manual("hotpotqa", {"hotpot_dev_distractor_v1.json": json.dumps(published.HOTPOTQA).encode()})
    (cache / "questions").write_text("a file")
    with pytest.raises(UserError, match=r"questions/hotpotqa-validation-\w+: cannot be written: "):
        load_questions("hotpotqa:validation")


def test_a_damaged_cache_is_a_user_error(cache, manual):
    manual("r1_searcher", {"stage_1.jsonl": published.json_lines(published.R1_SEARCHER)})
    load_questions("r1_searcher:stage1")
    (record,) = cache.glob("questions/*/**/*.array_record*")
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UserError, match="remove it to make it anew"):
        load_questions("r1_searcher:stage1")


# ---------------------------------------------------------------- downloads


def test_a_download_is_fetched_once(cache, server, capfd):
    rows = len(published.BAMBOOGLE_ANSWERS)
    url = server.publish("bamboogle:test", published.BAMBOOGLE, rows=rows)
    questions = load_questions("bamboogle:test")
    assert [q.answers for q in questions] == published.BAMBOOGLE_ANSWERS
    assert capfd.readouterr().err == f"bamboogle:test: preparing it once from {url}\n"
    asked = len(server.asked)
    server.pages.clear()
    assert load_questions("bamboogle:test") == questions
    assert len(server.asked) == asked and capfd.readouterr().err == ""


def test_what_was_put_there_by_hand_goes_before_the_download(server, manual):
    server.publish("bamboogle:test", published.BAMBOOGLE, rows=5)
    load_questions("bamboogle:test")
    asked = len(server.asked)
    manual("bamboogle", {"Bamboogle Prerelease - Sheet1.csv": b"Question,Answer\nWho?,Ada\n"})
    (question,) = load_questions("bamboogle:test")
    assert question.text == "Who?" and len(server.asked) == asked


def test_an_archive_is_fetched_and_its_other_splits_are_left_alone(server):
    page = published.archive(published.musique_members())
    server.publish("musique:validation", page, rows=2)
    assert [q.kind for q in load_questions("musique:validation")] == ["2hop", "3hop"]


def _remedy(cache, name):
    source, data_set = SOURCES[name], name.split(":")[0]
    place = cache / "manual" / data_set / source.file
    return f"; get {source.file} from {source.page} and put it at {place}"


@pytest.mark.parametrize(
    ("page", "changes", "wrong"),
    [
        (None, {}, "cannot be fetched (HTTP 404)"),
        (HTML, {}, "cannot be read: File is not a zip file"),
        ("whole", {"sha256": "0" * 64}, "is not the published file: sha256 "),
        ("whole", {"rows": 3}, "has 2 rows, 3 were published"),
        (published.archive({}), {}, "holds no musique_ans_v1.0_dev.jsonl"),
    ],
    ids=["missing", "a page", "checksum", "rows", "another archive"],
)
def test_a_download_that_is_not_the_file_is_refused_and_not_kept(
    cache, server, page, changes, wrong
):
    """Something else that was served once (a page to sign in) must not stay in the cache."""
    name, whole = "musique:validation", published.archive(published.musique_members())
    page = whole if page == "whole" else page
    url = server.publish(name, page, **{"rows": 2, **changes})
    with pytest.raises(UserError) as error:
        load_questions(name)
    message = str(error.value)
    assert message.startswith(f"{url} (musique_ans_v1.0_dev.jsonl): {wrong}")
    assert message.endswith(_remedy(cache, name)) and "\n" not in message
    assert _left(cache) == []
    server.publish(name, whole, rows=2)
    assert len(load_questions(name)) == 2


def test_no_connection_is_said_at_once_and_with_the_place_for_the_file(cache, monkeypatch):
    """TFDS alone tries for minutes."""
    name = "2wikimultihopqa:validation"
    url = "http://127.0.0.1:9/data_ids_april7.zip"
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], url=url))
    with pytest.raises(UserError) as error:
        load_questions(name)
    why = f"{url} (dev.json): cannot be fetched (ConnectionError)"
    assert str(error.value) == why + _remedy(cache, name)
    assert _left(cache) == []


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    ("split", "file", "count"),
    [
        ("stage1", "stage_1.jsonl", 350),
        pytest.param("stage2", "stage_2.jsonl", 8148, marks=pytest.mark.slow),
        ("hotpotqa", "hotpotqa_500.jsonl", 500),
    ],
)
def test_the_real_questions_of_r1_searcher(split, file, count, cache, manual):
    if not (REAL / file).is_file():
        pytest.skip(f"{file} is not beside the project")
    manual("r1_searcher", {file: (REAL / file).read_bytes()})
    questions = load_questions(f"r1_searcher:{split}")
    assert len(questions) == count == SOURCES[f"r1_searcher:{split}"].rows
    assert questions == read_questions(REAL / file)


def test_tensorflow_is_not_imported(cache, manual):
    manual("r1_searcher", {"stage_1.jsonl": published.json_lines(published.R1_SEARCHER)})
    code = (
        "import sys; from r1s_jax.data.splits import load_split; "
        "assert len(load_split('r1_searcher:stage1')) == 2; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
