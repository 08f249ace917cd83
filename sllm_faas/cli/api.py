"""The gateway's administration interface as the command line uses it: JSON and server-sent events.

Calls of functions from Python are the SDK's; this knows only paths and JSON. Every failure is one of our errors: the
server's own by its code, an unreachable server as `Unavailable` with param "server".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from sllm._http import error_of as answered

from sllm_faas.errors import NotFound, PlatformError, Unavailable

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
PATIENT = httpx.Timeout(None, connect=5.0)
"""For answers that take as long as they take; the server pings streams every 15 s."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `data` is decoded JSON."""

    kind: str
    data: Any
    id: str = ""


def path(*parts: str) -> str:
    """`/v1/…` with each part quoted."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Api:
    def __init__(self, server: str, token: str = "", transport: httpx.BaseTransport | None = None) -> None:
        self.server = server.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.server, headers=headers, timeout=TIMEOUT, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, params=_given(params))

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        return self._call("POST", path, json={} if body is None else body, **options)

    def put(self, path: str, content: bytes, **options: Any) -> Any:
        return self._call("PUT", path, content=content, **options)

    def head(self, path: str) -> None:
        """Raises NotFound when it is not there."""
        try:
            self._call("HEAD", path)
        except PlatformError as error:  # an error answer to HEAD has no body to tell its code
            if "404" in error.message:
                raise NotFound(f"there is no {path}") from None
            raise

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        with self._reached():
            answer = self._http.request(method, path, **options)
        if answer.is_error:
            raise _error(answer)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise PlatformError(f"{self.server}{path} did not answer with JSON", hint="Is it an sllm server?") from None

    @contextmanager
    def events(self, method: str, path: str, body: Any = None, **params: Any) -> Iterator[Iterator[Event]]:
        """The server-sent events of an answer. Leaving the block early closes the connection."""
        headers = {"Accept": "text/event-stream"}
        with (
            self._reached(),
            self._http.stream(
                method, path, json=body, params=_given(params), headers=headers, timeout=PATIENT
            ) as answer,
        ):
            if answer.is_error:
                answer.read()
                raise _error(answer)
            yield _events(answer.iter_lines())

    def lines(self, path: str, **params: Any) -> Iterator[Any]:
        """An answer of JSON lines."""
        with self._reached(), self._http.stream("GET", path, params=_given(params)) as answer:
            if answer.is_error:
                answer.read()
                raise _error(answer)
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise Unavailable(f"{self.server} did not answer in time", param="server") from None
        except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Unavailable(
                f"cannot reach {self.server}: {error}",
                hint="Start one with `sllm up`, or name it with --server.",
                param="server",
            ) from None


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value not in (None, "", False)}


def _events(lines: Iterator[str]) -> Iterator[Event]:
    kind, identity = "message", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Event(kind, json.loads("\n".join(data)), identity)
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            identity = value


def _error(answer: httpx.Response) -> Exception:
    return answered(answer.status_code, answer.headers, answer.content)


def error_of(data: Mapping[str, Any]) -> Exception:
    """The exception that the data of an error event stands for."""
    return answered(500, httpx.Headers(), json.dumps(data).encode())
