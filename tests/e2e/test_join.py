"""A node that joins over TCP: its keys come with the token, and invocations reach it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.e2e.conftest import EXAMPLES, Platform, eventually, free_port, platform_at

pytestmark = pytest.mark.e2e
ZOO = Path(__file__).parent / "apps/zoo/zoo.py"


def test_functions_and_models_are_served_by_a_node_that_joined_with_a_token() -> None:
    listen = f"tcp://127.0.0.1:{free_port()}"
    with (
        tempfile.TemporaryDirectory(prefix="sllm-join-") as state,
        platform_at(Path(state) / "main", "--invokers", "0", "--listen", listen) as main,
    ):
        token = main.sllm("join-token").strip().splitlines()[-1]
        env = {**os.environ, "SLLM_STATE_DIR": f"{state}/node", "NO_COLOR": "1"}
        node = Platform(Path(state) / "node", 0, env)
        try:
            node.sllm("invoker", "--join", token, "--node-name", "far", "--daemon")
            eventually(lambda: [each for each in main.json("node", "list") if each["state"] == "up"])
            main.sllm("deploy", str(ZOO))
            answer = main.call("zoo/add", {"a": 40, "b": 2})
            assert (answer.status_code, answer.text) == (200, "42")
            assert main.call("zoo/counter", {"n": 3}, headers={"Accept": "application/json"}).json() == [0, 1, 2]
            assert {row["node"] for row in main.json("ps")} == {"far"}
            main.sllm("deploy", "--model", str(EXAMPLES / "counting/model"), "--name", "counting")
            body = {"model": "counting", "prompt": "1 2 3", "max_tokens": 3, "temperature": 0}
            assert main.post("/v1/completions", body).json()["choices"][0]["text"] == " 4 5 6"
        finally:
            node.run("down")
        assert node.processes() == []


def test_a_made_up_token_is_refused_with_a_reason(tmp_path: Path) -> None:
    env = {**os.environ, "SLLM_STATE_DIR": str(tmp_path / "node"), "NO_COLOR": "1"}
    done = Platform(tmp_path / "node", 0, env).run("invoker", "--join", "sllmjoin_nonsense", "--daemon")
    assert done.returncode == 1
    assert "join token" in done.stderr
