"""The HTTP client against real servers on this machine that fail in every way there is."""

import concurrent.futures
import email.utils
import threading
import time

import pytest

from r1s_jax.remote.http import HttpClient, HttpConfig, RemoteError
from r1s_jax.types import UserError
from tests.faulty_server import DRIP, GARBAGE, HALF, HANG, RESET, free_port, serving

QUICK = {"timeout": 5.0, "backoff": 0.001, "breaker_failures": 1000}


def client(**options):
    return HttpClient(HttpConfig(**{**QUICK, **options}))


def failure(http, url, body=None):
    with pytest.raises(RemoteError) as caught:
        http.post_json(url, body)
    assert "\n" not in str(caught.value)
    return caught.value


def test_json_there_and_back():
    body = {"text": "Zürich 日本 \ud800 \x00", "list": [1, 2.5, None, True]}
    with serving(lambda request: request.json) as server, client() as http:
        assert http.post_json(f"{server.url}/a", body, {"x-key": "k"}) == body
        assert http.get_json(f"{server.url}/b", {"q": "ü&=", "n": 3}) is None
    post, get = server.requests
    assert (post.method, post.path, post.headers["x-key"]) == ("POST", "/a", "k")
    assert post.headers["content-type"] == "application/json"
    assert (get.method, get.path) == ("GET", "/b?q=%C3%BC%26%3D&n=3")


@pytest.mark.parametrize(
    "fault", [RESET, HALF, GARBAGE, (500, {}), (503, b""), (429, {}), (408, b"")]
)
def test_passing_faults_are_tried_again(fault):
    with serving(fault, fault, ["fine"]) as server, client() as http:
        assert http.post_json(server.url, {}) == ["fine"]
        assert (http.requests, http.retries, http.failures) == (1, 2, 0)
        assert len(server.requests) == 3


def test_lasting_faults_end_after_the_attempts():
    with serving((500, {"detail": "out of\n memory"})) as server, client(attempts=3) as http:
        error = failure(http, f"{server.url}/retrieve")
        assert str(error) == (
            f"POST {server.url}/retrieve: 500 Internal Server Error: out of memory (3 attempts)"
        )
        assert (error.status, error.transient, len(server.requests)) == (500, True, 3)
        assert (http.requests, http.retries, http.failures) == (1, 2, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 301])
def test_other_statuses_are_final(status):
    reply = (status, {"error": {"message": "no such model"}})
    with serving(reply) as server, client() as http:
        error = failure(http, server.url)
        assert "no such model" in str(error) and f" {status} " in str(error)
        assert (error.status, error.transient, len(server.requests)) == (status, False, 1)


@pytest.mark.parametrize("body", [b"<html>busy</html>", b"", b"[" * 100_000])
def test_what_is_no_json_is_final(body):
    with serving(body) as server, client() as http:
        error = failure(http, server.url)
        assert "not JSON" in str(error) and len(str(error)) < 500
        assert not error.transient and len(server.requests) == 1


def test_long_error_pages_are_cut():
    with serving((400, b"x" * 100_000)) as server, client() as http:
        assert len(str(failure(http, server.url))) < 400


@pytest.mark.parametrize("fault", [HANG, DRIP])
def test_an_attempt_ends_in_time(fault):
    """A body that came byte by byte was waited for without end: each read was in time."""
    with serving(fault) as server, client(timeout=0.2, attempts=2) as http:
        start = time.monotonic()
        error = failure(http, server.url)
        assert 0.4 <= time.monotonic() - start < 2
        assert error.transient and error.status is None
        assert "no answer within 0.2 s (2 attempts)" in str(error)


def test_nobody_listens():
    with client(attempts=2) as http:
        error = failure(http, f"http://127.0.0.1:{free_port()}")
        assert error.transient and error.status is None and "ConnectError" in str(error)


@pytest.mark.parametrize("url", ["", "localhost:1/x", "ftp://localhost", "http://"])
def test_addresses_that_are_none(url):
    with client() as http:
        assert not failure(http, url).transient and http.retries == 0


def test_waits_are_drawn_up_to_a_doubling_bound(monkeypatch):
    drawn = []
    monkeypatch.setattr("random.uniform", lambda low, high: drawn.append((low, high)) or 0.0)
    with serving((500, b"")) as server, client(attempts=5, backoff=0.5, longest_backoff=3) as http:
        failure(http, server.url)
    assert drawn == [(0, 0.5), (0, 1.0), (0, 2.0), (0, 3)]


def test_a_server_says_when_to_come_back():
    soon = email.utils.formatdate(time.time() + 100)
    replies = [(429, {}, {"retry-after": "0.2"}), (503, {}, {"retry-after": soon}), "fine"]
    with serving(*replies) as server, client(longest_backoff=0.3) as http:
        start = time.monotonic()
        assert http.post_json(server.url, {}) == "fine"
        assert 0.5 <= time.monotonic() - start < 2  # 0.2, and 100 cut to 0.3


def test_a_host_that_is_down_is_left_alone_for_a_while():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with client(attempts=1, breaker_failures=3, breaker_seconds=0.3) as http:
        for _ in range(3):
            assert "ConnectError" in str(failure(http, url))
        with serving("up", port=port) as server:  # it is back, and nobody knows yet
            error = failure(http, url)
            assert error.transient and "after 3 failures in a row (ConnectError" in str(error)
            with serving("other") as other:  # breakers are the hosts' own
                assert http.post_json(other.url, {}) == "other"
            assert server.requests == []
        time.sleep(0.3)
        assert "ConnectError" in str(failure(http, url))  # the one that tries
        assert "failures in a row" in str(failure(http, url))
        time.sleep(0.3)
        with serving("up", port=port) as server:
            assert [http.post_json(url, {}) for _ in range(3)] == ["up"] * 3


def test_a_host_that_answers_is_not_down():
    """One poisonous query would have cut off a whole run: its 500s counted as a dead server."""
    for reply in [(500, b""), (429, b""), (404, b""), (503, b"", {"retry-after": "0"})]:
        with serving(reply) as server, client(attempts=5, breaker_failures=2) as http:
            failure(http, server.url)
            failure(http, server.url)
            assert len(server.requests) >= 2


def test_secrets_stay_out_of_errors():
    with serving((401, b"")) as server, client() as http:
        url = server.url.replace("http://", "http://user:hidden@")
        with pytest.raises(RemoteError) as caught:
            http.get_json(f"{url}/search?token=hidden", {"api_key": "hidden"}, {"x": "hidden"})
        assert "hidden" not in str(caught.value) and "/search" in str(caught.value)


def test_connections_are_kept():
    with serving("fine") as server, client() as http:
        for _ in range(5):
            http.post_json(server.url, {})
        assert server.connections == 1


def test_threads_share_a_client():
    with serving(lambda request: request.json) as server, client(connections=4) as http:
        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda i: http.post_json(server.url, i), range(100)))
        assert answers == list(range(100))
        assert (http.requests, http.failures) == (100, 0) and server.connections < 50


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serving("fine") as server, client(attempts=1) as http:
        assert http.post_json(server.url, {}) == "fine"
        assert http.post_json(server.url.replace("127.0.0.1", "localhost"), {}) == "fine"


def test_closing_ends_the_waits():
    with serving((503, b"", {"retry-after": "60"})) as server:
        http = client(longest_backoff=60)
        threading.Timer(0.1, http.close).start()
        start = time.monotonic()
        failure(http, server.url)
        assert time.monotonic() - start < 5
        assert "closed" in str(failure(http, server.url))


@pytest.mark.parametrize(
    "field, value", [("timeout", 0), ("attempts", 0), ("backoff", -1), ("connections", 0)]
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=rf"http\.{field} = {value}"):
        HttpConfig(**{field: value})
