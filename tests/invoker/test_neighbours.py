"""A move between two relays over the sockets that their machines leave them: a local one, or TCP with keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sllm_invoker.entrances import GATEWAYS, INVOKERS
from sllm_invoker.relay import Relay
from sllm_invoker.relay_core import Instance, RelayCore

from sllm_faas.spec import Timeline
from sllm_faas.wire.bus import CurveKeys, Dealer
from sllm_faas.wire.codec import decode, encode
from sllm_faas.wire.curve import Admission
from sllm_faas.wire.header import NO_LIMIT, Header, Type
from sllm_faas.wire.messages import Hello, Invoke, Migrate, Migrated, MoveResult, NodeInfo, ResumeState
from tests.invoker.test_relay import TARGET, Container, Peer, events

ID = b"i" * 16
GATEWAY = CurveKeys.generate()
LARGE = b"x" * 100_000


@dataclass
class Node:
    """A relay with one ready instance, on the platform's machine or on one that joined."""

    relay: Relay
    info: NodeInfo
    container: Container
    migrated: asyncio.Queue[Migrated]

    @classmethod
    def at(cls, folder: Path, name: str, *, joined: bool) -> Node:
        keys, told = CurveKeys.generate(), asyncio.Queue[Migrated]()
        endpoint = "tcp://127.0.0.1:*" if joined else f"ipc://{folder}/{name}.sock"
        heard = replace(events(), migrated=told.put_nowait)
        relay = Relay(RelayCore(name), endpoint, heard, life="1", neighbours="tcp://127.0.0.1:*", keys=keys)
        relay.add(Instance(1, f"ins-{name}", b"ins-1", TARGET, 2, None, 5.0))
        relay.ready(1, Timeline())
        info = NodeInfo(name, relay.endpoint, keys.public, neighbour_endpoint=relay.neighbour_endpoint)
        return cls(relay, info, Container(relay), told)

    def close(self) -> None:
        self.container.stream.close()
        self.relay.close()

    async def result(self) -> MoveResult:
        """Of the move from here."""
        async with asyncio.timeout(10):
            (result,) = (await self.migrated.get()).results
        return result

    def told(self, kind: Type, seq: int, body: object = None) -> None:
        """The container says it, of the invocation."""
        self.container.stream.send(encode(Header(kind, ID, 1, 1, seq=seq), body))

    def move_to(self, there: Node) -> None:
        endpoint, key = there.info.reached_from(self.info)
        to, name = there.info.name, self.info.name
        self.relay.migrate(Migrate("mig-1", f"ins-{name}", to, endpoint, f"ins-{to}", 1, key))


class Gateway(Peer):
    def __init__(self, node: Node) -> None:
        super().__init__()
        info = node.info
        self.dealer = Dealer(info.endpoint, b"gateway-0:x", self.receive, keys=GATEWAY, server_key=info.curve_key)
        self.dealer.send(encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))


@pytest.fixture
async def known() -> AsyncIterator[set[str]]:
    """The keys that are let in at the relays' sockets for invokers."""
    keys: set[str] = set()
    admission = Admission({GATEWAYS: GATEWAY.public.__eq__, INVOKERS: keys.__contains__}, later=True)
    admission.start()
    yield keys
    admission.stop()


@pytest.fixture
async def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Node, Node]]:
    joined = request.param
    made = Node.at(tmp_path, "a", joined=joined[0]), Node.at(tmp_path, "b", joined=joined[1])
    yield made
    for node in made:
        node.close()


async def moving(here: Node, there: Node) -> Gateway:
    """The gateway of an invocation with large arguments that runs here and was told to move there."""
    gateway = Gateway(here)
    await gateway.next(Type.GRANT)
    gateway.dealer.send(encode(Header(Type.INVOKE, ID, 1, 1, credit=NO_LIMIT), Invoke("f"), LARGE))
    await here.container.next(Type.INVOKE)
    here.move_to(there)
    await here.container.next(Type.SNAPSHOT)
    here.told(Type.STATE, 0, ResumeState(b"state"))
    return gateway


NEAR_AND_JOINED = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("nodes", NEAR_AND_JOINED, indirect=True, ids=["near", "out", "in", "between joined ones"])
async def test_it_goes_between_any_two_machines(known: set[str], nodes: tuple[Node, Node]) -> None:
    here, there = nodes
    known |= {node.info.curve_key for node in nodes}
    gateway = await moving(here, there)
    hold = decode(await there.container.next(Type.HOLD))
    assert (hold.body.resume, hold.buffers) == (b"state", (LARGE,))
    there.told(Type.HELD, 0)
    await here.container.next(Type.PAUSE)
    here.told(Type.STATE, 0, ResumeState(b"state", paused=True))
    moved = decode(await gateway.next(Type.MOVED)).body
    assert (moved.node, moved.instance, moved.number) == ("b", "ins-b", 1)
    gateway.dealer.send([Header(Type.COMMITTED, ID, 1).pack()])
    await here.container.next(Type.CANCEL)
    assert (await here.result()).outcome == "moved"
    gateway.dealer.close()


@pytest.mark.parametrize("nodes", [(False, True)], indirect=True)
async def test_an_order_to_where_no_link_can_be_says_why_nothing_moved(nodes: tuple[Node, Node]) -> None:
    here, _ = nodes
    here.relay.migrate(Migrate("mig-1", "ins-a", "b", "tcp://127.0.0.1:1", "ins-b", 1, invocations=(ID.hex(),)))
    result = await here.result()
    assert (result.invocation, result.outcome) == (ID.hex(), "kept") and "TCP without keys" in result.why


@pytest.mark.parametrize("nodes", [(True, True)], indirect=True)
async def test_to_one_that_does_not_know_its_key_nothing_moves(
    known: set[str], nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = nodes
    monkeypatch.setattr(here.relay._neighbours._liveness, "misses", 1)
    gateway = await moving(here, there)
    result = await here.result()
    assert (result.outcome, result.why) == ("kept", "b was lost")
    assert not known and not there.container.got and not there.relay.core.arrivals.holds
    gateway.dealer.close()
