"""A node that joins over TCP: CURVE both ways, and only the gateways that the controller names get in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sllm_invoker.containers import tree

from sllm_faas.config import Config
from sllm_faas.wire.bus import CurveKeys, Dealer, Parts, Router
from sllm_faas.wire.codec import decode, encode
from sllm_faas.wire.curve import Admission, JoinToken
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Hello, NodeInfo, Welcome

pytestmark = pytest.mark.e2e


async def test_a_joined_node_lets_in_the_gateways_it_was_told_of(tmp_path: Path) -> None:
    server, node, known, stranger = (CurveKeys.generate() for _ in range(4))
    admission = Admission(lambda key: key == node.public)
    admission.start()
    joined: asyncio.Future[NodeInfo] = asyncio.get_running_loop().create_future()

    def from_node(peer: bytes, parts: Parts) -> None:
        frame = decode(parts)
        if frame.header.type is Type.HELLO and not joined.done():
            joined.set_result(frame.body.node)
            welcome = Welcome("controller", "life", gateway_keys=(known.public,))
            controller.send(peer, encode(Header(Type.WELCOME), welcome))

    controller = Router("tcp://127.0.0.1:*", from_node, keys=server)
    token = JoinToken(controller.endpoint, server.public, node.public, node.secret, time.time() + 60)
    config = Config(state_dir=tmp_path / "s", join=token.encode(), shutdown_grace=1.0)
    config.prepare()
    path = config.run_dir / "config.json"
    config.write(path)
    command = [sys.executable, "-P", "-m", "sllm_invoker", "--config", str(path), "--name", "far"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    dealers = []
    try:
        async with asyncio.timeout(30):
            info = await joined
            assert info.endpoint.startswith("tcp://") and info.curve_key == node.public
            heard: dict[str, asyncio.Event] = {"known": asyncio.Event(), "stranger": asyncio.Event()}

            def listen(name: str, keys: CurveKeys) -> None:
                def receive(parts: Parts) -> None:
                    if unpack(parts[0]).type is Type.WELCOME:
                        heard[name].set()

                dealer = Dealer(info.endpoint, name.encode(), receive, keys=keys, server_key=info.curve_key)
                dealer.send(encode(Header(Type.HELLO), Hello("gateway", name, "1")))
                dealers.append(dealer)

            listen("stranger", stranger)
            listen("known", known)
            await heard["known"].wait()
            assert not heard["stranger"].is_set()
        assert token.secret not in (tmp_path / "log").read_text()
    finally:
        for dealer in dealers:
            dealer.close()
        process.kill()
        process.wait()
        controller.close()
        admission.stop()
        tree.reap(config.node_dir("far"))
