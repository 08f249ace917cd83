"""A generation moves between two instances at any boundary and is the undisturbed one; a pause leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from sllm_invoker.runner.engines.base import Engine
from sllm_invoker.runner.tokens import TextCodec

from sllm_faas.wire.codec import Frame, pack, unpack_as
from sllm_faas.wire.header import NO_LIMIT, Type
from sllm_faas.wire.llm import LlmRequest, LlmResume
from sllm_faas.wire.messages import Activate
from tests.runner.llm_rig import Call, Rig, by_choice, logprobs, resume_of
from tests.runner.test_llm_resume import KINDS

LONG = LlmRequest(prompts=("roll:",), max_tokens=120, seed=21)


@pytest.fixture
def rigs(open_engine: Callable[[], Engine], codec: TextCodec) -> Callable[[], tuple[Rig, Rig]]:
    def make() -> tuple[Rig, Rig]:
        return Rig(open_engine(), codec), Rig(open_engine(), codec)

    return make


async def state(call: Call, kind: Type) -> Frame:
    count = len(call.of(Type.STATE))
    call.send(kind)
    return await call.frame(Type.STATE, count + 1)


async def hold(there: Call, state: Frame) -> Frame:
    count = len(there.of(Type.HELD))
    there.invoke(kind=Type.HOLD, credit=0, resume=state.body.resume, outputs=state.header.seq)
    return await there.frame(Type.HELD, count + 1)


def activate(there: Call, resume: bytes, seq: int) -> None:
    there.fence = 2
    there.send(Type.ACTIVATE, Activate(resume), seq=seq, credit=NO_LIMIT)


async def assert_idle(rig: Rig) -> None:
    """Once the engine has come round, it has nothing left."""
    for _ in range(2):
        await rig.engine.embed([(1,)])
    stats = rig.engine.stats()
    assert (stats.running, stats.held, stats.waiting, stats.cache_tokens) == (0, 0, 0, 0)
    assert rig.instance.running == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_activated_at_every_boundary_it_is_the_undisturbed_one(
    kind: str, engine: Engine, codec: TextCodec
) -> None:
    """Held after `a` outputs, extended after `b`, activated after `c`."""
    request, method = KINDS[kind]
    rig = Rig(engine, codec)
    whole = await rig.run(request, method)
    usage = (await whole.end()).body.usage
    count = max(1, len(request.prompts)) * request.n
    chance = random.Random(kind)
    for c in range(len(whole.outputs) + 1):
        a, b = sorted((chance.randint(0, c), chance.randint(0, c)))
        there = rig.call(request, method)
        for cut in (a, b):
            told = len(there.of(Type.HELD))
            there.invoke(kind=Type.HOLD, credit=0, resume=pack(resume_of(whole.outputs[:cut], count)), outputs=cut)
            held = await there.frame(Type.HELD, told + 1)
            assert (held.header.seq, held.header.fence) == (cut, 1)
        activate(there, pack(resume_of(whole.outputs[:c], count)), c)
        end = await there.end()
        assert (end.header.type, end.header.fence, end.body.usage) == (Type.DONE, 2, usage)
        assert all(frame.header.fence == 2 for frame in there.of(Type.OUTPUT))
        found = whole.outputs[:c] + there.outputs
        assert by_choice(found) == by_choice(whole.outputs)
        for choice in range(count):
            expected, ours = logprobs(whole.outputs, choice), logprobs(found, choice)
            assert [one.token for one in ours] == [one.token for one in expected]
    await assert_idle(rig)


@pytest.mark.parametrize("kind", KINDS)
async def test_it_moves_while_it_speaks(kind: str, rigs: Any) -> None:
    request, method = KINDS[kind]
    source, destination = rigs()
    whole = await source.run(request, method)
    moved = 0
    for at in range(1, 9):
        here, there = source.invoke(request, method), destination.call(request, method)
        await here.until(lambda at=at, here=here: len(here.outputs) >= at or here.ended)
        here.send(Type.SNAPSHOT)
        here.send(Type.PAUSE)
        await here.until(lambda here=here: len(here.of(Type.STATE)) == 2 or here.ended)
        if here.ended:
            assert by_choice(here.outputs) == by_choice(whole.outputs)
            continue
        moved += 1
        snapshot, paused = here.of(Type.STATE)
        assert paused.header.seq == len(here.outputs)
        there.invoke(kind=Type.HOLD, credit=0, resume=snapshot.body.resume, outputs=snapshot.header.seq)
        await there.frame(Type.HELD)
        activate(there, paused.body.resume, paused.header.seq)
        assert (await there.end()).header.type is Type.DONE
        assert by_choice(here.outputs + there.outputs) == by_choice(whole.outputs)
        here.send(Type.CANCEL)
        assert (await here.end()).header.type is Type.CANCELLED
    assert moved
    for rig in (source, destination):
        await assert_idle(rig)


async def test_a_running_one_pauses_with_all_it_has_drawn_said_and_goes_on_when_told(rigs: Any) -> None:
    source, _ = rigs()
    whole = await source.run(LONG)
    call = source.invoke(LONG)
    for at in (3, 20, 60):
        await call.until(lambda at=at: len(call.outputs) >= at)
        paused = await state(call, Type.PAUSE)
        said = len(call.outputs)
        assert (paused.header.seq, paused.body.paused) == (said, True)
        assert unpack_as(LlmResume, paused.body.resume) == resume_of(call.outputs, 1)
        assert paused.body.tokens == len(source.codec.encode("roll:")) + sum(len(o.tokens) for o in call.outputs)
        again = await state(call, Type.PAUSE)
        assert (again.header.seq, again.body) == (paused.header.seq, paused.body)
        assert len(call.outputs) == said
        call.send(Type.CONTINUE)
    end = await call.end()
    assert end.header.type is Type.DONE
    assert by_choice(call.outputs) == by_choice(whole.outputs)


async def test_a_running_one_moves_while_it_speaks(rigs: Any) -> None:
    source, destination = rigs()
    whole = await source.run(LONG)
    here, there = source.invoke(LONG), destination.call(LONG)
    await here.until(lambda: len(here.outputs) >= 5)
    for _ in range(3):
        snapshot = await state(here, Type.SNAPSHOT)
        assert (await hold(there, snapshot)).header.seq == snapshot.header.seq
    paused = await state(here, Type.PAUSE)
    activate(there, paused.body.resume, paused.header.seq)
    await there.end()
    assert there.frames[3].header.seq == paused.header.seq == len(here.outputs)
    assert by_choice(here.outputs + there.outputs) == by_choice(whole.outputs)


async def test_a_snapshot_stands_for_outputs_that_precede_it(rigs: Any) -> None:
    source, _ = rigs()
    call = source.invoke(LONG)
    for _ in range(20):
        snapshot = await state(call, Type.SNAPSHOT)
        at = call.frames.index(snapshot)
        before = sum(frame.header.items for frame in call.frames[:at] if frame.header.type is Type.OUTPUT)
        assert before >= snapshot.header.seq
        if snapshot.header.seq:  # before it has begun there is nothing to tell
            assert unpack_as(LlmResume, snapshot.body.resume) == resume_of(call.outputs[: snapshot.header.seq], 1)
    await call.end()


async def test_a_held_one_is_silent_until_it_is_activated_and_ends_when_it_is_cancelled(rigs: Any) -> None:
    source, destination = rigs()
    here, there = source.invoke(LONG), destination.call(LONG)
    await hold(there, await state(here, Type.SNAPSHOT))
    await here.end()
    assert [frame.header.type for frame in there.frames] == [Type.HELD]
    there.send(Type.CANCEL)
    assert (await there.end()).header.type is Type.CANCELLED
    await assert_idle(destination)


async def test_cancelling_a_paused_one_ends_it(rigs: Any) -> None:
    source, _ = rigs()
    call = source.invoke(LONG)
    await call.until(lambda: len(call.outputs) >= 2)
    await state(call, Type.PAUSE)
    call.send(Type.CANCEL)
    assert (await call.end()).header.type is Type.CANCELLED


async def test_a_call_waiting_for_its_turn_moves_with_what_it_came_with(
    open_engine: Callable[[], Engine], codec: TextCodec
) -> None:
    source, destination = Rig(open_engine(), codec, concurrency=1), Rig(open_engine(), codec)
    whole = await destination.run(LONG)
    first = source.invoke(LONG, credit=1)
    await first.until(lambda: first.outputs)
    waiting = source.invoke(LONG)
    paused = await state(waiting, Type.PAUSE)
    assert (paused.header.seq, paused.body.resume, paused.body.possible) == (0, b"", True)
    there = destination.call(LONG)
    await hold(there, paused)
    activate(there, paused.body.resume, paused.header.seq)
    await there.end()
    assert by_choice(there.outputs) == by_choice(whole.outputs)
    for call in (first, waiting):
        call.send(Type.CANCEL)
        await call.end()


async def test_an_embedding_cannot_move(rigs: Any) -> None:
    source, _ = rigs()
    call = source.invoke(LlmRequest(prompts=("1 2 3",)), "embed", credit=0)
    answer = await state(call, Type.PAUSE) if not call.frames else None
    await call.end()
    assert answer is None or (answer.body.possible, answer.body.paused) == (False, False)


async def test_what_cannot_be_held_fails_and_what_is_not_held_cannot_be_activated(rigs: Any) -> None:
    _, destination = rigs()
    call = destination.call(LONG)
    call.invoke(kind=Type.HOLD, resume=b"\xc1", outputs=3)
    assert (await call.end()).body.error.code == "bad_request"
    other = destination.call(LONG)
    other.fence = 2
    other.send(Type.ACTIVATE, Activate(), seq=3)
    assert (await other.end()).header.type is Type.FAILED
