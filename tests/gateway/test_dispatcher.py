"""The dispatcher between recorded links, on a clock of its own: who runs where, and how everything ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sllm_gateway.handle import Handle

from sllm_faas.dispatch.invocation import State
from sllm_faas.errors import Cancelled, ErrorInfo, QueueFull, Unavailable, WorkerLost, to_info
from sllm_faas.spec import FunctionSpec, MethodSpec, RetryPolicy, Target, Timeouts
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done, Failed, FunctionRoute, Refused, Routes, TargetDemand
from tests.gateway.world import T, Wire, World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    made.dispatcher.close()


async def test_with_a_slot_in_hand_a_call_is_dispatched_at_once(world: World) -> None:
    world.grant(1)
    handle = world.submit()
    frame = world.node.of(Type.INVOKE)[0]
    assert frame.header.route == 1
    assert frame.header.fence == 1
    world.done(handle, b"7")
    assert (await handle.result()).payload == b"7"
    world.empty()


async def test_without_one_it_waits_demands_at_once_and_runs_in_order_when_slots_come(world: World) -> None:
    first, second = world.submit(), world.submit()
    assert world.controller.of(Type.DEMAND) == []
    await asyncio.sleep(0)
    assert [(item.waiting, item.running) for item in world.demand()] == [(2, 0)]
    world.grant(1)
    assert world.invoked() == [first.inv.id]
    world.done(first)
    assert world.invoked() == [first.inv.id, second.inv.id]
    world.done(second)
    world.empty()


async def test_every_grant_is_answered_with_what_more_could_be_used(world: World) -> None:
    for _ in range(6):
        world.submit()
    world.grant(1, concurrency=4)
    answer = world.node.of(Type.WANT)[-1]
    assert (answer.header.route, answer.header.seq, answer.body.slots) == (1, 1, 3)
    world.grant(4, concurrency=4)
    assert world.node.of(Type.WANT)[-1].body.slots == 0
    world.submit()
    world.grant(0, number=2, concurrency=4)
    assert world.node.of(Type.WANT)[-1].body.slots == 3


async def test_work_that_begins_to_wait_asks_the_instances_it_knows_for_slots(world: World) -> None:
    world.grant(0, concurrency=2)
    world.submit()
    await asyncio.sleep(0)
    assert world.node.of(Type.WANT)[-1].body.slots == 1


async def test_outputs_come_in_batches_each_once_and_then_the_end(world: World) -> None:
    world.grant(1)
    handle = world.submit(stream=True)
    world.output(handle, 0, b"a", b"b")
    world.output(handle, 1, b"b", b"c")
    world.output(handle, 0, b"a")
    world.output(handle, 3, b"d", fence=0)
    world.output(handle, 3, b"d", fence=9)
    world.reply(handle, Type.DONE, Done(), seq=3)
    assert [batch async for batch in handle.batches()] == [[b"a", b"b", b"c"]]
    assert world.dispatcher.drops == {"duplicate": 1, "stale": 1, "forged": 1}
    world.empty()


async def test_a_gap_is_a_lost_worker_and_the_rest_is_cancelled(world: World) -> None:
    world.grant(1)
    handle = world.submit(stream=True)
    world.output(handle, 0, b"a")
    world.output(handle, 2, b"c")
    ended = await handle.result()
    assert ended.error is not None
    assert ended.error.code == "worker_lost"
    assert len(world.node.of(Type.CANCEL)) == 1
    assert not world.dispatcher.slots.has_free(T), "the slot is free only when the code has stopped"
    world.reply(handle, Type.CANCELLED)
    assert world.dispatcher.slots.has_free(T)
    world.empty()


async def test_a_missing_tail_is_a_lost_worker_too(world: World) -> None:
    world.grant(1)
    handle = world.submit(stream=True)
    world.reply(handle, Type.DONE, Done(), seq=2)
    assert (await handle.result()).error is not None
    world.empty()


async def test_cancel_is_said_again_every_second_until_the_end_is_reported(world: World) -> None:
    world.grant(1)
    handle = world.submit()
    handle.cancel()
    handle.cancel()
    assert (await handle.result()).error == to_info(Cancelled("The invocation was cancelled."))
    assert len(world.node.of(Type.CANCEL)) == 1
    world.pass_time(1.1)
    world.pass_time(1.1)
    assert len(world.node.of(Type.CANCEL)) == 3
    world.reply(handle, Type.CANCELLED)
    world.pass_time(5.0)
    assert len(world.node.of(Type.CANCEL)) == 3
    world.empty()


async def test_cancelling_what_waits_sends_nothing(world: World) -> None:
    handle = world.submit()
    handle.cancel()
    world.grant(1)
    assert world.node.of(Type.CANCEL) == []
    assert world.invoked() == []
    world.empty()


@pytest.mark.parametrize(
    ("limits", "granted", "seconds", "phase"),
    [
        (Timeouts(startup=5.0), False, 5.1, "startup"),
        (Timeouts(execution=5.0), True, 5.1, "execution"),
        (Timeouts(first_output=2.0), True, 2.1, "first_output"),
    ],
)
async def test_a_passed_limit_answers_the_caller_and_names_itself(
    world: World, limits: Timeouts, granted: bool, seconds: float, phase: str
) -> None:
    if granted:
        world.grant(1)
    handle = world.submit(timeouts=limits)
    world.pass_time(seconds - 0.5)
    assert handle.ended is None
    world.pass_time(0.5)
    ended = await handle.result()
    assert ended.error is not None
    assert (ended.error.code, ended.error.param) == ("deadline_exceeded", phase)
    assert len(world.node.of(Type.CANCEL)) == int(granted)


async def test_queue_time_runs_only_while_an_instance_is_ready(world: World) -> None:
    limits = Timeouts(queue=5.0, startup=10.0)
    handle = world.submit(timeouts=limits)
    world.pass_time(8.0)
    world.grant(0)  # ready, but no slot for us
    world.pass_time(4.0)
    assert handle.ended is None
    world.pass_time(1.1)
    assert handle.ended is not None
    assert handle.ended.error is not None
    assert handle.ended.error.param == "queue"


async def test_silence_between_outputs_is_limited_while_the_client_takes_them(world: World) -> None:
    world.dispatcher.window = 2
    world.grant(1)
    handle = world.submit(stream=True, timeouts=Timeouts(idle=3.0, execution=None))
    world.output(handle, 0, b"a", b"b")
    world.pass_time(60.0)
    assert handle.ended is None, "the client is slow, not the function"
    assert await handle.batch() == [b"a", b"b"]
    assert world.node.of(Type.CREDIT)[-1].header.credit == 4
    world.pass_time(3.1)
    assert handle.ended is not None
    assert handle.ended.error is not None
    assert handle.ended.error.param == "idle"


async def test_more_than_the_credit_allows_breaks_the_stream(world: World) -> None:
    world.dispatcher.window = 2
    world.grant(1)
    handle = world.submit(stream=True)
    world.output(handle, 0, b"a", b"b", b"c")
    assert handle.ended is not None
    assert handle.ended.error is not None
    assert "overrun" in handle.ended.error.message


async def test_a_refused_call_goes_to_the_front_with_its_fence(world: World) -> None:
    world.grant(1)
    first, second = world.submit(), world.submit()
    world.reply(first, Type.REFUSED, Refused("draining"))
    assert list(world.dispatcher.queue.items(T)) == [first.inv, second.inv]
    assert first.inv.fence == 1
    world.grant(1, number=2)
    assert world.invoked() == [first.inv.id, first.inv.id]
    world.grant(2, number=2)
    world.done(first)
    world.done(second)
    world.empty()


async def test_a_lost_invoker_ends_what_ran_there_and_leaves_what_waits(world: World) -> None:
    world.grant(1)
    running, waiting = world.submit(), world.submit()
    world.dispatcher.node_down("n")
    assert running.ended is not None
    assert running.ended.error is not None
    assert running.ended.error.code == "worker_lost"
    assert waiting.ended is None
    world.node = Wire()
    world.dispatcher.node_up("n", world.node)
    world.grant(1)
    assert world.invoked() == [waiting.inv.id]
    world.done(waiting)
    world.empty()


async def test_a_broken_link_is_a_lost_invoker(world: World) -> None:
    world.grant(1)
    world.node.broken = True
    handle = world.submit()
    assert handle.ended is not None
    assert handle.ended.error is not None
    assert handle.ended.error.code == "worker_lost"
    world.empty()


async def test_a_failed_attempt_is_retried_under_a_new_fence_after_its_delay(world: World) -> None:
    world.grant(1)
    handle = world.submit(retries=RetryPolicy(1, initial_delay=2.0))
    failed = Failed(ErrorInfo("function_error", "no luck"))
    world.reply(handle, Type.FAILED, failed)
    assert handle.ended is None
    assert world.dispatcher.slots.has_free(T)
    world.reply(handle, Type.DONE, Done(b"late"), fence=1)
    assert handle.ended is None
    world.pass_time(2.1)
    assert [frame.header.fence for frame in world.node.of(Type.INVOKE)] == [1, 2]
    world.reply(handle, Type.FAILED, failed)
    assert handle.ended is not None
    assert handle.ended.error == failed.error
    world.empty()


async def test_what_the_caller_did_wrong_is_not_retried(world: World) -> None:
    world.grant(1)
    handle = world.submit(retries=RetryPolicy(3))
    world.reply(handle, Type.FAILED, Failed(ErrorInfo("bad_request", "no such argument", status=400)))
    assert handle.ended is not None
    world.empty()


async def test_work_nobody_owns_is_told_to_stop(world: World) -> None:
    world.receive(Header(Type.OUTPUT, b"x" * 16, 1, route=4, items=1), [b"1"])
    assert world.node.of(Type.CANCEL)[0].header.id == b"x" * 16
    world.receive(Header(Type.DONE, b"x" * 16, 1), Done())
    assert world.dispatcher.drops["unknown_invocation"] == 2


async def test_a_frame_from_another_node_is_not_believed(world: World) -> None:
    world.grant(1)
    handle = world.submit()
    world.dispatcher.node_up("other", Wire())
    world.receive(Header(Type.DONE, handle.inv.id, 1), Done(), node="other")
    assert handle.ended is None
    assert world.dispatcher.drops["stray"] == 1


async def test_an_instance_that_stops_what_runs_is_a_lost_worker(world: World) -> None:
    world.grant(1)
    handle = world.submit()
    world.reply(handle, Type.CANCELLED)
    assert handle.ended is not None
    assert handle.ended.error is not None
    assert handle.ended.error.code == "worker_lost"


async def test_waiting_calls_move_to_the_version_that_serves_and_end_when_it_is_deleted(world: World) -> None:
    def route(version: int, *methods: str) -> FunctionRoute:
        spec = FunctionSpec("f", "class", "m", "f", tuple(MethodSpec(name) for name in methods))
        return FunctionRoute("app", version, spec)

    def routes(seq: int, *functions: FunctionRoute) -> None:
        world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), Routes(seq, functions)))
        world.dispatcher.validate()

    routes(1, route(1, "f"))
    first, second = world.submit(), world.submit()
    routes(2, route(2, "f", "g"))
    world.grant(1, target=Target("app", "f", 2))
    assert world.invoked() == [first.inv.id]
    routes(3, route(3, "g"))
    assert second.ended is not None
    assert second.ended.error is not None
    assert second.ended.error.code == "not_found"
    third = world.submit(target=Target("app", "f", 3))
    routes(4)
    assert third.ended is not None
    world.done(first)
    world.empty()


async def test_the_whole_queues_loser_is_told_and_counted_once() -> None:
    world = World(max_waiting=2)
    flood = [world.submit() for _ in range(2)]
    with pytest.raises(QueueFull):
        world.submit()
    world.submit(target=Target("other", "f", 1))
    assert flood[1].ended is not None
    assert flood[1].ended.error is not None
    assert flood[1].ended.error.code == "queue_full"
    world.dispatcher.validate()
    world.dispatcher.close()


async def test_a_controller_that_was_away_is_told_all_demand(world: World) -> None:
    world.dispatcher.controller_down()
    world.submit()
    await asyncio.sleep(0)
    assert world.demand() == []
    world.dispatcher.controller_up(world.controller)
    assert [(item.waiting, item.running) for item in world.demand()] == [(1, 0)]
    with pytest.raises(Unavailable):
        world.dispatcher.controller_down()
        await world.dispatcher.controller.call("status", {})


async def test_a_table_sent_anew_is_answered_with_all_demand(world: World) -> None:
    """After a gap the gateway says HELLO again, and the controller forgets what it knew of it."""
    world.submit()
    await asyncio.sleep(0)
    before = len(world.demand())
    table = Routes(7, tuple(world.dispatcher.routes.functions.values()))
    world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), table))
    assert [(item.waiting, item.running) for item in world.demand()[before:]] == [(1, 0)]


async def test_demand_told_before_the_table_came_is_taken_back_when_the_table_ended_it(world: World) -> None:
    """WELCOME is answered with what waits for version 1; then the table says that version 2 serves."""
    world.dispatcher.controller_down()
    world.submit()
    world.dispatcher.controller_up(world.controller)
    before = len(world.demand())
    route = world.dispatcher.routes.functions["app", "f"]
    table = Routes(7, (replace(route, version=route.version + 1),))
    world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), table))
    told = {item.target.version: item.waiting for item in world.demand()[before:]}
    assert told == {route.version: 0, route.version + 1: 1}


async def test_leaving_ends_everything_with_a_reason(world: World) -> None:
    world.grant(1)
    handles = [world.submit(), world.submit()]
    world.dispatcher.abandon(Unavailable("The gateway was stopped."))
    for handle in handles:
        assert handle.ended is not None
        assert handle.ended.error is not None
        assert handle.ended.error.code == "unavailable"
    assert handles[0].inv.state is State.CANCELLING
    assert handles[1].inv.state is State.ENDED


VERBS = ["submit", "stream", "done", "fail", "refuse", "output", "cancel", "cancelled", "grant", "time", "down", "take"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 7)), max_size=50))
def test_whatever_happens_every_call_ends_once_and_no_slot_is_lost(steps: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        world = World()
        handles: list[Handle] = []
        limits = Timeouts(queue=9.0, startup=9.0, first_output=4.0, idle=4.0, execution=9.0)

        def pick(number: int, *states: State) -> Handle | None:
            found = [handle for handle in handles if handle.inv.state in states]
            return found[number % len(found)] if found else None

        running = (State.DISPATCHED, State.STREAMING, State.CANCELLING)
        for verb, number in steps:
            if verb in ("submit", "stream"):
                retries = RetryPolicy(1, initial_delay=1.0)
                handles.append(world.submit(stream=verb == "stream", timeouts=limits, retries=retries))
            elif verb == "grant":
                world.grant(number % 3, number=1 + number % 2)
            elif verb == "time":
                world.pass_time(number * 0.7)
            elif verb == "down":
                world.dispatcher.node_down("n")
                world.dispatcher.node_up("n", world.node)
            else:
                handle = pick(number, *running)
                if handle is None:
                    continue
                if verb == "done":
                    world.done(handle)
                elif verb == "fail":
                    world.reply(handle, Type.FAILED, Failed(to_info(WorkerLost("gone"))))
                elif verb == "refuse":
                    world.reply(handle, Type.REFUSED, Refused("no_slot"))
                elif verb == "output":
                    world.output(handle, max(0, handle.inv.wanted - number % 3), b"x", b"y")
                elif verb == "cancel":
                    handle.cancel()
                elif verb == "cancelled":
                    world.reply(handle, Type.CANCELLED)
                elif verb == "take" and handle.inv.wanted > handle.inv.consumed:
                    await handle.batch()
            world.dispatcher.validate()
        for _ in range(6):
            world.pass_time(10.0)
            for handle in handles:
                if handle.node:
                    world.reply(handle, Type.CANCELLED)
        for handle in handles:
            assert handle.ended is not None
        world.empty()
        world.dispatcher.close()

    asyncio.run(scenario())


# -- caps of apps ------------------------------------------------------------------------------------------------

G = Target("app", "g", 1)


def capped(world: World, cap: int, seq: int = 2) -> None:
    specs = [FunctionSpec(name, "function", "m", name, (MethodSpec(name),)) for name in ("f", "g")]
    table = Routes(seq, tuple(FunctionRoute("app", 1, spec, cap=cap) for spec in specs))
    world.dispatcher.on_controller_message(codec.encode(Header(Type.ROUTES), table))


async def test_what_is_above_the_cap_of_its_app_waits_though_there_are_slots(world: World) -> None:
    capped(world, 2)
    world.grant(4)
    handles = [world.submit() for _ in range(4)]
    assert world.invoked() == [handle.inv.id for handle in handles[:2]]
    world.done(handles[0])
    assert world.invoked() == [handle.inv.id for handle in handles[:3]]
    world.dispatcher.validate()
    for handle in handles[1:]:
        world.done(handle)
    world.empty()


async def test_of_an_apps_functions_who_waited_longest_is_next(world: World) -> None:
    capped(world, 1)
    world.grant(4)
    world.grant(4, number=2, target=G)
    first = world.submit()
    world.now += 1
    second = world.submit(target=G)
    world.now += 1
    third = world.submit()
    world.done(first)
    assert world.invoked()[-1] == second.inv.id
    world.done(second)
    assert world.invoked()[-1] == third.inv.id
    world.done(third)
    world.empty()


async def test_only_what_may_run_is_told_as_demand_but_one_of_each_line(world: World) -> None:
    capped(world, 3)
    world.grant(1)
    for _ in range(6):
        world.submit()
    world.submit(target=G)
    await asyncio.sleep(0)
    assert {item.target.function: item.waiting for item in world.demand()[-2:]} == {"f": 2, "g": 1}


async def test_a_raised_cap_lets_those_run_who_waited_for_it(world: World) -> None:
    capped(world, 1)
    world.grant(4)
    handles = [world.submit() for _ in range(3)]
    assert len(world.invoked()) == 1
    capped(world, 3, seq=3)
    assert world.invoked() == [handle.inv.id for handle in handles]
    for handle in handles:
        world.done(handle)
    capped(world, 0, seq=4)
    handles = [world.submit() for _ in range(4)]
    assert world.invoked()[3:] == [handle.inv.id for handle in handles]


async def trail(world: World) -> list[TargetDemand]:
    """What is told once what there is to tell has been gathered."""
    before = len(world.demand())
    world.dispatcher._targets._demand._trail()
    return world.demand()[before:]


async def test_how_long_slots_were_kept_is_told_with_the_demand_and_once(world: World) -> None:
    world.grant(1, concurrency=1)
    first, second = world.submit(), world.submit()
    world.pass_time(0.25)
    world.done(first)
    world.pass_time(0.5)
    (told,) = await trail(world)
    assert (told.waiting, told.running, told.served, told.busy_seconds) == (0, 1, 1, 0.25)
    world.done(second)
    (told,) = await trail(world)
    assert (told.running, told.served, told.busy_seconds) == (0, 1, 0.5), "not the time it waited"
    third = world.submit()
    (told,) = await trail(world)
    assert (told.running, told.served, told.busy_seconds) == (1, 0, 0.0)
    world.done(third)


async def test_what_was_served_while_no_controller_was_there_is_told_when_it_is_back(world: World) -> None:
    world.grant(1, concurrency=1)
    first, second = world.submit(), world.submit()
    world.dispatcher.controller_down()
    world.pass_time(0.25)
    world.done(first)
    assert await trail(world) == []
    world.dispatcher.controller_up(world.controller)
    assert [(item.running, item.served, item.busy_seconds) for item in world.demand()] == [(1, 1, 0.25)]
    world.done(second)


async def test_what_ran_elsewhere_too_or_never_says_nothing_of_how_long_slots_are_kept(world: World) -> None:
    world.grant(1)
    handle, waits = world.submit(retries=RetryPolicy(max_retries=1)), world.submit()
    world.dispatcher.cancel(waits)
    world.pass_time(5.0)
    world.reply(handle, Type.REFUSED, Refused("no_slot"))
    world.grant(1)
    assert handle.inv.service is None
    world.pass_time(0.5)
    world.done(handle)
    assert handle.inv.service == 0.5, "of the attempt that ran"
    other = world.submit()
    other.inv.adopt(world.now)
    world.done(other)
    assert other.inv.service is None
    last = world.submit()
    (told,) = await trail(world)
    assert (told.running, told.served, told.busy_seconds) == (1, 1, 0.5)
    world.done(last)
    (told,) = await trail(world)
    assert (told.running, told.served) == (0, 1)
    world.done(world.submit())
    assert await trail(world) == [], "no report for its sake alone"
