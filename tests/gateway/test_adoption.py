"""Taking over what another gateway left behind: the highest fence is the one, and it can be resumed like one's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sllm_gateway.adoption import Adoptions
from sllm_gateway.handle import Handle

from sllm_faas.dispatch.resume import last_output
from sllm_faas.errors import NotFound, Unavailable
from sllm_faas.spec import FunctionSpec, MethodSpec
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Adopted, Done, Failed, FunctionRoute, Invoke, NodeInfo, Routes
from tests.gateway.test_handover import LOST, sent, taken
from tests.gateway.world import T, World

ID = b"a" * 16
INVOKE = Invoke("f", "json", True, b'{"n":3}')


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.join("m")
    for node in ("n", "m"):
        made.grant(1, node=node)
    spec = FunctionSpec("f", "function", "m", "f", (MethodSpec("f", stream=True, resumable=True),))
    made.dispatcher.on_controller_message(
        codec.encode(Header(Type.ROUTES), Routes(2, (FunctionRoute("app", 1, spec),)))
    )
    yield made
    made.dispatcher.close()


def asked(world: World, first: int) -> asyncio.Task[Handle]:
    adoptions = Adoptions(world.dispatcher)
    return asyncio.ensure_future(adoptions.adopt(ID, first))


def found(world: World, node: str, fence: int, seq: int, invoke: Invoke = INVOKE, *buffers: bytes) -> None:
    body = Adopted("found", codec.pack(invoke), T, "i-1")
    world.receive(Header(Type.ADOPTED, ID, fence, 1, seq=seq), body, node, *buffers)


def unknown(world: World, node: str) -> None:
    world.receive(Header(Type.ADOPTED, ID), Adopted("unknown"), node)


def say(world: World, node: str, fence: int, seq: int, *payloads: bytes) -> None:
    header = Header(Type.OUTPUT, ID, fence, 1, seq=seq, items=len(payloads))
    world.receive(header, list(payloads), node)


async def test_what_its_client_has_seen_is_not_given_again_but_makes_the_state_whole(world: World) -> None:
    search = asked(world, 2)
    await asyncio.sleep(0)
    assert [frame.header.seq for frame in sent(world, "n", Type.ADOPT)] == [2]
    found(world, "n", 1, 0)
    say(world, "n", 1, 0, b"0", b"1", b"2")
    unknown(world, "m")
    handle = await search
    world.reply(handle, Type.FAILED, LOST)
    assert (handle.inv.fence, handle.ended) == (2, None)
    (frame,) = sent(world, handle.node, Type.INVOKE)
    assert (frame.body.payload, frame.body.outputs) == (b'{"n":3}', 3)
    assert last_output(frame.body.resume) == b"2"
    world.output(handle, 3, b"3")
    world.reply(handle, Type.DONE, Done(), seq=4)
    assert await taken(handle) == [b"2", b"3"]
    world.empty()


@pytest.mark.parametrize("order", [("n", "m"), ("m", "n")])
async def test_of_several_the_highest_fence_is_the_one_and_the_others_are_stopped(
    world: World, order: tuple[str, str]
) -> None:
    fences = {"n": 1, "m": 2}
    search = asked(world, 1)
    await asyncio.sleep(0)
    for node in order:
        found(world, node, fences[node], 1)
        say(world, node, fences[node], 1, node.encode())
        assert search.done() is False
    handle = await search
    assert (handle.node, handle.inv.fence) == ("m", 2)
    assert [frame.header.fence for frame in sent(world, "n", Type.CANCEL)][:1] == [1]
    world.reply(handle, Type.CANCELLED, fence=1, node="n")
    world.reply(handle, Type.DONE, Done(), seq=2)
    assert await taken(handle) == [b"m"]
    world.empty()


@pytest.mark.parametrize("order", [("n", "m"), ("m", "n")])
async def test_the_end_of_one_that_was_moved_away_is_not_the_answers_end(world: World, order: tuple[str, str]) -> None:
    """Its source has ended it when it was moved; whoever answers first, it goes on where it runs, and nowhere else."""
    search = asked(world, 1)
    await asyncio.sleep(0)
    for node in order:
        if node == "n":
            found(world, "n", 1, 0)
            say(world, "n", 1, 0, b"0", b"1")
            world.receive(Header(Type.CANCELLED, ID, 1, 1), None, "n")
        else:
            found(world, "m", 2, 0)
            say(world, "m", 2, 0, b"0", b"1", b"2")
    handle = await search
    assert (handle.node, handle.inv.fence, handle.inv.resumes) == ("m", 2, 0)
    assert not sent(world, "n", Type.INVOKE) + sent(world, "m", Type.INVOKE) + sent(world, "m", Type.CANCEL)
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert await taken(handle) == [b"1", b"2"]
    world.empty()


async def test_one_that_is_left_over_is_not_taken_while_a_newer_one_is_taken_to_be_owned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node noticed the gateway's loss before the other's: that is asked again, and the newer one is the one."""
    monkeypatch.setattr("sllm_gateway.adoption.AGAIN", 0)
    search = asked(world, 1)
    await asyncio.sleep(0)
    found(world, "n", 1, 1)
    world.receive(Header(Type.ADOPTED, ID, 2), Adopted("owned"), "m")
    while len(sent(world, "m", Type.ADOPT)) < 2:
        await asyncio.sleep(0)
    assert [frame.header.fence for frame in sent(world, "n", Type.CANCEL)][:1] == [1]
    unknown(world, "n")
    found(world, "m", 2, 1)
    handle = await search
    assert (handle.node, handle.inv.fence) == ("m", 2)
    world.receive(Header(Type.CANCELLED, ID, 1, 1), None, "n")
    world.reply(handle, Type.DONE, Done(), seq=1)
    assert await taken(handle) == []
    world.empty()


async def test_who_goes_away_while_it_is_looked_for_leaves_nothing_running(world: World) -> None:
    search = asked(world, 0)
    await asyncio.sleep(0)
    found(world, "n", 1, 0)
    search.cancel()
    await asyncio.gather(search, return_exceptions=True)
    assert [frame.header.fence for frame in sent(world, "n", Type.CANCEL)] == [1]
    world.receive(Header(Type.CANCELLED, ID, 1, 1), None, "n")
    world.empty()


async def test_a_part_of_a_stream_is_no_state_to_resume_from(world: World) -> None:
    search = asked(world, 5)
    await asyncio.sleep(0)
    unknown(world, "m")
    found(world, "n", 1, 5)
    handle = await search
    world.reply(handle, Type.FAILED, Failed(LOST.error))
    assert handle.ended is not None and handle.ended.error is not None
    world.empty()


async def test_one_whose_payload_was_large_is_resumed_with_it(world: World) -> None:
    large = b'"' + b"x" * INLINE_LIMIT + b'"'
    search = asked(world, 1)
    await asyncio.sleep(0)
    unknown(world, "m")
    found(world, "n", 1, 0, replace(INVOKE, payload=b""), large)
    say(world, "n", 1, 0, b"0")
    handle = await search
    world.reply(handle, Type.FAILED, LOST)
    (frame,) = sent(world, handle.node, Type.INVOKE)
    assert (frame.body.payload, frame.buffers, frame.body.outputs) == (b"", (large,), 1)
    world.reply(handle, Type.DONE, Done(), seq=1)
    await taken(handle)
    world.empty()


async def test_an_invocation_that_was_resumed_before_goes_on_from_its_state(world: World) -> None:
    search = asked(world, 6)
    await asyncio.sleep(0)
    unknown(world, "m")
    found(world, "n", 3, 5, Invoke("f", "json", True, b"{}", resume=codec.pack(b"4"), outputs=5))
    handle = await search
    world.reply(handle, Type.FAILED, LOST)
    (frame,) = sent(world, handle.node, Type.INVOKE)
    assert (last_output(frame.body.resume), frame.body.outputs, frame.header.fence) == (b"4", 5, 4)
    world.output(handle, 5, b"5", b"6")
    world.reply(handle, Type.DONE, Done(), seq=7)
    assert await taken(handle) == [b"6"]
    world.empty()


async def test_that_nobody_has_it_is_said_once_every_node_was_asked(world: World) -> None:
    there = Routes(3, (), (NodeInfo("n", "ipc:///n"), NodeInfo("m", "ipc:///m"), NodeInfo("late", "ipc:///late")))
    for known, error in ((there, Unavailable), (replace(there, seq=4, nodes=there.nodes[:2]), NotFound)):
        world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), known))
        search = asked(world, 0)
        await asyncio.sleep(0)
        unknown(world, "n")
        unknown(world, "m")
        with pytest.raises(error):
            await search
