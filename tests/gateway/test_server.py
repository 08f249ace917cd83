"""The process: ports, stopping, lost and found peers, slow clients."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sllm_gateway import server
from sllm_gateway.server import listen

from benchmarks.common import free_port
from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, Conflict
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done
from tests.gateway.fakes import FakeController, FakeInvoker, Rig, Running, rig


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="gw") as directory:
        async with rig(Path(directory), **settings) as made:
            yield made


def test_several_gateways_share_a_port_and_nobody_else_does() -> None:
    port = free_port()
    with listen("127.0.0.1", port), listen("127.0.0.1", port):
        pass
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        taken = foreign.getsockname()[1]
        with pytest.raises(Conflict, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"):
            listen("127.0.0.1", taken)


def test_a_host_that_is_not_here_is_a_clear_error() -> None:
    with pytest.raises((BadSpec, Conflict), match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 8700)
    with pytest.raises(BadSpec, match="no-such-host"):
        listen("no-such-host.invalid", 8700)


async def test_stopping_lets_streams_finish_and_readyz_says_so() -> None:
    async with served() as gateway:
        release = asyncio.Event()
        runs: list[Running] = []

        def slow(invoker: FakeInvoker, running: Running) -> None:
            invoker.output(running, b"0")
            runs.append(running)

        gateway.invoker.scripts["count"] = slow

        async def read() -> str:
            text = ""
            async with gateway.http.stream("POST", "/v1/functions/app/count", json={"n": 1}) as answer:
                async for chunk in answer.aiter_text():
                    text += chunk
                    release.set()
            return text

        reading = asyncio.ensure_future(read())
        await release.wait()
        gateway.service.stop()
        assert gateway.service.gateway.stopping
        gateway.invoker.output(runs[0], b"1")
        gateway.invoker.end(runs[0], Type.DONE, Done())
        assert (await reading).endswith('event: done\ndata: {"seconds":0.0}\n\n')
        await gateway.invoker.until(lambda: bool(gateway.invoker.got[Type.BYE]))


async def test_a_stream_that_outlives_the_grace_still_gets_its_end() -> None:
    async with served() as gateway:
        gateway.invoker.scripts["count"] = lambda invoker, running: invoker.output(running, b"0")
        object.__setattr__(gateway.service.config, "shutdown_grace", 0.05)
        text = ""
        async with gateway.http.stream("POST", "/v1/functions/app/count", json={"n": 1}) as answer:
            async for chunk in answer.aiter_text():
                if not text:
                    gateway.service.stop()
                text += chunk
        assert "event: error" in text
        assert '"code":"unavailable"' in text


async def test_a_silent_invoker_is_lost_and_found_again_by_its_next_word() -> None:
    async with served() as gateway:
        links, invoker = gateway.service.links, gateway.invoker
        waiting = asyncio.ensure_future(gateway.http.post("/v1/functions/app/hangs", json={}))
        await invoker.until(lambda: bool(invoker.running))
        now = time.monotonic()
        links._clock = lambda: now + 100.0
        links._timer.cancel()
        wanted = len(invoker.got[Type.WANT])
        links._beat()  # and says HELLO to whoever is lost
        answer = await waiting
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "worker_lost"
        await invoker.until(lambda: len(invoker.got[Type.WANT]) > wanted)
        assert (await gateway.http.post("/v1/functions/app/echo", json={"a": 1})).json() == {"a": 1}


async def test_an_invoker_with_a_new_life_has_lost_what_the_old_one_ran() -> None:
    async with served() as gateway:
        invoker = gateway.invoker
        waiting = asyncio.ensure_future(gateway.http.post("/v1/functions/app/hangs", json={}))
        await invoker.until(lambda: bool(invoker.running))
        invoker.life = "life-2"
        invoker.running.clear()
        wanted = len(invoker.got[Type.WANT])
        for peer in invoker.gateways:
            invoker.router.send(peer, [Header(Type.BYE).pack()])
        assert (await waiting).status_code == 502
        await invoker.until(lambda: len(invoker.got[Type.WANT]) >= wanted + len(invoker.instances))
        assert (await gateway.http.post("/v1/functions/app/echo", json={"a": 1})).status_code == 200


async def test_without_a_controller_functions_run_on_and_administration_is_unavailable() -> None:
    async with served() as gateway:
        gateway.controller.router.send(gateway.controller.peers[0], [Header(Type.BYE).pack()])
        gateway.controller.router.close()
        dispatcher = gateway.service.dispatcher
        while dispatcher.controller.send is not None:
            await asyncio.sleep(0)
        assert (await gateway.http.post("/v1/functions/app/echo", json={"a": 1})).json() == {"a": 1}
        answer = await gateway.http.get("/v1/apps", headers={"Authorization": "Bearer sllm_root"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert (await gateway.http.get("/readyz")).json()["controller"] is False
        gateway.controller = FakeController(gateway.config.controller_endpoint, gateway.controller.nodes)
        while dispatcher.controller.send is None:
            await asyncio.sleep(0)
        assert (await gateway.http.get("/v1/apps", headers={"Authorization": "Bearer sllm_root"})).status_code == 200


async def test_a_client_that_never_finishes_its_headers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.config.port)
        writer.write(b"POST /v1/functions/app/echo HTTP/1.1\r\nHost: loc")
        await writer.drain()
        idle = await asyncio.open_connection("127.0.0.1", gateway.config.port)
        assert (await gateway.http.get("/livez")).status_code == 200
        monkeypatch.setattr(server, "HEADER_PATIENCE", -1.0)
        gateway.service._server.drop_slow()
        assert await reader.read(-1) == b""
        assert await idle[0].read(-1) == b""
        assert (await gateway.http.get("/livez")).status_code == 200
        for each in (writer, idle[1]):
            each.close()


def test_the_process_says_what_is_wrong_with_its_configuration_and_its_port(tmp_path: Path) -> None:
    def start(config: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sllm_gateway", "--config", str(config), "--name", "gateway-0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    missing = start(tmp_path / "none.json")
    assert missing.returncode == 2
    assert "none.json" in missing.stderr
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        config = Config(state_dir=tmp_path / "s", port=foreign.getsockname()[1])
        config.prepare()
        config.write(config.config_path)
        taken = start(config.config_path)
    assert taken.returncode == 3
    assert "cannot listen on 127.0.0.1" in taken.stdout


def test_importing_the_gateway_imports_no_torch() -> None:
    heavy = ("torch", "transformers", "tokenizers", "numpy")
    code = f"import sys, sllm_gateway.server; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert found.stdout.strip() == "[]"
