"""A node that joins over TCP: CURVE both ways, and only the gateways that the controller names get in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from sllm_invoker.containers import tree

from sllm_faas.config import Config
from sllm_faas.wire.bus import CurveKeys, Dealer, Parts, Router
from sllm_faas.wire.codec import decode, encode
from sllm_faas.wire.curve import DOMAIN, Admission, JoinToken
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Hello, Keys, NodeInfo, Welcome

pytestmark = pytest.mark.e2e


async def test_a_joined_node_lets_in_whom_it_was_told_of_and_each_for_what_it_is(tmp_path: Path) -> None:
    server, node, known, neighbour, stranger = (CurveKeys.generate() for _ in range(5))
    admission = Admission({DOMAIN: node.public.__eq__})
    admission.start()
    joined: asyncio.Future[NodeInfo] = asyncio.get_running_loop().create_future()

    def from_node(peer: bytes, parts: Parts) -> None:
        frame = decode(parts)
        if frame.header.type is Type.HELLO and not joined.done():
            joined.set_result(frame.body.node)
            controller.send(peer, encode(Header(Type.WELCOME), Welcome("controller", "life")))
            controller.send(peer, encode(Header(Type.KEYS), Keys((known.public,), (neighbour.public,))))

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
            assert info.neighbour_endpoint.startswith("tcp://") and info.neighbour_endpoint != info.endpoint
            welcomed: asyncio.Queue[str] = asyncio.Queue()

            def knock(name: str, endpoint: str, role: Literal["gateway", "invoker"], keys: CurveKeys) -> None:
                def receive(parts: Parts) -> None:
                    if unpack(parts[0]).type is Type.WELCOME:
                        welcomed.put_nowait(name)

                dealer = Dealer(endpoint, name.encode(), receive, keys=keys, server_key=info.curve_key)
                dealer.send(encode(Header(Type.HELLO), Hello(role, name, "1")))
                dealers.append(dealer)

            knock("stranger", info.endpoint, "gateway", stranger)
            knock("a stranger as an invoker", info.neighbour_endpoint, "invoker", stranger)
            knock("an invoker at the gateways'", info.endpoint, "gateway", neighbour)
            knock("an invoker as a gateway", info.neighbour_endpoint, "gateway", neighbour)
            knock("a gateway as an invoker", info.endpoint, "invoker", known)
            knock("gateway", info.endpoint, "gateway", known)
            knock("invoker", info.neighbour_endpoint, "invoker", neighbour)
            assert {await welcomed.get(), await welcomed.get()} == {"gateway", "invoker"}
            assert welcomed.empty()
        assert token.secret not in (tmp_path / "log").read_text()
    finally:
        for dealer in dealers:
            dealer.close()
        process.kill()
        process.wait()
        controller.close()
        admission.stop()
        tree.reap(config.node_dir("far"))
