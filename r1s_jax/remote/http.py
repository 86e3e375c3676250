"""JSON over HTTP: pooled connections, time-outs, retries, a circuit breaker. Any thread may call.

Waits between attempts are drawn from [0, min(longest_backoff, backoff 2^i)] ("full jitter", so
that the callers of a server that fell over do not come back as one).
"""

from __future__ import annotations

import dataclasses
import email.utils
import functools
import http
import json
import random
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import httpx

from r1s_jax.types import require_least

_LARGEST = 64 << 20  # bytes of an answer; far above any that is meant
_LONGEST_TOLD = 300  # characters of an answer that an error repeats
_TRANSIENT = (408, 425, 429)  # and all from 500 on
_DEAD = (502, 503, 504)  # said by whoever stands before a server that is not there
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class RemoteError(Exception):
    """A request that failed for good: one line, without the query string or any key.

    `status` is the HTTP status, None where no answer came; `transient` says whether the same
    request may succeed later.
    """

    def __init__(self, message: str, *, status: int | None = None, transient: bool = False) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status
        self.transient = transient


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """How patient a client is; all times in seconds."""

    timeout: float = 30.0  # of one attempt, as a whole
    connect_timeout: float = 5.0
    attempts: int = 4
    backoff: float = 0.5  # before the second attempt at most; twice as long before each further
    longest_backoff: float = 8.0  # also of what a server asks for by Retry-After
    connections: int = 32  # kept open and used at a time
    breaker_failures: int = 8  # in a row, of one host, after which it is not asked ...
    breaker_seconds: float = 10.0  # ... for so long; then one request tries it

    def __post_init__(self) -> None:
        least = {"timeout": 0.001, "connect_timeout": 0.001, "attempts": 1, "backoff": 0}
        least |= {"longest_backoff": 0, "connections": 1, "breaker_failures": 1}
        require_least("http", self, least | {"breaker_seconds": 0})


class HttpClient:
    """Sends JSON, gets JSON. `requests`, `retries` and `failures` count from its start."""

    def __init__(
        self,
        config: HttpConfig | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Opens nothing yet. `headers` go with every request; `transport` replaces the network."""
        self.config = config or HttpConfig()
        self.requests = self.retries = self.failures = 0
        times = httpx.Timeout(self.config.timeout, connect=self.config.connect_timeout)
        connections = self.config.connections
        self._client = httpx.Client(
            headers=dict(headers or {}),
            timeout=times,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            transport=transport,
            verify=_certificates(),
            # A proxy of the environment is for the world, not for this machine.
            mounts=cast(Any, dict.fromkeys(_LOOPBACK)),
        )
        self._lock = threading.Lock()  # guards the counters and the breakers
        self._breakers: dict[str, _Breaker] = {}
        self._closed = threading.Event()

    def post_json(self, url: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """The answer to `body`, both as JSON values.

        Raises:
            RemoteError: no good answer came within the attempts, or one that says not to ask
                again (another 4xx, no JSON).
        """
        content = json.dumps(body, allow_nan=False).encode()
        kind = {"content-type": "application/json"}
        return self._json("POST", url, content=content, headers=kind | dict(headers or {}))

    def get_json(
        self,
        url: str,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON value at `url`; raises as `post_json` does. Errors do not show `params`."""
        return self._json("GET", url, params=params, headers=headers)

    def close(self) -> None:
        """Ends the connections, and the waits between attempts."""
        self._closed.set()
        self._client.close()

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _json(self, method: str, url: str, **kwargs: Any) -> Any:
        name = f"{method} {_shown(url)}"
        with self._lock:
            self.requests += 1
        try:
            answer = self._retried(method, url, name, kwargs)
            try:
                return json.loads(answer)
            except (ValueError, RecursionError):
                told = f": {_told(answer)}" if answer.strip() else ""
                raise RemoteError(f"{name}: the answer is not JSON{told}") from None
        except RemoteError:
            with self._lock:
                self.failures += 1
            raise

    def _retried(self, method: str, url: str, name: str, kwargs: dict[str, Any]) -> bytes:
        config = self.config
        breaker = self._breaker(url)
        for attempt in range(1, config.attempts + 1):
            with self._lock:
                refusal = breaker.refusal(time.monotonic())
            if refusal:
                raise RemoteError(f"{name}: {refusal}", transient=True)
            fault = self._once(method, url, kwargs)
            with self._lock:
                breaker.note(fault, time.monotonic())
            if isinstance(fault, bytes):
                return fault
            if not fault.transient or attempt == config.attempts:
                break
            with self._lock:
                self.retries += 1
            wait = random.uniform(
                0, min(config.longest_backoff, config.backoff * 2 ** (attempt - 1))
            )
            if fault.wait is not None:
                wait = min(config.longest_backoff, fault.wait)
            if self._closed.wait(wait):
                break
        tried = f" ({attempt} attempts)" if attempt > 1 else ""
        raise RemoteError(
            f"{name}: {fault.reason}{tried}", status=fault.status, transient=fault.transient
        )

    def _once(self, method: str, url: str, kwargs: dict[str, Any]) -> bytes | _Fault:
        """The body of one good answer, or what went wrong."""
        if self._closed.is_set():
            return _Fault("the client is closed")
        end = time.monotonic() + self.config.timeout
        try:
            with self._client.stream(method, url, **kwargs) as response:
                parts, size = [], 0
                for part in response.iter_bytes():
                    size += len(part)
                    if size > _LARGEST:
                        return _Fault(f"the answer is larger than {_LARGEST >> 20} MiB")
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout("the answer came too slowly")
                    parts.append(part)
        except httpx.TimeoutException as error:
            kind = "no connection" if isinstance(error, httpx.ConnectTimeout) else "no answer"
            limit = self.config.connect_timeout if kind == "no connection" else self.config.timeout
            dead = not isinstance(error, httpx.PoolTimeout)
            return _Fault(f"{kind} within {limit:g} s", transient=True, dead=dead)
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
            return _Fault(f"{type(error).__name__}: {error}")
        except httpx.TransportError as error:
            return _Fault(f"{type(error).__name__}: {error}", transient=True, dead=True)
        except (httpx.HTTPError, UnicodeError, RuntimeError, ValueError) as error:
            return _Fault(f"{type(error).__name__}: {error}")  # undecodable, or closed meanwhile
        body = b"".join(parts)
        return body if response.is_success else _refused(response, body)

    def _breaker(self, url: str) -> _Breaker:
        try:
            host = httpx.URL(url).netloc.decode()
        except (httpx.InvalidURL, TypeError):
            host = ""
        with self._lock:
            return self._breakers.setdefault(host, _Breaker(self.config))


@dataclasses.dataclass(frozen=True)
class _Fault:
    reason: str
    status: int | None = None
    transient: bool = False
    dead: bool = False  # says something of the host, not of the request
    wait: float | None = None  # seconds that the server asked for


class _Breaker:
    """Stops asking a host that failed many times in a row; its caller holds the lock."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._failures = 0
        self._last = ""  # of them
        self._until = 0.0  # while there are too many failures

    def refusal(self, now: float) -> str:
        """Why the host is not asked now, or nothing."""
        if self._failures < self._config.breaker_failures:
            return ""
        if now < self._until:
            left = self._until - now
            failures = f"{self._failures} failures in a row ({self._last})"
            return f"not asked for {left:.1f} s more, after {failures}"
        self._until = now + self._config.breaker_seconds  # this caller tries, the others wait
        return ""

    def note(self, outcome: bytes | _Fault, now: float) -> None:
        if isinstance(outcome, _Fault) and outcome.dead:
            self._failures += 1
            self._last = outcome.reason
            self._until = now + self._config.breaker_seconds
        else:
            self._failures = 0


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: that takes longer than a request on this machine."""
    return httpx.create_ssl_context()


def _refused(response: httpx.Response, body: bytes) -> _Fault:
    status = response.status_code
    wait = _retry_after(response.headers.get("retry-after"))
    return _Fault(
        f"{status} {_phrase(status)}: {_told(body)}".rstrip(": "),
        status=status,
        transient=status in _TRANSIENT or status >= 500,
        dead=status in _DEAD and wait is None,
        wait=wait,
    )


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where there is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _told(body: bytes) -> str:
    """What an answer says of its error: the text in its JSON where it has one, else its start."""
    text = body[: 4 * _LONGEST_TOLD].decode(errors="replace")
    try:
        value = json.loads(body)
        for key in ("error", "detail", "message"):
            if isinstance(value, dict) and value.get(key):
                value = value[key]
        text = value if isinstance(value, str) else text
    except (ValueError, RecursionError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_TOLD else text[:_LONGEST_TOLD] + "…"


def _shown(url: str) -> str:
    """The URL without user, password, query and fragment: those may be secret."""
    try:
        return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None))
    except (httpx.InvalidURL, TypeError, ValueError):
        return url.split("?")[0]
