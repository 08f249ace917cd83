"""The engine port over transformers: exact, resumable, cancellable, bounded."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.runner.attach import prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling
from sllm_invoker.runner.engines.rows import Rows

from sllm_faas.errors import BadRequest, BadSpec, Cancelled, ContextTooLong, PlatformError, UnsupportedParameter

GREEDY = Sampling(temperature=0)
DICE = Sampling(temperature=1.3, top_p=0.95, presence_penalty=0.4, frequency_penalty=0.3, seed=77)
PROMPT = (3, 14, 15, 9, 26, 5)


async def listen(engine, sequence):
    return [output async for outputs in engine.activate(sequence) for output in outputs]


async def generate(engine, request):
    return await listen(engine, await engine.prefill(request))


async def tokens_of(engine, request):
    return [output.token for output in await generate(engine, request)]


async def settled(engine):
    """What tasks started before this have sent has been seen by the step thread when it returns."""
    await asyncio.sleep(0)  # lets them send it
    await engine.embed([[1]])
    return engine.stats()


@pytest.fixture
def gate(monkeypatch):
    """Closed: steps wait in the engine's thread. A stream's first token comes without a step."""
    opened, step = threading.Event(), Rows.step

    def gated(self, tokens):
        assert opened.wait(60)
        return step(self, tokens)

    monkeypatch.setattr(Rows, "step", gated)
    yield opened
    opened.set()


def reference(model, prompt, count):
    """What transformers' own generate says, greedy."""
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


async def test_greedy_equals_generate_for_sequences_of_different_length_together(architecture, case, engine):
    made = engine(architecture)
    prompts = [PROMPT[:3], (7, 8, 9, 10, 11, 12, 13, 21, 22), PROMPT]
    requests = [GenerateRequest(prompt, 12, GREEDY) for prompt in prompts]
    answers = await asyncio.gather(*(tokens_of(made, request) for request in requests))
    assert answers == [reference(case(architecture).model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("sampling", [GREEDY, DICE], ids=["greedy", "sampled"])
async def test_sequences_that_join_and_leave_do_not_change_each_other(engine, sampling):
    """Eight of different lengths, each started when the one before has spoken its first words."""
    made = engine(max_sequences=8)
    requests = [
        GenerateRequest((*PROMPT[: 1 + i % 5], i), 5 + 4 * (i % 3), replace(sampling, seed=i)) for i in range(8)
    ]
    alone = [await tokens_of(made, request) for request in requests]

    async def follow(index):
        if index == len(requests):
            return []
        drawn, rest = [], None
        async for outputs in made.activate(await made.prefill(requests[index])):
            drawn += [output.token for output in outputs]
            rest = rest or asyncio.create_task(follow(index + 1))
        return [drawn, *await rest]

    assert await follow(0) == alone


async def test_outputs_are_numbered_and_end_with_a_reason(engine):
    outputs = await generate(engine(), GenerateRequest(PROMPT, 6, GREEDY))
    assert [output.position for output in outputs] == list(range(6))
    assert [output.finish for output in outputs] == [None] * 5 + ["length"]


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "mamba"])
@pytest.mark.parametrize("sampling", [GREEDY, DICE], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cut", [1, 7, 14])
async def test_a_resumed_sequence_draws_what_it_would_have_drawn(engine, name, sampling, cut):
    made = engine(name)
    request = GenerateRequest(PROMPT, 15, sampling)
    whole = await generate(made, request)
    tokens = tuple(output.token for output in whole[:cut])
    assert await generate(made, replace(request, tokens=tokens)) == whole[cut:]


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "mamba"])
@pytest.mark.parametrize("sampling", [GREEDY, DICE], ids=["greedy", "sampled"])
async def test_an_extended_sequence_goes_on_as_if_it_had_drawn_the_tokens(engine, name, sampling):
    """Prefill, two rounds of extend, activate: the migration protocol's destination."""
    made = engine(name)
    request = GenerateRequest(PROMPT, 20, sampling)
    whole = await generate(made, request)
    tokens = [output.token for output in whole]
    sequence = await made.prefill(replace(request, tokens=tuple(tokens[:4])))
    await made.extend(sequence, tokens[4:11])
    await made.extend(sequence, tokens[11:12])
    await made.extend(sequence, [])
    assert list(sequence.tokens) == tokens[:12]
    assert await listen(made, sequence) == whole[12:]


async def test_a_held_sequence_is_silent_while_others_run(engine):
    made = engine()
    request = GenerateRequest(PROMPT, 10, DICE)
    whole = await generate(made, request)
    held = await made.prefill(request)
    for seed in range(3):
        await generate(made, GenerateRequest(PROMPT[:2], 8, replace(DICE, seed=seed)))
    assert list(held.tokens) == []
    assert (await settled(made)).held == 1
    assert await listen(made, held) == whole


async def test_held_between_running_ones_stays_exact(engine):
    """Rows are moved when a held sequence lies among running ones."""
    made = engine()
    requests = [GenerateRequest((i + 1, i + 2, i + 3), 12, replace(DICE, seed=i)) for i in range(5)]
    alone = [await generate(made, request) for request in requests]
    sequences = [await made.prefill(request) for request in requests]
    late = await asyncio.gather(*(listen(made, sequences[i]) for i in (4, 1)))
    early = await asyncio.gather(*(listen(made, sequences[i]) for i in (3, 0, 2)))
    assert late == [alone[4], alone[1]]
    assert early == [alone[3], alone[0], alone[2]]


async def test_a_long_prompt_is_computed_in_pieces_between_steps_of_the_others(engine, monkeypatch, gate):
    made = engine()
    gate.set()
    whole = await tokens_of(made, GenerateRequest(tuple(range(1, 49)), 10, GREEDY))
    monkeypatch.setattr("sllm_invoker.runner.engines.transformers.STEP_TOKENS", 4)
    monkeypatch.setattr("sllm_invoker.runner.engines.rows.Rows.chunk", 4)
    running = made.activate(await made.prefill(GenerateRequest(PROMPT, 58, GREEDY)))
    gate.clear()
    await anext(running)
    filling = asyncio.create_task(made.prefill(GenerateRequest(tuple(range(1, 49)), 10, GREEDY)))
    await asyncio.sleep(0)
    before = made.stats().steps
    gate.set()
    sequence = await filling
    assert made.stats().steps - before >= 10
    assert [output.token for output in await listen(made, sequence)] == whole


async def test_logprobs_come_with_the_outputs(engine):
    outputs = await generate(engine(), GenerateRequest(PROMPT, 4, replace(GREEDY, logprobs=2)))
    for output in outputs:
        assert output.top[0].token == output.token
        assert output.top[0].logprob == output.logprob > output.top[1].logprob


# -- ends ----------------------------------------------------------------------------------------------------


async def test_an_end_token_is_reported_with_stop_and_ends_the_stream(engine):
    tokens = await tokens_of(engine(), GenerateRequest(PROMPT, 12, GREEDY))
    made = engine(eos=frozenset({tokens[5], 95}))
    outputs = await generate(made, GenerateRequest(PROMPT, 12, GREEDY))
    first = tokens.index(tokens[5])
    assert [output.token for output in outputs] == tokens[: first + 1]
    assert outputs[-1].finish == "stop"
    assert await tokens_of(made, GenerateRequest(PROMPT, 12, GREEDY, ignore_eos=True)) == tokens


async def test_the_context_ends_a_sequence(engine):
    made = engine()
    assert made.max_context == 64
    outputs = await generate(made, GenerateRequest(PROMPT, 1000, GREEDY))
    assert len(outputs) == 64 - len(PROMPT)
    assert outputs[-1].finish == "length"


async def test_a_prompt_that_leaves_no_room_is_refused_with_the_limit(engine):
    made = engine()
    with pytest.raises(ContextTooLong, match="64"):
        await made.prefill(GenerateRequest((1,) * 64, 1, GREEDY))
    with pytest.raises(ContextTooLong):
        await made.prefill(GenerateRequest((1,) * 60, 9, GREEDY, tokens=(1,) * 4))
    assert len(await generate(made, GenerateRequest((1,) * 63, 5, GREEDY))) == 1


async def test_a_cache_smaller_than_the_context_is_the_context(engine):
    assert engine(cache_tokens=40).max_context == 40


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest((), 5), "no tokens"),
        (GenerateRequest((1, 96), 5), "outside 0 to 95"),
        (GenerateRequest((-1,), 5), "outside 0 to 95"),
        (GenerateRequest((1,), 0), "max_tokens is 0"),
        (GenerateRequest((1,), 2, tokens=(4, 5)), "max_tokens is 2"),
    ],
)
async def test_an_impossible_request_is_refused(engine, request_, message):
    with pytest.raises(BadRequest, match=message):
        await engine().prefill(request_)


async def test_a_sequence_is_activated_once_and_not_extended_after(engine):
    made = engine()
    sequence = await made.prefill(GenerateRequest(PROMPT, 3, GREEDY))
    await listen(made, sequence)
    with pytest.raises(BadRequest, match="once"):
        made.activate(sequence)
    with pytest.raises(BadRequest, match="cannot be extended"):
        await made.extend(sequence, [1])


# -- space ---------------------------------------------------------------------------------------------------


async def test_more_sequences_than_places_wait_their_turn(engine):
    made = engine(max_sequences=2)
    requests = [GenerateRequest((i + 1, 5), 8, replace(DICE, seed=i)) for i in range(7)]
    together = await asyncio.gather(*(generate(made, request) for request in requests))
    assert together == [await generate(made, request) for request in requests]


async def test_sequences_that_outgrow_the_cache_give_it_up_and_go_on_unchanged(engine):
    """64 tokens of cache, four streams of 46: the youngest are computed again, their streams are the same."""
    roomy, tight = engine(), engine(cache_tokens=64)
    requests = [GenerateRequest((*PROMPT[:5], i), 40, replace(DICE, seed=i)) for i in range(4)]
    expected = [await generate(roomy, request) for request in requests]
    most = 0

    async def watched(request):
        nonlocal most
        drawn = []
        async for outputs in tight.activate(await tight.prefill(request)):
            most = max(most, tight.stats().cache_tokens)
            drawn += outputs
        return drawn

    assert await asyncio.gather(*(watched(request) for request in requests)) == expected
    assert 50 < most <= 64
    assert (await settled(tight)).cache_tokens == 0


async def test_a_waiting_sequence_gets_the_place_of_a_cancelled_one(engine):
    made = engine(max_sequences=1)
    held = await made.prefill(GenerateRequest(PROMPT, 5, GREEDY))
    waiting = asyncio.create_task(tokens_of(made, GenerateRequest(PROMPT, 5, GREEDY)))
    assert (await settled(made)).waiting == 1
    made.cancel(held)
    assert len(await waiting) == 5


# -- cancel --------------------------------------------------------------------------------------------------


async def test_cancelling_a_held_sequence_frees_it_and_ends_its_stream(engine):
    made = engine()
    sequence = await made.prefill(GenerateRequest(PROMPT, 5, GREEDY))
    made.cancel(sequence)
    made.cancel(sequence)
    with pytest.raises(Cancelled):
        await made.extend(sequence, [1])
    with pytest.raises(Cancelled):
        await listen(made, sequence)
    stats = await settled(made)
    assert (stats.held, stats.running, stats.cache_tokens) == (0, 0, 0)


async def test_cancelling_a_running_sequence_ends_its_stream_at_once(engine, gate):
    """Even while the step that it is in goes on."""
    made = engine()
    sequence = await made.prefill(GenerateRequest(PROMPT, 58, GREEDY))
    stream = made.activate(sequence)
    await anext(stream)
    made.cancel(sequence)
    with pytest.raises(Cancelled):
        async for _ in stream:
            pass
    gate.set()
    assert (await settled(made)).cache_tokens == 0


async def test_closing_the_iterator_cancels_the_sequence(engine, gate):
    made = engine()
    stream = made.activate(await made.prefill(GenerateRequest(PROMPT, 58, GREEDY)))
    await anext(stream)
    await stream.aclose()
    gate.set()
    stats = await settled(made)
    assert (stats.running, stats.cache_tokens) == (0, 0)


async def test_a_cancelled_waiter_takes_its_waiting_sequence_along(engine):
    made = engine(max_sequences=1)
    held = await made.prefill(GenerateRequest(PROMPT, 5, GREEDY))
    waiting = asyncio.create_task(made.prefill(GenerateRequest(PROMPT, 5, GREEDY)))
    assert (await settled(made)).waiting == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    stats = await settled(made)
    assert (stats.waiting, stats.held) == (0, 1)
    assert len(await listen(made, held)) == 5


async def test_a_cancelled_prefill_stops_between_its_pieces(engine, monkeypatch):
    monkeypatch.setattr(Rows, "chunk", 1)
    made = engine()
    begun, cancelled, pieces, feed = threading.Event(), threading.Event(), [], Rows.feed

    def slow(self, handle, tokens):
        pieces.append(tokens)
        begun.set()
        assert cancelled.wait(60)
        return feed(self, handle, tokens)

    monkeypatch.setattr(Rows, "feed", slow)
    filling = asyncio.create_task(made.prefill(GenerateRequest((1,) * 62, 1, GREEDY)))
    await asyncio.to_thread(begun.wait)
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    cancelled.set()
    stats = await settled(made)
    assert pieces == [[1]]
    assert (stats.waiting, stats.held, stats.cache_tokens) == (0, 0, 0)


async def test_close_ends_every_stream_and_every_waiter(engine, gate):
    made = engine(max_sequences=2)
    held = await made.prefill(GenerateRequest(PROMPT, 5, GREEDY))
    stream = made.activate(await made.prefill(GenerateRequest(PROMPT, 58, GREEDY)))
    await anext(stream)
    waiting = asyncio.create_task(made.prefill(GenerateRequest(PROMPT, 5, GREEDY)))
    await asyncio.sleep(0)
    gate.set()
    made.close()
    with pytest.raises(Cancelled):
        await waiting
    with pytest.raises(Cancelled):
        async for _ in stream:
            pass
    with pytest.raises(Cancelled):
        await listen(made, held)
    with pytest.raises(Cancelled):
        await made.prefill(GenerateRequest(PROMPT, 5, GREEDY))


async def test_a_failing_forward_ends_its_sequences_and_the_engine_goes_on(engine, monkeypatch):
    made = engine()
    expected = await generate(made, GenerateRequest(PROMPT, 5, GREEDY))
    sequence = await made.prefill(GenerateRequest(PROMPT, 58, GREEDY))

    def fail(self, tokens):
        raise RuntimeError("out of registers")

    with monkeypatch.context() as patched:
        patched.setattr(Rows, "step", fail)
        with pytest.raises(PlatformError, match="out of registers"):
            await listen(made, sequence)
    assert await generate(made, GenerateRequest(PROMPT, 5, GREEDY)) == expected


async def test_logits_that_are_not_numbers_end_their_sequence_alone(engine, monkeypatch):
    made = engine()
    requests = [GenerateRequest(PROMPT[: i + 2], 20, replace(DICE, seed=i)) for i in range(3)]
    alone = [await generate(made, request) for request in requests]
    sequences = [await made.prefill(request) for request in requests]
    step = Rows.step

    def poisoned(self, tokens):
        order, logits = step(self, tokens)
        if (ill := sequences[1].handle) in order:
            logits[order.index(ill)] = float("nan")
        return order, logits

    monkeypatch.setattr(Rows, "step", poisoned)
    answers = await asyncio.gather(*(listen(made, s) for s in sequences), return_exceptions=True)
    assert [answers[0], answers[2]] == [alone[0], alone[2]]
    assert isinstance(answers[1], PlatformError)


@pytest.mark.parametrize("name", ["llama", "mistral", "mamba"])
@pytest.mark.parametrize("seed", range(4))
async def test_no_schedule_changes_what_a_sequence_draws(engine, monkeypatch, name, seed):
    """Random lives in a small cache: held or not, given tokens, extended in rounds, dropped half-way."""
    made = engine(name, max_sequences=4, cache_tokens=90)
    choose = random.Random(seed)
    requests = [
        GenerateRequest(
            tuple(choose.randrange(96) for _ in range(choose.randint(1, 20))),
            choose.randint(2, 30),
            replace(DICE, seed=i, temperature=choose.choice([0.0, 1.0, 2.0])),
        )
        for i in range(12)
    ]
    alone = [await generate(made, request) for request in requests]
    monkeypatch.setattr("sllm_invoker.runner.engines.transformers.STEP_TOKENS", 7)
    monkeypatch.setattr("sllm_invoker.runner.engines.rows.Rows.chunk", 5)
    places = asyncio.Semaphore(3)  # held ones give nothing back: they must not fill the cache together

    async def live(request, whole, fate):
        cut = sorted(fate.randint(0, len(whole) - 1) for _ in range(3))
        tokens = [output.token for output in whole]
        async with places:
            sequence = await made.prefill(replace(request, tokens=tuple(tokens[: cut[0]])))
            for start, end in pairwise(cut):
                if fate.random() < 0.5:
                    await asyncio.sleep(0)
                await made.extend(sequence, tokens[start:end])
            if fate.random() < 0.2:
                made.cancel(sequence)
                return
        drawn = []
        stop_at = fate.choice([None, None, cut[2] + 1])
        async for outputs in made.activate(sequence):
            drawn += outputs
            if stop_at is not None and len(drawn) >= stop_at:
                made.cancel(sequence)
                break
        assert drawn == whole[cut[2] :][: len(drawn)]
        assert stop_at is not None or len(drawn) == len(whole) - cut[2]

    lives = (live(r, w, random.Random(100 * seed + i)) for i, (r, w) in enumerate(zip(requests, alone, strict=True)))
    await asyncio.gather(*lives)
    stats = await settled(made)
    assert (stats.running, stats.held, stats.waiting, stats.cache_tokens) == (0, 0, 0, 0)


# -- embeddings and the factory ------------------------------------------------------------------------------


async def test_an_embedding_is_the_normalised_mean_of_the_last_hidden_layer(case, engine):
    inputs = [list(PROMPT), [4, 4, 4]]
    vectors = await engine().embed(inputs)
    for ids, vector in zip(inputs, vectors, strict=True):
        hidden = case("llama").model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        mean = hidden.mean(dim=0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-6)


async def test_embeddings_and_streams_share_the_engine(engine):
    made = engine()
    alone = await generate(made, GenerateRequest(PROMPT, 30, DICE))
    vectors, together = await asyncio.gather(
        made.embed([[i, i + 1] for i in range(20)]), generate(made, GenerateRequest(PROMPT, 30, DICE))
    )
    assert together == alone
    assert len(vectors) == 20


async def test_an_embedding_input_that_cannot_be_is_refused(engine):
    made = engine()
    with pytest.raises(BadRequest, match="no tokens"):
        await made.embed([[1], []])
    with pytest.raises(ContextTooLong):
        await made.embed([[1] * 65])


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(BadSpec, match=r"'llama\.cpp' is not one of transformers"):
        create(None, name="llama.cpp")  # type: ignore[arg-type]


async def test_half_precision_is_attached_and_served_as_it_is(case, store):
    ingest(store, str(case("llama").source), "half", dtype="bfloat16")
    checkpoint = store.get("half")
    made = create(prepare(checkpoint), max_sequences=4)
    made.attach(checkpoint.directory)
    try:
        requests = [GenerateRequest(PROMPT[: i + 1], 10, replace(DICE, seed=i)) for i in range(4)]
        answers = await asyncio.gather(*(generate(made, request) for request in requests))
        assert [len(answer) for answer in answers] == [10] * 4
        assert checkpoint.manifest.batched
    finally:
        made.close()


async def test_an_encoder_embeds_and_does_not_generate(store, tmp_path):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    ingest(store, str(tmp_path), "encoder")
    checkpoint = store.get("encoder")
    made = create(prepare(checkpoint))
    made.attach(checkpoint.directory)
    try:
        (vector,) = await made.embed([[3, 4, 5]])
        mean = model(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0].mean(dim=0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-6)
        with pytest.raises(UnsupportedParameter, match="BertModel computes embeddings only"):
            await made.prefill(GenerateRequest((1,), 2))
    finally:
        made.close()
