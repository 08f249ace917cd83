"""A server with canned answers, and a record of what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    kind: str = "application/json"

    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return b"" if self.body is None else json.dumps(self.body).encode()


def error(status: int, code: str, message: str, hint: str = "", traceback: str = "") -> Answer:
    return Answer(status, {"error": {"code": code, "message": message, "hint": hint, "traceback": traceback}})


def events(*items: tuple[str, Any]) -> Answer:
    text = ": ping\n\n" + "".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in items)
    return Answer(200, text.encode(), "text/event-stream")


@dataclass
class Fake:
    answers: dict[str, Answer | Callable[[Asked], Answer]] = field(default_factory=dict)
    """By "METHOD /path"."""
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def last(self) -> Asked:
        return self.asked[-1]

    def start(self) -> ThreadingHTTPServer:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(self.command, parts.path, query, dict(self.headers.items()), body)
                fake.asked.append(asked)
                answer = fake.answers.get(f"{self.command} {parts.path}", error(404, "not_found", f"no {parts.path}"))
                if callable(answer):
                    answer = answer(asked)
                data = answer.data()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server
