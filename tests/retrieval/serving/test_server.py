"""The retrieval server over real sockets: both formats, limits, batching, overload, its end."""

import concurrent.futures
import dataclasses
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from r1s_jax.retrieval.embed import TfidfSvdConfig, TfidfSvdEmbedder
from r1s_jax.retrieval.index import DenseIndex
from r1s_jax.retrieval.serving import server
from r1s_jax.retrieval.serving.wire import Limits
from r1s_jax.types import RetrievalFailure, UserError
from tests.searches import OSLO, ROMA, Recording, document
from tests.serving import served
from tests.worlds import DOCUMENTS

pytest.importorskip("fastapi")

HTTP = httpx.Client(timeout=20)  # one for all: a new one takes longer than most tests


@pytest.fixture(scope="module")
def index():
    embedder = TfidfSvdEmbedder(TfidfSvdConfig(dim=6)).fit([d.text for d in DOCUMENTS])
    return DenseIndex.build(DOCUMENTS, embedder, corpus_hash="h")


@pytest.fixture(scope="module")
def url(index):
    limits = Limits(largest_k=20, queries=5, query_characters=30, body_bytes=1 << 20)
    with served(index, limits=limits, body_seconds=0.3) as url:
        yield url


def sample(url, name, **labels):
    """A number of /metrics."""
    wanted = name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}") * bool(labels)
    lines = dict(line.rsplit(" ", 1) for line in HTTP.get(f"{url}/metrics").text.splitlines())
    return float(lines.get(wanted, 0))


def test_search_r1(url, index):
    body = {"queries": ["w3", "w5"], "topk": 2, "return_scores": True}
    answer = HTTP.post(f"{url}/retrieve", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    expected = [
        [
            {"document": {"id": d.id, "contents": f'"{d.title}"\n{d.text}'}, "score": d.score}
            for d in documents
        ]
        for documents in index.search(["w3", "w5"], 2)
    ]
    assert answer.json() == {"result": expected}
    assert expected[0][0]["document"] == {"id": "d3", "contents": '"t3"\nw3 x0'}
    plain = HTTP.post(f"{url}/retrieve", json={"queries": ["w3"]}).json()
    assert plain["result"][0][0] == {"id": "d3", "contents": '"t3"\nw3 x0'}
    assert len(plain["result"][0]) == 3


def test_r1_searcher(url):
    answer = HTTP.post(f"{url}/queries", json={"queries": ["w3", "t w3"], "k": 1}).json()
    line = "d3\tTitle: t3 Text: w3 x0"
    assert answer == {"queries": ["w3", "t w3"], "answers": [[line], [line]]}


def test_no_queries(url):
    assert HTTP.post(f"{url}/retrieve", json={"queries": []}).json() == {"result": []}


def test_health(url, index):
    health = HTTP.get(f"{url}/health").json()
    assert health["status"] == "ok" and health["wires"] == ["search_r1", "r1_searcher"]
    assert health["facts"] == {**index.facts, "corpus_hash": "h"}


TOO_LARGE = b'{"queries": ["' + b"x" * (10 << 20) + b'"]}'


@pytest.mark.parametrize("path, k", [("/retrieve", "topk"), ("/queries", "k")])
def test_bad_requests_get_one_line(url, path, k):
    bodies = {
        b"{not json": 400,
        b'{"queries": "w3"}': 422,
        b'{"queries": [3]}': 422,
        b'{"queries": ["a", "b", "c", "d", "e", "f"]}': 422,
        json.dumps({"queries": ["x" * 31]}).encode(): 422,
        json.dumps({"queries": ["w3"], k: 0}).encode(): 422,
        json.dumps({"queries": ["w3"], k: 10_000}).encode(): 422,
        json.dumps({"queries": ["w3"], k: "3"}).encode(): 422,
        TOO_LARGE: 413,
    }
    for body, status in bodies.items():
        before = sample(url, "r1s_requests_total", path=path, status=status)
        answer = HTTP.post(url + path, content=body)
        assert answer.status_code == status, body[:50]
        assert list(answer.json()) == ["detail"] and "\n" not in answer.json()["detail"]
        after = sample(url, "r1s_requests_total", path=path, status=status)
        assert after == before + 1
    # The server is as well as before.
    assert HTTP.post(url + path, json={"queries": ["w3"]}).status_code == 200


def test_a_large_body_is_not_waited_for(url):
    """By its declared length, or after the limit where it has none (chunks)."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        plain.sendall(b"POST /queries HTTP/1.1\r\nhost: a\r\ncontent-length: 9999999999\r\n\r\n{")
        assert plain.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        plain.sendall(b"POST /queries HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(17):
            plain.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as slow:
        slow.sendall(b"POST /retrieve HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port))) as leaves:
        leaves.sendall(b"POST /retrieve HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{")
    assert HTTP.get(f"{url}/health").status_code == 200


def test_other_paths_and_methods(url):
    assert HTTP.get(f"{url}/other").status_code == 404
    assert HTTP.get(f"{url}/retrieve").status_code == 405
    assert HTTP.post(f"{url}/health").status_code == 405
    assert HTTP.get(f"{url}/docs").status_code == 404


@dataclasses.dataclass
class OnDevice:
    """Embeds on a device, as a sentence encoder does; keeps who called what."""

    batches: list
    threads: set
    embeds_on_device: bool = True

    def embed_queries(self, queries):
        self.batches.append(list(queries))
        self.threads.add(threading.get_ident())
        time.sleep(0.02)  # meanwhile others come
        return np.zeros((len(queries), 1), np.float32)

    def search_vectors(self, vectors_ND, queries, k):
        return [(document(query),) for query in queries]

    def search(self, queries, k):
        raise AssertionError("not outside the device's thread")


@pytest.mark.parametrize("on_device", [False, True])
def test_requests_of_many_clients_share_searches(on_device):
    retriever = OnDevice([], set()) if on_device else Recording()
    with served(retriever, window=0.05) as url:

        def ask(i):
            body = {"queries": [f"q{i}", f"q{i + 1}"], "k": 1 + i % 2}
            answer = HTTP.post(f"{url}/queries", json=body).json()
            assert answer["queries"] == body["queries"]
            return [[line.split("\t")[0] for line in lines] for lines in answer["answers"]]

        with concurrent.futures.ThreadPoolExecutor(32) as threads:
            answers = list(threads.map(ask, range(32)))
        batches = retriever.batches if on_device else [call for call, _ in retriever.calls]
        assert answers == [[[f"q{i}"], [f"q{i + 1}"]] for i in range(32)]
        assert len(batches) < 20 and max(map(len, batches)) > 4
        assert not on_device or len(retriever.threads) == 1
        assert sample(url, "r1s_batch_queries_count") == len(batches)
        assert sample(url, "r1s_batch_queries_sum") == sum(map(len, batches))
        assert sample(url, "r1s_queries_total") == 64
        assert sample(url, "r1s_request_seconds_count", path="/queries") == 32
        assert sample(url, "r1s_waiting_queries") == 0


def test_a_query_without_an_answer_fails_its_request_alone():
    """The formats cannot say it of a query; an empty list would be a lie."""

    def answer(queries, k):
        if "raises" in queries:
            raise RuntimeError("secret\nTraceback (most recent call last)")
        return [
            RetrievalFailure(reason="the index\nis gone") if q == "fails" else (OSLO,)
            for q in queries
        ]

    with served(Recording(answer)) as url:
        lost = HTTP.post(f"{url}/retrieve", json={"queries": ["a", "fails"]})
        assert lost.status_code == 500 and lost.json() == {
            "detail": "no answer to 1 of 2 queries, the first of them [1]: the index is gone"
        }
        raised = HTTP.post(f"{url}/queries", json={"queries": ["raises"]})
        assert raised.status_code == 500 and "\n" not in raised.json()["detail"]
        assert HTTP.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200
        assert sample(url, "r1s_failed_queries_total") == 2


def test_documents_that_utf_8_cannot_spell():
    odd = dataclasses.replace(ROMA, text="half \ud800")
    with served(Recording(lambda queries, k: [(odd,)])) as url:
        assert "half ?" in HTTP.post(f"{url}/queries", json={"queries": ["a"]}).text


def test_a_search_that_hangs_is_given_up():
    over = threading.Event()

    def answer(queries, k):
        if queries == ["hangs"]:
            over.wait(20)
        return [(OSLO,)] * len(queries)

    with served(Recording(answer), timeout=0.2, workers=1, window=0.0) as url:
        hung = HTTP.post(f"{url}/retrieve", json={"queries": ["hangs"]})
        assert hung.status_code == 500 and "no answer within 0.2 s" in hung.json()["detail"]
        assert HTTP.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200
        over.set()


def test_too_much_is_told_to_come_later():
    release = threading.Event()
    retriever = Recording(lambda queries, k: release.wait(20) and [(OSLO,)] * len(queries))
    body = {"queries": ["a", "b", "c"]}
    with served(retriever, waiting=4) as url, concurrent.futures.ThreadPoolExecutor(1) as threads:
        first = threads.submit(HTTP.post, f"{url}/retrieve", json=body)
        while sample(url, "r1s_waiting_queries") < 3:
            time.sleep(0.01)
        second = HTTP.post(f"{url}/retrieve", json=body)
        assert second.status_code == 503 and second.headers["retry-after"] == "1"
        assert second.json() == {"detail": "3 queries are waiting already"}
        release.set()
        assert first.result().status_code == 200
        # One that is larger than the limit is taken when nothing waits.
        many = {"queries": [str(i) for i in range(9)]}
        assert HTTP.post(f"{url}/retrieve", json=many).status_code == 200


def test_what_a_client_that_left_asked_for_is_dropped():
    """Else clients that give up and ask again would keep a server busy with nobody's queries."""
    release = threading.Event()
    retriever = Recording(lambda queries, k: release.wait(20) and [(OSLO,)] * len(queries))
    with served(retriever, workers=1, batch=1, window=0.0) as url:
        with pytest.raises(httpx.ReadTimeout):
            body = {"queries": [f"nobody's {i}" for i in range(500)]}
            httpx.post(f"{url}/retrieve", json=body, timeout=0.3)
        while not sample(url, "r1s_requests_total", path="/retrieve", status=400):
            time.sleep(0.01)
        assert sample(url, "r1s_waiting_queries") == 500
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(HTTP.post, f"{url}/retrieve", json={"queries": ["a"]})
            while sample(url, "r1s_waiting_queries") < 501:
                time.sleep(0.01)
            release.set()
            assert waiting.result().status_code == 200
        while sample(url, "r1s_waiting_queries"):
            time.sleep(0.01)
    searched = [query for queries, _ in retriever.calls for query in queries]
    assert searched == ["nobody's 0", "nobody's 1", "a"]


def test_requests_that_are_in_are_answered_at_the_end():
    started, release = threading.Event(), threading.Event()

    def answer(queries, k):
        started.set()
        release.wait(20)
        return [(OSLO,)] * len(queries)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with served(Recording(answer)) as url:
            waiting = threads.submit(HTTP.post, f"{url}/retrieve", json={"queries": ["a"]})
            assert started.wait(20)
            threading.Timer(0.2, release.set).start()
        assert waiting.result().status_code == 200
        with pytest.raises(httpx.ConnectError):
            HTTP.get(url)


def test_a_taken_port_is_one_line():
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen there"):
        server.listen("127.0.0.1", 70_000)


def test_a_missing_package_is_one_line(monkeypatch, index):
    for module, package in [("fastapi", "fastapi"), ("prometheus_client", "prometheus-client")]:
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(UserError, match=f"{package}: pip install -r requirements-search"):
                server.make_app(index)
