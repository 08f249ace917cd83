"""Real platforms for the end-to-end tests: real processes, sockets and a real (tiny, trained) model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.common import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def eventually(what: Callable[[], Any], seconds: float = 30.0, why: str = "") -> Any:
    """`what()` as soon as it is true; fails after `seconds`. For what happens in other processes."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {why or what}")
        select_nothing(0.05)


def select_nothing(seconds: float) -> None:
    """Yield the processor between two looks at other processes."""
    signal.sigtimedwait([], seconds)


@dataclass
class Platform:
    """`sllm up` in a state directory of its own."""

    state: Path
    port: int
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.state / "admin.token").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def run(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sllm_faas.cli", *args],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def sllm(self, *args: str, timeout: float = 120) -> str:
        """The command's output; fails the test when it fails."""
        done = self.run(*args, timeout=timeout)
        assert done.returncode == 0, f"sllm {' '.join(args)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *args: str) -> Any:
        return json.loads(self.sllm(*args, "--json"))

    def get(self, path: str) -> Any:
        answer = httpx.get(self.url + path, headers=self.headers, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def call(self, function: str, body: Any, **kwargs: Any) -> httpx.Response:
        headers = {**self.headers, **kwargs.pop("headers", {})}
        kwargs.setdefault("timeout", 60)
        return httpx.post(f"{self.url}/v1/functions/{function}", json=body, headers=headers, **kwargs)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=60)

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.url + path, headers=self.headers, timeout=60)

    def instances(self) -> list[dict[str, Any]]:
        """What `sllm ps` lists, but at once: what runs may be over in the time that a process takes to start."""
        rows: list[dict[str, Any]] = self.get("/v1/instances")["instances"]
        return rows

    def cleared(self) -> bool:
        """Stop all instances, also one that was started because the last call's end was not known yet."""
        rows = self.instances()
        for row in rows:
            self.delete(f"/v1/instances/{row['instance']}")
        return not rows

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """What is started within is started on that node: the others are cordoned."""
        others = [node["name"] for node in self.get("/v1/nodes")["nodes"] if node["name"] != name]
        for other in others:
            self.post(f"/v1/nodes/{other}/cordon", {}).raise_for_status()
        yield
        for other in others:
            self.post(f"/v1/nodes/{other}/uncordon", {}).raise_for_status()

    def up(self, *flags: str) -> None:
        self.sllm("up", "--daemon", *flags)

    def processes(self) -> list[int]:
        """Every process whose environment names this state directory, the tests' own aside."""
        mark = f"SLLM_STATE_DIR={self.state}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


@contextlib.contextmanager
def platform_at(state: Path, *flags: str) -> Iterator[Platform]:
    port = free_port()
    env = {
        **os.environ,
        "SLLM_STATE_DIR": str(state),
        "SLLM_PORT": str(port),
        "SLLM_SERVER": f"http://127.0.0.1:{port}",
        "NO_COLOR": "1",
    }
    env.pop("SLLM_TOKEN", None)
    here = Platform(state, port, env)
    here.up(*flags)
    try:
        yield here
    finally:
        here.run("down")
        left = here.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"processes left after sllm down: {left}"


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with tempfile.TemporaryDirectory(prefix="sllm-e2e-") as state, platform_at(Path(state)) as here:
        yield here


@pytest.fixture(scope="module")
def counting(platform: Platform) -> Platform:
    """The platform with the counting model deployed."""
    platform.sllm("deploy", str(EXAMPLES / "counting/app.py"))
    return platform


def write_app(folder: Path, source: str, name: str = "app.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(source)
    return path
