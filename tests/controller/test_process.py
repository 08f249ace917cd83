"""The controller's own process: ready line, orderly stop, and errors a person can act on."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sllm_faas import controller
from sllm_faas.config import Config


@pytest.fixture
def path(config: Config) -> Path:
    config.write(config.config_path)
    return config.config_path


def launch(path: Path, *code: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(code or ("-m", "sllm_faas.controller"))]
    command += ["--config", str(path), "--name", "controller"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_it_says_ready_and_stops_in_order_on_sigterm(path: Path, config: Config):
    process = launch(path)
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "ready":
        pass
    assert Path(config.controller_endpoint.removeprefix("ipc://")).is_socket()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert errors == ""
    assert lines(out)[-1]["event"] == "stopped"


def test_a_database_that_is_none_is_one_clear_line_and_exit_1(path: Path, config: Config):
    config.db_path.write_bytes(b"garbage" * 1000)
    out, errors = launch(path).communicate(timeout=20)
    (line,) = lines(out)
    assert line["code"] == "store_broken"
    assert "move it away" in str(line["hint"])
    assert errors == ""


def test_it_imports_no_torch_and_no_web_framework():
    code = (
        "import sys, sllm_faas.controller.__main__, sllm_faas.controller.service\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'starlette', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PURE = [
    "deployments",
    "state",
    "instances",
    "scaling",
    "ledger",
    "model",
    "placement",
    "estimate",
    "autoscale",
    "tables",
    "events",
    "commands",
    "views",
    "routes",
]
IMPURE = {"asyncio", "zmq", "time", "random", "sqlalchemy", "os", "secrets", "threading", "datetime"}


@pytest.mark.parametrize("name", PURE)
def test_the_deciding_modules_are_pure(name: str):
    """No clock, no loop, no sockets, no SQL, no chance in what decides."""
    tree = ast.parse((Path(controller.__file__).parent / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in imported} & IMPURE
