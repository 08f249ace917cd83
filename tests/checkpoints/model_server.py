"""A server of one model folder, by HTTP and as S3 would, that misbehaves as told."""

from __future__ import annotations

import contextlib
import hashlib
import re
import select
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


class Server(ThreadingHTTPServer):
    """Serves `folder` under /bucket/model with ETags and ranges, and misbehaves as told. `cut` ends every answer of the
    weights after so many bytes; `claim` is a size of the weights that HEAD gives in place of the true one; `refuses` is
    of ranges, `shift` is how far those are off that do not begin at 0; `hangs_up` has it close a connection when it has
    answered, without a word; `busy` is how many requests are told to come again; `hold` has it wait there (`held`),
    until `go_on` or its client is gone (`left`); `asked` has (method, name, range). With `tls` it speaks that."""

    request_queue_size = 128

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "https" if tls is not None else "http"
        if tls is not None:  # a handshake is that connection's own matter
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.folder = folder
        self.cut = 0
        self.claim = 0
        self.hold = 0
        self.held = threading.Event()
        self.left = threading.Event()
        self._wait, self._go = socket.socketpair()
        self.tags = True
        self.ranges = True
        self.refuses = False
        self.shift = 0
        self.hangs_up = False
        self.busy = 0
        self.redirect = ""
        self.asked: list[tuple[str, str, str]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}/bucket/model"

    def go_on(self) -> None:
        """All answers that are held, and none after them."""
        self.hold = 0
        self._go.send(b"!")

    def wait_for(self, client: socket.socket) -> bool:
        """Whether the client is still there when answers go on."""
        self.held.set()
        if client in select.select([client, self._wait], [], [])[0]:
            self.left.set()
            return False
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):  # its client has left, or does not trust it
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        self._go.close()  # whoever still waits goes on
        super().server_close()
        self._wait.close()

    def weights_asked(self) -> list[str]:
        return [wanted for method, name, wanted in self.asked if method == "GET" and name == WEIGHTS]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_GET(self) -> None:
        self._answer(self.headers.get("Range"))

    def _answer(self, wanted: str | None) -> None:
        name = self.path.removeprefix("/bucket/model/").partition("?")[0]
        self.server.asked.append((self.command, name, wanted or ""))
        path = self.server.folder / name
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if "/" in name or not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        changed, refused = self.headers.get("If-Match", tag) != tag, bool(wanted) and self.server.refuses
        if changed or refused:
            self.send_response(412 if changed else 403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.command == "GET" and name == WEIGHTS and self.server.busy:
            self.server.busy -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end, whole = 0, len(data), len(data)
        if wanted and self.server.ranges and self.headers.get("If-Range", tag) == tag:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            assert match
            start, end = int(match[1]), int(match[2]) + 1 if match[2] else whole
            assert end <= whole
            self.send_response(206)
            shift = self.server.shift if start else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{whole}")
        else:
            self.send_response(200)
        if self.server.tags:
            self.send_header("ETag", tag)
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 04:00:00 GMT")
        claimed = self.server.claim if name == WEIGHTS and self.command == "HEAD" else 0
        self.send_header("Content-Length", str(claimed or end - start))
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut if name == WEIGHTS else 0
            hold = self.server.hold if name == WEIGHTS else 0
            if hold:
                self.wfile.write(data[start : min(start + hold, end)])
                if not self.server.wait_for(self.connection):
                    self.close_connection = True
                    return
                start += hold
            self.wfile.write(data[start : min(start + cut, end) if cut else end])
            self.close_connection = bool(cut) or self.server.hangs_up


@contextlib.contextmanager
def serving(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    made = Server(folder, tls)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
