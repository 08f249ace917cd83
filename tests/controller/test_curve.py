"""Keys and admission over real loopback TCP: who holds an admitted key gets in, nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import zmq
import zmq.utils.monitor

from sllm_faas.config import Config
from sllm_faas.controller.service import Controller
from sllm_faas.errors import BadRequest, BadSpec, Conflict, Forbidden
from sllm_faas.wire.bus import CurveKeys, Dealer, Router
from sllm_faas.wire.curve import DOMAIN, Admission, JoinToken, load, load_or_create, public_of
from sllm_faas.wire.header import Type
from sllm_faas.wire.messages import Hello, Keys, NodeInfo
from tests.controller.fakes import Gateway, Invoker

WAIT = 10.0
lives = (f"life-{number}" for number in itertools.count(1))


async def handshake(endpoint: str, keys: CurveKeys | None, server_key: str) -> bool:
    """Whether the server lets these keys in, as the client's own socket learns it."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        socket.curve_serverkey = server_key.encode()
    socket.handshake_ivl = 500
    wanted = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    wanted |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
    monitor = socket.get_monitor_socket(wanted)
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(monitor.getsockopt(zmq.FD), readable.set)
    try:
        socket.connect(endpoint)
        async with asyncio.timeout(WAIT):
            while not monitor.poll(0):
                readable.clear()
                if not monitor.poll(0):
                    await readable.wait()
        event = zmq.utils.monitor.recv_monitor_message(monitor)["event"]
        return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
    finally:
        loop.remove_reader(monitor.getsockopt(zmq.FD))
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)


@pytest.fixture
async def admission():
    allowed: set[str] = set()
    handler = Admission({DOMAIN: allowed.__contains__})
    handler.start()
    handler.allowed = allowed  # type: ignore[attr-defined]
    yield handler
    handler.stop()


@pytest.fixture
async def server(admission):
    keys = CurveKeys.generate()
    seen: asyncio.Queue[list[bytes]] = asyncio.Queue()
    router = Router("tcp://127.0.0.1:*", lambda _peer, parts: seen.put_nowait(parts), keys=keys)
    yield router.endpoint, keys.public, seen
    router.close()


# -- key files ---------------------------------------------------------------------------------------------------


def test_keys_are_made_once_and_private(tmp_path: Path):
    folder = tmp_path / "keys"
    first = load_or_create(folder, "gateway")
    assert load_or_create(folder, "gateway") == first
    assert (folder / "gateway.key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert public_of(first.secret) == first.public
    assert load_or_create(folder, "controller") != first
    assert sorted(path.name for path in folder.iterdir()) == ["controller.key", "gateway.key"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path):
    load_or_create(tmp_path, "k")
    os.chmod(tmp_path / "k.key", 0o640)
    with pytest.raises(Forbidden, match="mode 640; allowed: 600"):
        load(tmp_path / "k.key")


def test_a_file_without_a_key_is_named(tmp_path: Path):
    path = tmp_path / "k.key"
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(BadRequest, match="does not hold a key"):
        load(path)


# -- join tokens -------------------------------------------------------------------------------------------------


def token(**changes) -> JoinToken:
    keys, server = CurveKeys.generate(), CurveKeys.generate()
    made = JoinToken("tcp://10.0.0.1:8701", server.public, keys.public, keys.secret, 1000.0)
    return dataclasses.replace(made, **changes)


def test_a_join_token_comes_back_as_it_was():
    made = token()
    assert made.encode().startswith("sllmjoin_")
    assert JoinToken.decode(made.encode()) == made
    assert public_of(made.keys.secret) == made.keys.public


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sllmjoin_",
        "sllmjoin_!!!!",
        "sllmjoin_e30",
        "sllm_" + "a" * 43,
        token().encode()[:-20],
        token(endpoint="ipc:///x").encode(),
        token(server_key="short").encode(),
        token(public=CurveKeys.generate().public).encode(),
        token(expires="soon").encode(),
    ],
)
def test_what_is_no_join_token_is_refused_without_being_repeated(text):
    with pytest.raises(BadRequest, match="not a join token") as caught:
        JoinToken.decode(text)
    assert not text or text == "sllmjoin_" or text not in str(caught.value)


def test_a_join_token_expires():
    token().check_fresh(999.0)
    with pytest.raises(BadRequest, match="expired"):
        token().check_fresh(1001.0)


# -- admission ---------------------------------------------------------------------------------------------------


async def test_an_admitted_key_gets_in_and_its_frames_through(server, admission):
    endpoint, server_key, seen = server
    keys = CurveKeys.generate()
    admission.allowed.add(keys.public)
    assert await handshake(endpoint, keys, server_key)
    dealer = Dealer(endpoint, b"node", lambda _parts: None, keys=keys, server_key=server_key)
    dealer.send([b"hello"])
    async with asyncio.timeout(WAIT):
        assert await seen.get() == [b"hello"]
    dealer.close()


async def test_a_key_that_is_not_admitted_stays_out(server, admission):
    endpoint, server_key, _ = server
    assert not await handshake(endpoint, CurveKeys.generate(), server_key)
    assert admission.refused >= 1


async def test_a_client_without_keys_stays_out(server):
    endpoint, _, _ = server
    assert not await handshake(endpoint, None, "")


async def test_a_client_that_expects_another_server_does_not_connect(server, admission):
    """Nobody can pose as the controller."""
    endpoint, _, _ = server
    keys = CurveKeys.generate()
    admission.allowed.add(keys.public)
    assert not await handshake(endpoint, keys, CurveKeys.generate().public)


async def test_a_public_key_alone_is_not_enough(server, admission):
    """Knowing an admitted key is not holding its secret."""
    endpoint, server_key, _ = server
    admitted = CurveKeys.generate()
    admission.allowed.add(admitted.public)
    assert not await handshake(endpoint, CurveKeys(admitted.public, CurveKeys.generate().secret), server_key)


async def test_who_is_early_comes_in_once_its_key_is_known():
    """A link is opened when its other end may not have been told of it yet; nobody opens it again."""
    allowed: set[str] = set()
    handler = Admission({DOMAIN: allowed.__contains__}, later=True)
    handler.start()
    server, early = CurveKeys.generate(), CurveKeys.generate()
    seen: asyncio.Queue[list[bytes]] = asyncio.Queue()
    router = Router("tcp://127.0.0.1:*", lambda _peer, parts: seen.put_nowait(parts), keys=server)
    assert not await handshake(router.endpoint, early, server.public)
    dealer = Dealer(router.endpoint, b"node", lambda _parts: None, keys=early, server_key=server.public)
    dealer.send([b"hello"])
    assert not await handshake(router.endpoint, early, server.public)
    allowed.add(early.public)
    async with asyncio.timeout(WAIT):
        assert await seen.get() == [b"hello"]
    for part in (dealer, router, handler):
        part.stop() if part is handler else part.close()


async def test_a_key_opens_the_domain_it_is_for_and_no_other():
    keys = {name: CurveKeys.generate() for name in ("a", "b")}
    handler = Admission({name: pair.public.__eq__ for name, pair in keys.items()})
    handler.start()
    server = CurveKeys.generate()
    for name in keys:
        router = Router("tcp://127.0.0.1:*", lambda _peer, _parts: None, keys=server, domain=name)
        let_in = {other for other in keys if await handshake(router.endpoint, keys[other], server.public)}
        assert let_in == {name}
        router.close()
    handler.stop()


async def test_a_revoked_key_is_out_at_its_next_handshake(server, admission):
    endpoint, server_key, _ = server
    keys = CurveKeys.generate()
    admission.allowed.add(keys.public)
    assert await handshake(endpoint, keys, server_key)
    admission.allowed.remove(keys.public)
    assert not await handshake(endpoint, keys, server_key)


async def test_tcp_without_keys_is_refused_on_both_ends():
    with pytest.raises(BadSpec, match="TCP without keys"):
        Router("tcp://127.0.0.1:*", lambda _peer, _parts: None)
    with pytest.raises(BadSpec, match="TCP without keys"):
        Dealer("tcp://127.0.0.1:1", b"x", lambda _parts: None)


# -- joining a controller ----------------------------------------------------------------------------------------


@pytest.fixture
async def listening(config: Config, unused_tcp_port: int):
    controller = Controller(dataclasses.replace(config, listen=f"tcp://127.0.0.1:{unused_tcp_port}"))
    await controller.start()
    yield controller
    await controller.stop()


@pytest.fixture
async def local(listening):
    peer = Gateway(listening.endpoints[0], "gateway", "gateway-0")
    await peer.hello()
    yield peer
    peer.close()


@contextlib.contextmanager
def joining(made: JoinToken, role=Invoker, name="node-9"):
    life = next(lives)
    peer = role(made.endpoint, role.__name__.lower(), name, life, keys=made.keys, server_key=made.server_key)
    try:
        yield peer
    finally:
        peer.close()


def hello(name: str) -> Hello:
    return Hello("invoker", name, "life-1", node=NodeInfo(name, "tcp://10.0.0.9:9000", curve_key="k", memory_mb=100))


async def test_a_node_joins_with_its_token_and_learns_whom_to_let_in(listening, local, config):
    made = JoinToken.decode((await local.call("join.create", expires_in=60.0))["token"])
    with joining(made) as node:
        node.send(Type.HELLO, hello("node-9"))
        await node.expect(Type.WELCOME)
        keys = (await node.expect(Type.KEYS)).body
    ours = [load(config.keys_dir / f"{name}.key").public for name in ("gateway", "invoker")]
    assert keys == Keys((ours[0],), (ours[1], made.public))
    assert [n["name"] for n in (await local.call("node.list"))["nodes"]] == ["node-9"]
    (listed,) = (await local.call("join.list"))["tokens"]
    assert listed["used"] is not None
    assert made.secret not in str(listed)


async def test_every_invoker_is_told_when_another_joins_and_when_one_is_thrown_out(listening, local):
    """By the key that was proved, and neither by one that is only claimed nor by one that was never used."""
    near = Invoker(listening.endpoints[0], "invoker", "node-0")
    await near.hello()
    before = (await near.expect(Type.KEYS)).body
    made = JoinToken.decode((await local.call("join.create"))["token"])
    await local.call("join.create")
    with joining(made) as node:
        node.send(Type.HELLO, hello("node-9"))
        await node.expect(Type.WELCOME)
    assert (await near.expect(Type.KEYS)).body.invokers == (*before.invokers, made.public)
    await local.call("join.revoke", key=made.public)
    assert (await near.expect(Type.KEYS)).body == before
    near.close()


async def test_a_revoked_join_token_lets_nobody_in(listening, local):
    made = JoinToken.decode((await local.call("join.create"))["token"])
    assert await handshake(made.endpoint, made.keys, made.server_key)
    await local.call("join.revoke", key=made.public)
    assert not await handshake(made.endpoint, made.keys, made.server_key)


async def test_an_expired_token_is_good_only_for_the_node_that_used_it(listening, local, monkeypatch):
    used = JoinToken.decode((await local.call("join.create", expires_in=5.0))["token"])
    unused = JoinToken.decode((await local.call("join.create", expires_in=5.0))["token"])
    assert await handshake(used.endpoint, used.keys, used.server_key)
    monkeypatch.setattr("sllm_faas.controller.access.time.time", lambda: used.expires + 1)
    assert await handshake(used.endpoint, used.keys, used.server_key)
    assert not await handshake(unused.endpoint, unused.keys, unused.server_key)


async def test_over_tcp_only_invokers_are_heard(listening, local):
    """A node's key must not become an administrator's."""
    made = JoinToken.decode((await local.call("join.create"))["token"])
    with joining(made, Gateway, "gateway-7") as posing:
        posing.send(Type.HELLO, Hello("gateway", "gateway-7", "1"))
        posing.send(Type.HEARTBEAT)
        await posing.expect(Type.BYE)
    assert (await local.call("status"))["counts"]["gateways"] == 1


async def test_a_node_cannot_take_the_name_of_one_that_is_connected_otherwise(listening, local):
    node = Invoker(listening.endpoints[0], "invoker", "node-0")
    await node.hello()
    made = JoinToken.decode((await local.call("join.create"))["token"])
    with joining(made, Invoker, "node-0") as posing:
        posing.send(Type.HELLO, hello("node-0"))
        posing.send(Type.HEARTBEAT)
        await posing.expect(Type.BYE)
    node.close()


async def test_two_machines_of_one_name_do_not_throw_each_other_out(listening, local):
    """The second one is refused while the first one speaks; its instances are not touched."""
    made = JoinToken.decode((await local.call("join.create"))["token"])
    with joining(made) as first, joining(made) as second:
        first.send(Type.HELLO, hello("node-9"))
        await first.expect(Type.WELCOME)
        second.send(Type.HELLO, dataclasses.replace(hello("node-9"), life="life-2"))
        second.send(Type.HEARTBEAT)
        await second.expect(Type.BYE)
        (node,) = (await local.call("node.list"))["nodes"]
        assert node["life"] == "life-1"


@pytest.mark.parametrize(
    "endpoints",
    [
        {"endpoint": "ipc:///etc/passwd"},
        {"endpoint": "tcp://10.0.0.9:9000", "neighbour_endpoint": "ipc:///etc/passwd"},
    ],
)
async def test_a_remote_node_that_names_a_local_socket_is_refused(listening, local, endpoints):
    made = JoinToken.decode((await local.call("join.create"))["token"])
    with joining(made) as node:
        bad = NodeInfo("node-9", **endpoints, curve_key="k")
        node.send(Type.HELLO, dataclasses.replace(hello("node-9"), node=bad))
        node.send(Type.HEARTBEAT)
        await node.expect(Type.BYE)
    assert (await local.call("node.list"))["nodes"] == []


async def test_a_platform_that_does_not_listen_makes_no_join_tokens(controller, gateway):
    with pytest.raises(Conflict, match="does not listen"):
        await gateway.call("join.create")
