"""A folder of models behind http://127.0.0.1, for the remote tier: a mirror on this machine, in a process of its own.

with mirror(folder) as url: …            python -m benchmarks.mirror FOLDER PORT
"""

from __future__ import annotations

import contextlib
import http.server
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import free_port, process


class Handler(http.server.SimpleHTTPRequestHandler):
    """With an ETag, as a store of objects gives one: what is fetched may be gone on with."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def end_headers(self) -> None:
        with contextlib.suppress(OSError):
            found = Path(self.translate_path(self.path)).stat()
            self.send_header("ETag", f'"{found.st_size:x}-{found.st_mtime_ns:x}"')
        super().end_headers()


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
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
