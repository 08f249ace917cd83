"""Sequences that are paused, extended and activated go on as if nothing had happened, and delay nobody."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling
from sllm_invoker.runner.engines.rows import Rows

from sllm_faas.errors import BadRequest

DICE = Sampling(temperature=1.3, top_p=0.95, presence_penalty=0.4, frequency_penalty=0.3, seed=77)
REQUEST = GenerateRequest((3, 14, 15, 9, 26, 5), 40, DICE)


class Listener:
    """What a sequence has said so far."""

    def __init__(self, engine: Any, sequence: Any, tokens: tuple[int, ...] = ()) -> None:
        self.tokens: list[int] = []
        self.news = asyncio.Event()
        self.task = asyncio.ensure_future(self._listen(engine.activate(sequence, tokens)))

    async def _listen(self, steps: Any) -> list[int]:
        async for outputs in steps:
            self.tokens += [output.token for output in outputs]
            self.news.set()
        return self.tokens

    async def until(self, count: int) -> None:
        while len(self.tokens) < count:
            self.news.clear()
            await self.news.wait()


async def steps_of(engine: Any, count: int) -> None:
    """Let the step thread come round `count` times."""
    for _ in range(count):
        await engine.embed([[1]])


async def undisturbed(engine: Any, request: GenerateRequest) -> list[int]:
    return await Listener(engine, await engine.prefill(request)).task


@pytest.mark.parametrize("architecture_", ["llama", "mamba"])
async def test_a_paused_sequence_is_silent_and_goes_on_where_it_was(engine, architecture_):
    made = engine(architecture_, max_sequences=4)
    whole = await undisturbed(made, REQUEST)
    other = Listener(made, await made.prefill(replace(REQUEST, sampling=replace(DICE, seed=5))))
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    for at in (1, 4, 9):
        await listener.until(at)
        await made.pause(sequence)
        drawn = list(sequence.tokens)
        assert drawn == whole[: len(drawn)]
        await steps_of(made, 3)
        assert list(sequence.tokens) == drawn
        assert listener.tokens == drawn
        made.proceed(sequence)
    assert await listener.task == whole
    assert len(await other.task) == 40


async def test_a_pause_before_the_first_token_holds_it_back(engine):
    made = engine()
    whole = await undisturbed(made, REQUEST)
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    await asyncio.sleep(0)
    pausing = asyncio.ensure_future(made.pause(sequence))
    await pausing
    said = len(sequence.tokens)
    await steps_of(made, 3)
    assert len(sequence.tokens) == said
    made.proceed(sequence)
    assert await listener.task == whole


async def test_a_pause_that_is_given_up_ends_nothing(engine):
    """The move it was for failed before the next token boundary."""
    made = engine()
    whole = await undisturbed(made, REQUEST)
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    await listener.until(2)
    pausing = asyncio.ensure_future(made.pause(sequence))
    await asyncio.sleep(0)
    assert pausing.cancel()
    await asyncio.gather(pausing, return_exceptions=True)
    made.proceed(sequence)
    assert await listener.task == whole


async def test_pausing_what_has_ended_returns(engine):
    made = engine()
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    await listener.task
    await made.pause(sequence)
    made.proceed(sequence)
    cancelled = await made.prefill(REQUEST)
    made.cancel(cancelled)
    await made.pause(cancelled)


async def test_cancelling_a_paused_sequence_frees_it(engine):
    made = engine()
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    await listener.until(2)
    await made.pause(sequence)
    listener.task.cancel()
    await asyncio.gather(listener.task, return_exceptions=True)
    await steps_of(made, 2)
    stats = made.stats()
    assert (stats.running, stats.held, stats.cache_tokens) == (0, 0, 0)


@pytest.mark.parametrize("last", [0, 1, 2, 7])
async def test_a_held_sequence_activated_with_what_was_drawn_meanwhile_says_the_rest(engine, last):
    made = engine()
    whole = await undisturbed(made, REQUEST)
    sequence = await made.prefill(replace(REQUEST, tokens=tuple(whole[:5])), patient=True)
    await made.extend(sequence, whole[5:9])
    assert await Listener(made, sequence, tuple(whole[9 : 9 + last])).task == whole[9 + last :]


async def test_an_activated_sequence_cannot_be_extended_or_activated_again(engine):
    made = engine()
    sequence = await made.prefill(REQUEST)
    listener = Listener(made, sequence)
    with pytest.raises(BadRequest):
        await made.extend(sequence, [1])
    with pytest.raises(BadRequest):
        made.activate(sequence)
    await listener.task


async def test_a_patient_prefill_takes_one_small_chunk_between_two_steps(engine, monkeypatch):
    """And one that somebody waits for here takes what it needs."""
    monkeypatch.setattr(Rows, "small_chunk", 4)
    order: list[str] = []
    feed, step = Rows.feed, Rows.step
    filling = threading.Event()

    def fed(self: Any, handle: int, tokens: Any) -> Any:
        order.append(f"feed {len(tokens)}")
        return feed(self, handle, tokens)

    def stepped(self: Any, tokens: Any) -> Any:
        assert filling.wait(30)
        order.append("step")
        return step(self, tokens)

    monkeypatch.setattr(Rows, "feed", fed)
    monkeypatch.setattr(Rows, "step", stepped)
    made = engine(max_sequences=4)
    running = Listener(made, await made.prefill(REQUEST))
    await running.until(1)
    long = GenerateRequest(tuple(range(1, 19)), 5, DICE)
    silent = asyncio.ensure_future(made.prefill(long, patient=True))
    urgent = asyncio.ensure_future(made.prefill(long))
    await asyncio.sleep(0)
    filling.set()
    await asyncio.gather(silent, urgent)
    running.task.cancel()
    began = order.index("feed 18")
    pieces = [one for one in order[1:] if one != "feed 18"]
    assert began <= 2
    assert [one for one in pieces if one != "step"] == ["feed 4"] * 4 + ["feed 2"]
    assert "feed 4, feed 4" not in ", ".join(pieces)


class Gate:
    """Lets as many steps of a row cache begin as were allowed."""

    def __init__(self, monkeypatch: Any) -> None:
        self.allowed = threading.Semaphore(0)
        step = Rows.step

        def stepped(rows: Any, tokens: Any) -> Any:
            assert self.allowed.acquire(timeout=30)
            print("STEP", tokens)
            return step(rows, tokens)

        monkeypatch.setattr(Rows, "step", stepped)

    def allow(self, steps: int) -> None:
        self.allowed.release(steps)


async def test_the_word_that_a_sequence_rests_does_not_wait_for_the_next_step_of_the_others(engine, monkeypatch):
    made = engine(max_sequences=4)
    gate = Gate(monkeypatch)
    sequence, stays = await made.prefill(REQUEST), await made.prefill(REQUEST)
    leaving, other = Listener(made, sequence), Listener(made, stays)
    await leaving.until(1)
    await other.until(1)
    pausing = asyncio.ensure_future(made.pause(sequence))
    await asyncio.sleep(0)
    gate.allow(1)
    await asyncio.wait_for(pausing, 10)
    gate.allow(100)
    await other.task
    leaving.task.cancel()


async def test_neither_does_the_word_that_it_is_held(engine, monkeypatch):
    made = engine(max_sequences=4)
    gate = Gate(monkeypatch)
    other = Listener(made, await made.prefill(REQUEST))
    await other.until(1)
    filling = asyncio.ensure_future(made.prefill(replace(REQUEST, tokens=(1, 2)), patient=True))
    await asyncio.sleep(0)
    gate.allow(1)
    sequence = await asyncio.wait_for(filling, 10)
    extending = asyncio.ensure_future(made.extend(sequence, [3, 4]))
    await asyncio.sleep(0)
    gate.allow(1)
    await asyncio.wait_for(extending, 10)
    gate.allow(100)
    await other.task


async def test_who_is_activated_speaks_before_a_silent_one_is_computed_further(engine, monkeypatch):
    made = engine(max_sequences=4)
    held = await made.prefill(replace(REQUEST, tokens=(1, 2)), patient=True)
    order: list[str] = []
    feed, draw_fresh = Rows.feed, made._draw_fresh
    taken, together = threading.Event(), threading.Event()

    def occupied() -> None:
        taken.set()
        together.wait(30)

    def fed(rows: Any, handle: int, tokens: Any) -> Any:
        order.append(f"feed {len(tokens)}")
        return feed(rows, handle, tokens)

    def drawn() -> None:
        order.append("draw")
        draw_fresh()

    monkeypatch.setattr(Rows, "feed", fed)
    monkeypatch.setattr(made, "_draw_fresh", drawn)
    made._send(occupied)  # both commands come to one turn, the next
    assert taken.wait(30)
    listener = Listener(made, held, (3,))
    silent = asyncio.ensure_future(made.prefill(GenerateRequest(tuple(range(1, 51)), 5, DICE), patient=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    together.set()
    await asyncio.gather(listener.until(1), silent)
    listener.task.cancel()
    said = order[order.index("feed 1") :]
    assert said[:2] == ["feed 1", "draw"]
    assert said[2] == f"feed {Rows.small_chunk}"
