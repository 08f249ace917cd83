"""Going on elsewhere: after a loss, and in a move. One node at a time is believed, and the others are told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sllm_gateway.handle import Handle

from sllm_faas.dispatch.invocation import MAX_RESUMES, State
from sllm_faas.dispatch.resume import last_output
from sllm_faas.errors import ErrorInfo, WorkerLost, to_info
from sllm_faas.spec import FunctionSpec, MethodSpec, RetryPolicy, Target, Timeouts
from sllm_faas.wire import codec
from sllm_faas.wire.codec import Frame
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done, Failed, FunctionRoute, Moved, Refused, Routes
from tests.gateway.world import T, World

LOST = Failed(to_info(WorkerLost("the container ended")))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two nodes, `n` and `m`, of one slot each."""
    made = World()
    made.join("m")
    made.grant(1)
    made.grant(1, node="m")
    yield made
    made.dispatcher.close()


def begun(world: World, *outputs: bytes, **more: Any) -> Handle:
    """A resumable stream that has said something."""
    handle = world.submit(stream=True, way="output", **more)
    if outputs:
        world.output(handle, 0, *outputs)
    return handle


def sent(world: World, node: str, kind: Type) -> list[Frame]:
    return world.nodes[node].of(kind)


def other(node: str) -> str:
    return "m" if node == "n" else "n"


async def taken(handle: Handle) -> list[bytes]:
    return [output async for batch in handle.batches() for output in batch]


async def test_what_a_lost_node_ran_goes_on_elsewhere_under_a_raised_fence(world: World) -> None:
    handle = begun(world, b"a", b"b")
    there = other(handle.node)
    world.dispatcher.node_down(handle.node)
    world.dispatcher.validate()
    assert (handle.node, handle.inv.fence, handle.ended) == (there, 2, None)
    frame = sent(world, there, Type.INVOKE)[-1]
    assert (frame.header.fence, frame.header.seq, frame.body.outputs) == (2, 2, 2)
    assert last_output(frame.body.resume) == b"b"
    world.output(handle, 2, b"c")
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert await taken(handle) == [b"a", b"b", b"c"]
    assert world.dispatcher.resumes == {"node_lost": 1}
    (handover,) = handle.handovers
    assert (handover.kind, handover.source, handover.destination, handover.why) == (
        "resume", other(there), there, "node_lost",
    )  # fmt: skip
    world.empty()


async def test_a_killed_container_costs_a_stream_nothing_but_time(world: World) -> None:
    handle = begun(world, b"a")
    source = handle.node
    world.now += 2.0
    world.reply(handle, Type.FAILED, LOST)
    assert handle.inv.fence == 2
    world.now += 3.0
    world.output(handle, 1, b"b")
    assert handle.handovers[0].gap == 5.0
    world.output(handle, 1, b"X", fence=1, node=source)
    assert handle.inv.wanted == 2
    world.reply(handle, Type.DONE, Done(), seq=2)
    assert await taken(handle) == [b"a", b"b"]
    world.empty()


async def test_what_cannot_go_on_ends_with_its_error(world: World) -> None:
    handle = world.submit(stream=True)
    world.output(handle, 0, b"a")
    world.dispatcher.node_down(handle.node)
    assert handle.ended is not None and handle.ended.error is not None
    assert handle.ended.error.code == "worker_lost"
    assert world.dispatcher.resumes == {}


async def test_an_error_of_the_code_itself_is_no_loss(world: World) -> None:
    handle = begun(world, b"a")
    world.reply(handle, Type.FAILED, Failed(ErrorInfo("function_error", "ValueError")))
    assert handle.ended is not None and handle.ended.error is not None
    assert handle.ended.error.code == "function_error"
    world.empty()


async def test_without_a_slot_it_waits_at_the_front_and_demands_one(world: World) -> None:
    handle, second = begun(world, b"a"), begun(world, b"x")
    waiting = world.submit()
    world.reply(handle, Type.FAILED, LOST)
    freed = [frame.header.id for frame in sent(world, "n", Type.INVOKE) + sent(world, "m", Type.INVOKE)]
    assert freed.count(handle.inv.id) == 2, "the slot that its loss freed is its own again"
    world.dispatcher.node_down(handle.node)
    assert list(world.dispatcher.queue.items(T)) == [handle.inv, waiting.inv]
    await asyncio.sleep(0)
    assert [(item.waiting, item.running) for item in world.demand()][-1] == (2, 1)
    world.reply(second, Type.DONE, Done(), seq=1)
    assert handle.node == second.slot.node  # type: ignore[union-attr]


async def test_after_three_resumes_without_one_more_output_it_fails(world: World) -> None:
    handle = begun(world, b"a")
    for _ in range(MAX_RESUMES):
        world.reply(handle, Type.FAILED, LOST)
        assert handle.ended is None
    world.output(handle, 1, b"b")
    for _ in range(MAX_RESUMES):
        world.reply(handle, Type.FAILED, LOST)
        assert handle.ended is None
    world.reply(handle, Type.FAILED, LOST)
    assert handle.ended is not None and handle.ended.error is not None
    assert handle.ended.error.code == "worker_lost"
    assert len(handle.handovers) == 2
    world.empty()


async def test_a_woken_node_is_told_to_stop_and_nothing_it_says_is_believed(world: World) -> None:
    handle = begun(world, b"a")
    source = handle.node
    asleep = world.nodes[source]
    world.dispatcher.node_down(source)
    assert [frame.header.fence for frame in asleep.of(Type.CANCEL)] == [1], "a link may be lost by half"
    awake = world.join(source)
    assert [frame.header.fence for frame in awake.of(Type.CANCEL)] == [1]
    world.output(handle, 1, b"old", fence=1, node=source)
    assert world.dispatcher.drops == {"stray": 1}
    world.output(handle, 1, b"new")
    world.reply(handle, Type.CANCELLED, fence=1, node=source)
    world.dispatcher.validate()
    world.reply(handle, Type.DONE, Done(), seq=2)
    assert await taken(handle) == [b"a", b"new"]
    world.empty()


async def test_a_stale_speaker_is_cancelled_under_its_own_fence(world: World) -> None:
    handle = begun(world, b"a")
    source = handle.node
    world.reply(handle, Type.FAILED, LOST)
    world.output(handle, 1, b"ghost", fence=1, node=source)
    assert [frame.header.fence for frame in sent(world, source, Type.CANCEL)] == [1]
    assert handle.inv.wanted == 1


async def test_a_broken_stream_goes_on_elsewhere_and_its_slot_waits_for_the_code_to_stop(world: World) -> None:
    handle = begun(world, b"a")
    source = handle.node
    world.output(handle, 2, b"c")
    assert (handle.node, handle.inv.fence) == (other(source), 2)
    assert [frame.header.fence for frame in sent(world, source, Type.CANCEL)] == [1]
    waiting = world.submit()
    assert waiting.node == "", "the slot is free only when the code has stopped"
    world.reply(handle, Type.CANCELLED, fence=1, node=source)
    assert waiting.node == source
    world.dispatcher.validate()


async def test_an_instance_that_fell_silent_is_offered_nothing_for_a_while(world: World) -> None:
    world.grant(4)
    world.grant(4, node="m")
    handle = begun(world, b"a", timeouts=Timeouts(idle=3.0, execution=None))
    source = handle.node
    world.pass_time(3.1)
    assert handle.node == other(source)
    assert world.submit().node == other(source)
    world.grant(4, node=source)
    world.reply(handle, Type.CANCELLED, fence=1, node=source)
    assert world.submit().node == source


async def test_silence_is_tried_once_elsewhere_before_it_is_a_deadline(world: World) -> None:
    handle = begun(world, b"a", timeouts=Timeouts(idle=3.0, execution=None))
    source = handle.node
    world.pass_time(3.1)
    assert (handle.node, handle.ended) == (other(source), None)
    world.pass_time(3.1)
    assert handle.ended is not None and handle.ended.error is not None
    assert (handle.ended.error.code, handle.ended.error.param) == ("deadline_exceeded", "idle")


async def test_the_execution_limit_counts_from_the_first_dispatch_even_while_it_waits(world: World) -> None:
    handle = begun(world, b"a", timeouts=Timeouts(execution=10.0, startup=60.0, queue=60.0, idle=None))
    world.pass_time(6.0)
    for node in ("n", "m"):
        world.dispatcher.node_down(node)
    assert handle.inv.state is State.QUEUED
    world.pass_time(4.1)
    assert handle.ended is not None and handle.ended.error is not None
    assert handle.ended.error.param == "execution"
    world.dispatcher.validate()


async def test_credit_that_was_used_up_is_given_before_it_goes_on() -> None:
    world = World(window=4)
    world.grant(1)
    handle = begun(world, b"a", b"b", b"c", b"d")
    world.dispatcher.node_down("n")
    assert await handle.batch() == [b"a", b"b", b"c", b"d"]
    world.join("n")
    world.grant(1)
    assert sent(world, "n", Type.INVOKE)[-1].header.credit == 8
    world.dispatcher.close()


async def test_what_was_answered_in_part_is_never_finished_by_another_version(world: World) -> None:
    handle = begun(world, b"a")
    fresh = begun(world)
    for node in ("n", "m"):
        world.dispatcher.node_down(node)
    spec = FunctionSpec("f", "function", "m", "f", (MethodSpec("f", stream=True),))
    table = Routes(2, (FunctionRoute("app", 2, spec),))
    world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), table))
    world.dispatcher.validate()
    assert handle.ended is not None and handle.ended.error is not None
    assert "version 1" in handle.ended.error.message
    assert fresh.inv.target == Target("app", "f", 2)


async def test_a_stop_that_nobody_here_asked_for_is_a_loss(world: World) -> None:
    handle = begun(world, b"a")
    world.reply(handle, Type.CANCELLED)
    assert (handle.ended, handle.inv.fence) == (None, 2)


# -- moves -------------------------------------------------------------------------------------------------------


def offer(world: World, handle: Handle, seq: int, node: str = "m", number: int = 1, instance: str = "i-1") -> None:
    world.reply(handle, Type.MOVED, Moved(node, instance, number), seq=seq)


@pytest.fixture
async def moving(world: World) -> tuple[World, Handle]:
    """A stream on `n`, with `m` free; the slots of `m` are not this gateway's."""
    world.grant(0, node="m")
    return world, begun(world, b"a", b"b")


async def test_moved_is_the_commit(moving: tuple[World, Handle]) -> None:
    world, handle = moving
    offer(world, handle, 2)
    assert (handle.node, handle.inv.fence) == ("m", 2)
    (activate,) = sent(world, "m", Type.ACTIVATE)
    assert (activate.header.fence, activate.header.seq, activate.header.route) == (2, 2, 1)
    assert last_output(activate.body.resume) == b"b"
    (committed,) = sent(world, "n", Type.COMMITTED)
    assert committed.header.fence == 1
    world.output(handle, 2, b"X", fence=1, node="n")
    world.output(handle, 2, b"c")
    waiting = world.submit()
    assert waiting.node == "", "the source's slot is its own until it has ended there"
    world.reply(handle, Type.CANCELLED, fence=1, node="n")
    assert waiting.node == "n"
    world.done(waiting)
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert await taken(handle) == [b"a", b"b", b"c"]
    assert world.dispatcher.moves == {"moved": 1}
    assert [(each.kind, each.where) for each in handle.handovers] == [("migration", "n -> m")]
    world.empty()


async def test_an_answer_to_moved_that_was_lost_is_given_again(moving: tuple[World, Handle]) -> None:
    world, handle = moving
    offer(world, handle, 2)
    world.receive(Header(Type.MOVED, handle.inv.id, 1, seq=2), Moved("m", "i-1", 1), "n")
    assert len(sent(world, "n", Type.COMMITTED)) == 2
    assert len(sent(world, "m", Type.ACTIVATE)) == 1


@pytest.mark.parametrize(
    ("seq", "more", "why"),
    [
        (1, {}, "outputs_missing"),
        (2, {"node": "elsewhere"}, "unknown_destination"),
        (2, {"number": 9}, "unknown_destination"),
        (2, {"instance": "i-9"}, "unknown_destination"),
    ],
)
async def test_in_every_other_case_it_stays(moving: tuple[World, Handle], seq: int, more: Any, why: str) -> None:
    world, handle = moving
    offer(world, handle, seq, **more)
    assert (handle.node, handle.inv.fence) == ("n", 1)
    (kept,) = sent(world, "n", Type.KEPT)
    assert kept.header.fence == 1
    assert world.dispatcher.moves == {why: 1}
    world.output(handle, 2, b"c")
    world.reply(handle, Type.DONE, Done(), seq=3)
    world.empty()


async def test_what_is_not_wanted_or_not_resumable_stays_too(world: World) -> None:
    handle = begun(world, b"a")
    plain = world.submit(stream=True)
    handle.cancel()
    offer(world, handle, 1, node=plain.node)
    offer(world, plain, 0, node=handle.node)
    assert world.dispatcher.moves == {"not_wanted": 1, "not_resumable": 1}
    assert handle.inv.fence == plain.inv.fence == 1


async def test_activate_refused_is_a_loss_like_any_other(moving: tuple[World, Handle]) -> None:
    world, handle = moving
    offer(world, handle, 2)
    world.reply(handle, Type.REFUSED, Refused("unknown_instance"))
    assert (handle.inv.state, handle.inv.fence) == (State.QUEUED, 3)
    world.reply(handle, Type.CANCELLED, fence=1, node="n")
    assert handle.node == "n"
    frame = sent(world, "n", Type.INVOKE)[-1]
    assert (frame.header.fence, frame.body.outputs) == (3, 2)
    assert world.dispatcher.resumes == {"move_refused": 1}


async def test_a_destination_lost_after_the_commit_is_resumed(moving: tuple[World, Handle]) -> None:
    world, handle = moving
    offer(world, handle, 2)
    world.dispatcher.node_down("m")
    world.reply(handle, Type.CANCELLED, fence=1, node="n")
    assert (handle.node, handle.inv.fence) == ("n", 3)
    world.output(handle, 2, b"c")
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert await taken(handle) == [b"a", b"b", b"c"]
    world.empty()


async def test_a_source_lost_after_the_commit_matters_to_nobody(moving: tuple[World, Handle]) -> None:
    world, handle = moving
    offer(world, handle, 2)
    world.dispatcher.node_down("n")
    world.dispatcher.validate()
    world.output(handle, 2, b"c")
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert await taken(handle) == [b"a", b"b", b"c"]
    world.empty()


VERBS = ["stream", "plain", "say", "done", "lost", "refuse", "cancel", "stopped", "moved", "down", "up", "time", "old"]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 7)), max_size=60))
def test_whatever_happens_a_client_sees_each_output_once_and_one_end(steps: list[tuple[str, int]]) -> None:
    """Outputs are their own ordinals, so what a client sees must count up from zero without a gap."""

    async def scenario() -> None:
        world = World(window=16)
        world.join("m")
        up = {"n", "m"}
        for node in up:
            world.grant(2, node=node)
        handles: list[Handle] = []
        left: list[tuple[Handle, str, int]] = []
        seen: dict[Handle, list[bytes]] = {}
        limits = Timeouts(queue=9.0, startup=9.0, idle=4.0, execution=30.0)
        for verb, number in steps:
            node = "nm"[number % 2]
            running = [handle for handle in handles if handle.node]
            handle = running[number % len(running)] if running else None
            if verb in ("stream", "plain"):
                way = "output" if verb == "stream" else "never"
                made = world.submit(stream=True, way=way, timeouts=limits, retries=RetryPolicy(1, initial_delay=1.0))
                handles.append(made)
                seen[made] = []
            elif verb == "time":
                world.pass_time(number * 0.7)
            elif verb == "down" and node in up:
                left += [(each, node, each.inv.fence) for each in running if each.node == node]
                up.discard(node)
                world.dispatcher.node_down(node)
            elif verb == "up" and node not in up:
                up.add(node)
                world.join(node)
                world.grant(2, node=node)
            elif verb == "old" and left:
                old, where, fence = left[number % len(left)]
                if where in up and (old.node, old.inv.fence) != (where, fence):
                    kind = (Type.OUTPUT, Type.CANCELLED, Type.DONE)[number % 3]
                    body = [b"old"] if kind is Type.OUTPUT else Done() if kind is Type.DONE else None
                    items = int(kind is Type.OUTPUT)
                    world.receive(Header(kind, old.inv.id, fence, seq=old.inv.wanted, items=items), body, where)
            elif handle is not None:
                fence, where = handle.inv.fence, handle.node
                if verb == "say":
                    first = max(0, handle.inv.wanted - number % 3)
                    world.output(handle, first, *(b"%d" % (first + i) for i in range(3)))
                elif verb == "done":
                    world.reply(handle, Type.DONE, Done(), seq=handle.inv.wanted)
                elif verb == "lost":
                    world.reply(handle, Type.FAILED, LOST)
                elif verb == "refuse":
                    world.reply(handle, Type.REFUSED, Refused("no_slot"))
                elif verb == "cancel":
                    handle.cancel()
                elif verb == "stopped":
                    world.reply(handle, Type.CANCELLED)
                elif verb == "moved":
                    offer(world, handle, handle.inv.wanted, node="nm"[number % 2])
                if handle.node and handle.inv.fence != fence:
                    left.append((handle, where, fence))
            if number == 7:
                for each in handles:
                    if each.inv.wanted > each.inv.consumed:
                        seen[each] += await each.batch()
            world.dispatcher.validate()
        for _ in range(8):
            world.pass_time(10.0)
            for each in handles:
                if each.node in up:
                    world.reply(each, Type.CANCELLED)
        for each in handles:
            assert each.ended is not None
            seen[each] += await taken(each)
            assert seen[each] == [b"%d" % i for i in range(len(seen[each]))]
        for node in up:
            for frame in world.nodes[node].of(Type.CANCEL):
                world.receive(frame.header._replace(type=Type.CANCELLED), None, node)
            for frame in world.nodes[node].of(Type.COMMITTED):
                world.receive(frame.header._replace(type=Type.CANCELLED), None, node)
        for node in list(up):
            world.dispatcher.node_down(node)
        world.empty()
        world.dispatcher.close()

    asyncio.run(scenario())
