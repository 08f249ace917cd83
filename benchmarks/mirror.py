"""A folder of models behind http://127.0.0.1, for the remote tier: a mirror on this machine, in a process of its own.

with mirror(folder) as url: …            python -m benchmarks.mirror FOLDER PORT
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import free_port, process

_RANGE = re.compile(r"bytes=(\d+)-(\d*)", re.ASCII)


class Handler(http.server.SimpleHTTPRequestHandler):
    """With an ETag and ranges, as a store of objects has them: what is fetched may be gone on with, and in pieces."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None or not path.is_file() or self.headers.get("If-Range", tag := _tag(path)) != tag:
            super().do_GET()
            return
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, size) if wanted[2] else size
            self.send_response(206 if start < end else 416)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}")
            self.send_header("Content-Length", str(max(0, end - start)))
            self.send_header("Last-Modified", self.date_time_string(int(found.st_mtime)))
            self.end_headers()
            file.seek(start)
            while start < end and (data := file.read(min(shutil.COPY_BUFSIZE, end - start))):
                self.wfile.write(data)
                start += len(data)

    def end_headers(self) -> None:
        with contextlib.suppress(OSError):
            self.send_header("ETag", _tag(Path(self.translate_path(self.path))))
        super().end_headers()


def _tag(path: Path) -> str:
    found = path.stat()
    return f'"{found.st_size:x}-{found.st_mtime_ns:x}"'


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # of connections at the same time; one too many waits a second


@contextlib.contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """Its URL."""
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.mirror", str(folder), str(port)]) as server:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the mirror of {folder} does not answer at port {port}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"


def rate(url: str) -> float:
    """GB/s of one plain fetch: what the mirror gives whoever does nothing else."""
    done, began = 0, time.perf_counter()
    buffer = bytearray(4 << 20)
    with urllib.request.urlopen(url, timeout=60) as answer:
        while count := answer.readinto(buffer):
            done += count
    return done / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
