"""A retriever behind HTTP, in both wire formats; see tpu_scripts/serve_retriever.py.

    POST /retrieve, /queries   see `retrieval.serving.wire`
    GET  /health               {"status", "facts": what answers depend on, "wires", "limits"}
    GET  /metrics              Prometheus text

An error is {"detail": one line}: 400 no JSON, 408 a body that does not come, 413 a body that is too
large, 422 a field out of its limits, 500 a query that could not be answered (the formats have no
place for that, and an empty list would say that there are no documents), 503 too much waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from r1s_jax.retrieval.interface import Retriever
from r1s_jax.retrieval.pool import Outcome
from r1s_jax.retrieval.serving.dispatch import Dispatcher, Overloaded
from r1s_jax.retrieval.serving.wire import WIRES, BadRequest, Limits, Wire
from r1s_jax.types import RetrievalFailure, UserError, require_least

if TYPE_CHECKING:
    import fastapi
    import starlette.requests
    import starlette.responses
    import uvicorn

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_GRACE = 10  # seconds that requests have to end after SIGTERM
_LOOK = 0.25  # seconds between two looks whether the client is still there
_KEEP_ALIVE = 30  # seconds; longer than clients keep an idle connection, which is theirs to close


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How much a server takes, and how it batches; see `Limits` and `pool.SearchPool`."""

    limits: Limits = dataclasses.field(default_factory=Limits)
    workers: int = 4
    batch: int = 64
    window: float = 0.002  # seconds that a query waits for others to be searched for with it
    timeout: float = 60.0  # seconds after which a search counts as hung
    waiting: int = 16_384  # queries that wait at a time; what comes on top is told to come later
    body_seconds: float = 30.0  # for a body to arrive

    def __post_init__(self) -> None:
        least = {"workers": 1, "batch": 1, "window": 0, "timeout": 0.001, "waiting": 1}
        require_least("server", self, least | {"body_seconds": 0.001})


def make_app(retriever: Retriever, config: ServerConfig | None = None) -> fastapi.FastAPI:
    """The server's application. It answers while its lifespan runs, as uvicorn has it.

    Raises:
        UserError: a package of requirements-search.txt is missing.
    """
    fastapi, responses = _package("fastapi"), _package("starlette.responses")
    config = config or ServerConfig()
    metrics = _Metrics()
    dispatchers: list[Dispatcher] = []  # one, while the application runs

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        dispatcher = Dispatcher(
            retriever,
            workers=config.workers,
            batch=config.batch,
            window=config.window,
            timeout=config.timeout,
            waiting=config.waiting,
            observe=metrics.batches.observe,
        )
        metrics.waiting.set_function(lambda: dispatcher.waiting)
        dispatchers.append(dispatcher)
        yield
        dispatchers.clear()
        await asyncio.to_thread(dispatcher.close)

    async def search(request: starlette.requests.Request) -> starlette.responses.Response:
        start = time.perf_counter()
        wire = next(wire for wire in WIRES.values() if wire.path == request.url.path)
        headers: dict[str, str] = {}
        try:
            status, value = 200, await _answer(request, wire, config, dispatchers[0], metrics)
        except BadRequest as error:
            status, value = error.status, _detail(error.detail)
        except Overloaded as error:
            status, value, headers = 503, _detail(str(error)), {"retry-after": "1"}
        except _SearchFailed as error:
            status, value = 500, _detail(str(error))
        metrics.requests.labels(wire.path, status).inc()
        metrics.seconds.labels(wire.path).observe(time.perf_counter() - start)
        return _json(responses, status, value, headers)

    async def health(request: starlette.requests.Request) -> starlette.responses.Response:
        value = {"status": "ok", "facts": facts_of(retriever), "wires": list(WIRES)}
        value["limits"] = dataclasses.asdict(config.limits)
        return _json(responses, 200, value)

    async def scrape(request: starlette.requests.Request) -> starlette.responses.Response:
        return responses.Response(metrics.text(), media_type=metrics.media_type)

    async def bug(
        request: starlette.requests.Request, error: Exception
    ) -> starlette.responses.Response:
        return _json(responses, 500, _detail("an error inside the server, which its log tells"))

    app = fastapi.FastAPI(lifespan=lifespan, openapi_url=None)
    for wire in WIRES.values():
        app.add_route(wire.path, search, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/metrics", scrape, methods=["GET"])
    app.add_exception_handler(Exception, bug)
    return app


def facts_of(retriever: Retriever) -> dict[str, Any]:
    """What a retriever tells of itself: its `facts` and its `corpus_hash`, where it has them."""
    facts = dict(getattr(retriever, "facts", {}))
    corpus_hash = getattr(retriever, "corpus_hash", None)
    return facts if corpus_hash is None else {"corpus_hash": corpus_hash, **facts}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. UserError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: cannot listen there: {told}") from None


def make_server(app: fastapi.FastAPI) -> uvicorn.Server:
    """A uvicorn server that logs errors alone. UserError where uvicorn is missing."""
    uvicorn = _package("uvicorn")
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_GRACE,
        )
    )


def serve(app: fastapi.FastAPI, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that are in are answered before it returns."""
    server = make_server(app)
    # uvicorn handles the signals and afterwards raises them anew: SIGTERM is an ordinary end here.
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listening])
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _SearchFailed(Exception):
    """A query of a request got no documents but a failure."""


class _Metrics:
    """What /metrics tells, of one application."""

    def __init__(self) -> None:
        prometheus = _package("prometheus_client")
        self.media_type = prometheus.CONTENT_TYPE_LATEST.partition(";")[0]
        self._registry = prometheus.CollectorRegistry()
        self._latest = prometheus.generate_latest
        own = {"registry": self._registry}
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self.requests = counter("r1s_requests", "Requests", ["path", "status"], **own)
        self.queries = counter("r1s_queries", "Queries that were searched for", **own)
        self.failed = counter("r1s_failed_queries", "Those that got no answer", **own)
        self.batches = histogram(
            "r1s_batch_queries", "Distinct queries in one search", buckets=_SIZES, **own
        )
        self.seconds = histogram(
            "r1s_request_seconds", "From request to answer", ["path"], buckets=_SECONDS, **own
        )
        self.waiting = prometheus.Gauge("r1s_waiting_queries", "Queries without an answer", **own)

    def text(self) -> bytes:
        return self._latest(self._registry)


async def _answer(
    request: starlette.requests.Request,
    wire: Wire,
    config: ServerConfig,
    dispatcher: Dispatcher,
    metrics: _Metrics,
) -> dict[str, Any]:
    """The answer to a request. Raises BadRequest, Overloaded, _SearchFailed."""
    asked = wire.read_request(await _body(request, config), config.limits)
    if not asked.queries:
        return wire.answer(asked, [])
    outcomes = await _outcomes(request, dispatcher, asked.queries, asked.k)
    failures = [i for i, o in enumerate(outcomes) if isinstance(o, RetrievalFailure)]
    metrics.queries.inc(len(outcomes))
    metrics.failed.inc(len(failures))
    found = [o for o in outcomes if not isinstance(o, RetrievalFailure)]
    if failures:
        first = outcomes[failures[0]]
        assert isinstance(first, RetrievalFailure)
        which = f"{len(failures)} of {len(outcomes)} queries, the first of them [{failures[0]}]"
        raise _SearchFailed(f"no answer to {which}: {first.reason}")
    return wire.answer(asked, found)


async def _outcomes(
    request: starlette.requests.Request, dispatcher: Dispatcher, queries: tuple[str, ...], k: int
) -> list[Outcome]:
    """Of a client that leaves meanwhile, what is still to be searched for is dropped."""
    found = asyncio.wrap_future(dispatcher.search(queries, k))
    try:
        while not (await asyncio.wait((found,), timeout=_LOOK))[0]:
            if await request.is_disconnected():
                raise BadRequest(400, "the client left")
        if found.cancelled():
            raise Overloaded("the server is going down")
        return found.result()
    finally:
        found.cancel()


async def _body(request: starlette.requests.Request, config: ServerConfig) -> bytes:
    """A body of at most the limit; more is not kept. Raises BadRequest."""
    from starlette.requests import ClientDisconnect

    limit = config.limits.body_bytes
    too_large = BadRequest(413, f"the body is larger than {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:  # uvicorn has checked the number
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        told = f"the body did not arrive within {config.body_seconds:g} s"
        raise BadRequest(408, told) from None
    except ClientDisconnect:
        raise BadRequest(400, "the client left") from None
    return b"".join(parts)


def _detail(text: str) -> dict[str, str]:
    return {"detail": " ".join(text.split())}


def _json(
    responses: Any, status: int, value: Any, headers: Mapping[str, str] | None = None
) -> starlette.responses.Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace")
    return responses.Response(body, status, headers, "application/json")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"serving needs {package}: pip install -r requirements-search.txt"
        ) from None
