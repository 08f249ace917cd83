"""A node that joins over TCP: its keys come with the token, and invocations reach it, anew or in their middle."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import free_port
from tests.e2e import test_kills as kills
from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at

pytestmark = pytest.mark.e2e
ZOO = Path(__file__).parent / "apps/zoo/zoo.py"


class Strides(kills.Strides):
    period = 0.005


@contextlib.contextmanager
def joined(state: Path, invokers: int) -> Iterator[Platform]:
    """A platform with so many invokers of its own, and the node `far` that joined it over TCP."""
    listen = f"tcp://127.0.0.1:{free_port()}"
    with platform_at(state / "main", "--invokers", str(invokers), "--listen", listen) as main:
        token = main.sllm("join-token").strip().splitlines()[-1]
        env = {**os.environ, "SLLM_STATE_DIR": str(state / "node"), "NO_COLOR": "1"}
        node = Platform(state / "node", 0, env)
        try:
            node.sllm("invoker", "--join", token, "--node-name", "far", "--daemon")
            up = invokers + 1
            eventually(lambda: [each["state"] for each in main.json("node", "list")] == ["up"] * up)
            yield main
        finally:
            node.run("down")
        assert node.processes() == []


def test_functions_and_models_are_served_by_a_node_that_joined_with_a_token() -> None:
    with tempfile.TemporaryDirectory(prefix="sllm-join-") as state, joined(Path(state), 0) as main:
        main.sllm("deploy", str(ZOO))
        answer = main.call("zoo/add", {"a": 40, "b": 2})
        assert (answer.status_code, answer.text) == (200, "42")
        assert main.call("zoo/counter", {"n": 3}, headers={"Accept": "application/json"}).json() == [0, 1, 2]
        assert {row["node"] for row in main.json("ps")} == {"far"}
        main.sllm("deploy", "--model", str(EXAMPLES / "counting/model"), "--name", "counting")
        body = {"model": "counting", "prompt": "1 2 3", "max_tokens": 3, "temperature": 0}
        assert main.post("/v1/completions", body).json()["choices"][0]["text"] == " 4 5 6"


def test_a_stream_moves_to_a_joined_node_and_back() -> None:
    with tempfile.TemporaryDirectory(prefix="sllm-join-") as state, joined(Path(state), 1) as main:
        main.sllm("deploy", str(ZOO))
        main.sllm("node", "cordon", "far")
        stream = Strides(main)
        thread = stream.start()
        eventually(lambda: len(stream.values) >= 3 or stream.end, why="it speaks")
        main.sllm("node", "uncordon", "far")
        for node in ("far", "node-0"):
            answer = main.post(f"/v1/invocations/{stream.invocation}/migrate", {"node": node})
            assert answer.status_code == 200 and answer.json()["outcome"] == "moved", answer.text
            assert main.get(f"/v1/invocations/{stream.invocation}")["node"] == node
        kills.finish([stream])
        thread.join(60)
        assert stream.whole, (stream.end, stream.problem, len(stream.values))


def test_what_is_deployed_is_brought_to_a_second_node_before_it_starts_there() -> None:
    with tempfile.TemporaryDirectory(prefix="sllm-join-") as state, joined(Path(state), 1) as main:

        def describe() -> Any:
            return main.json("describe", "counting/counting")

        main.sllm("node", "cordon", "far")
        main.sllm("deploy", "--model", str(EXAMPLES / "counting/model"), "--name", "counting")
        assert [copy["nodes"] for copy in describe()["copies"]] == [["node-0"]]
        main.sllm("node", "uncordon", "far")
        eventually(lambda: [copy["nodes"] for copy in describe()["copies"]] == [["far", "node-0"]])
        main.sllm("node", "cordon", "node-0")
        body = {"model": "counting", "prompt": "1 2 3", "max_tokens": 3, "temperature": 0}
        assert main.post("/v1/completions", body).json()["choices"][0]["text"] == " 4 5 6"
        (start,) = describe()["starts"]
        assert (start["node"], start["tier"] == "remote") == ("far", False)


def test_a_made_up_token_is_refused_with_a_reason(tmp_path: Path) -> None:
    env = {**os.environ, "SLLM_STATE_DIR": str(tmp_path / "node"), "NO_COLOR": "1"}
    done = Platform(tmp_path / "node", 0, env).run("invoker", "--join", "sllmjoin_nonsense", "--daemon")
    assert done.returncode == 1
    assert "join token" in done.stderr
