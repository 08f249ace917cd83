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

from sllm_faas.errors import ErrorInfo, PlatformError, SllmError, Unavailable, from_info

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


def _error(answer: httpx.Response) -> SllmError:
    try:
        error = answer.json()["error"]
        return error_of(error, answer.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):
        return PlatformError(f"the server answered {answer.status_code} {answer.reason_phrase}")


def error_of(error: Mapping[str, Any], status: int = 500) -> SllmError:
    """The exception that an error object of the HTTP interface stands for."""
    return from_info(
        ErrorInfo(
            code=str(error.get("code") or "internal"),
            message=str(error.get("message") or "no message"),
            hint=str(error.get("hint") or ""),
            param=str(error.get("param") or ""),
            status=status,
            traceback=str(error.get("traceback") or ""),
        )
    )
