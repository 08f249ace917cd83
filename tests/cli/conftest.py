"""A server with canned answers, and the command line against it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_faas import cli

_spec = importlib.util.spec_from_file_location("fake_server", Path(__file__).with_name("fake_server.py"))
assert _spec is not None
assert _spec.loader is not None
fake_server = importlib.util.module_from_spec(_spec)
sys.modules["fake_server"] = fake_server
_spec.loader.exec_module(fake_server)
Answer, Fake, error, events = fake_server.Answer, fake_server.Fake, fake_server.error, fake_server.events

Run = Callable[..., tuple[int, str, str]]

INSTANCE = {
    "instance": "i-1", "app": "demo", "function": "square", "version": 3, "target": "demo/square@3", "state": "ready",
    "running": 1, "concurrency": 4, "node": "node-0", "warmth": "libs", "age": 5.0, "pid": 77, "memory_mb": 256,
    "why": "least estimated start", "timeline": {"began": 0.0, "spans": [
        {"name": "fork", "start": 0.0, "seconds": 0.01, "detail": ""},
        {"name": "attach", "start": 0.01, "seconds": 0.03, "detail": "disk 2.1 GB/s"}]},
}  # fmt: skip
FUNCTION = {
    "app": "demo", "name": "square", "kind": "function", "version": 3, "methods": [{"name": "square", "stream": False}],
    "parameters": [], "concurrency": 4, "max_queue": 10, "memory_mb": 256, "secrets": ["KEY"], "checkpoint": None,
    "timeouts": {"queue": 60.0, "startup": 300.0, "first_output": None, "idle": 120.0, "execution": 300.0},
    "scaling": {"min_containers": 0, "max_containers": 8, "buffer_containers": 0, "scaledown_window": 60.0,
                "target_tokens": 2000},
    "instances": {"requested": 0, "starting": 0, "ready": 1, "draining": 0}, "waiting": 0, "running": 1,
}  # fmt: skip
APP = {
    "app": "demo", "version": 3, "weight": 1.0, "max_concurrency": 12, "functions": [FUNCTION],
    "versions": [
        {"version": 3, "state": "ready", "active": True, "created": 0.0, "error": None, "functions": ["square"]},
        {"version": 2, "state": "failed", "active": False, "created": 0.0, "error": {"message": "no torch"},
         "functions": ["square"]},
    ],
}  # fmt: skip
NODE = {
    "name": "node-0", "state": "up", "cordoned": False, "draining": False, "instances": 1, "memory_used_mb": 256,
    "memory_mb": 8192, "disk_free_mb": 1024, "cores": 2.0, "gpus": 0, "checkpoints": ["ab" * 32], "labels": {},
    "bandwidth": {"disk": 2e9},
}  # fmt: skip
APPS = {
    "apps": [{"name": "demo", "version": 3, "created": 0.0, "functions": ["square"], "instances": 1, "deploying": None}]
}
INVOCATION = "inv-" + "0" * 32
RECORD = {
    "invocation": INVOCATION, "app": "demo", "function": "square", "version": 3, "target": "demo/square@3",
    "method": "", "gateway": "gateway-0", "state": "failed",
    "error": {"code": "function_error", "message": "it broke", "hint": ""},
    "began": 0.0, "seconds": 0.2, "instance": "i-1", "node": "node-0", "why": "only node", "cold": True, "attempts": 1,
    "outputs": 0, "usage": {}, "timeline": [{"name": "queue", "start": 0.0, "seconds": 0.1, "detail": ""},
                                            {"name": "run", "start": 0.1, "seconds": 0.1, "detail": ""}],
}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in list(os.environ):
        if name.startswith("SLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    fake = Fake(
        {
            "GET /v1/apps": Answer(body=APPS),
            "GET /v1/apps/demo": Answer(body=APP),
            "GET /v1/instances": Answer(body={"instances": [INSTANCE]}),
            "GET /v1/nodes": Answer(body={"nodes": [NODE]}),
        }
    )
    server = fake.start()
    monkeypatch.setenv("SLLM_SERVER", fake.url)
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def sllm(fake: Any, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: str) -> tuple[int, str, str]:
        code = cli.execute(args)
        out, err = capsys.readouterr()
        return code, out, err

    return run
