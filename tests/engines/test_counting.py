"""The engine on a model whose answers a person can check: it counts, and it rolls dice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.runner.attach import prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling
from sllm_invoker.runner.engines.transformers import TransformersEngine
from sllm_invoker.runner.tokens import TextCodec, TextStream

MODEL = Path(__file__).parents[2] / "examples" / "counting" / "model"


@pytest.fixture(scope="module")
def checkpoint(store):
    ingest(store, str(MODEL), "counting")
    return store.ensure_verified("counting")


@pytest.fixture
def codec(checkpoint) -> TextCodec:
    return TextCodec.load(checkpoint.directory)


@pytest.fixture
def engine(checkpoint) -> Iterator[TransformersEngine]:
    made = create(prepare(checkpoint), max_sequences=8)
    made.attach(checkpoint.directory)
    yield made
    made.close()


async def spoken(engine, codec, prompt, count, sampling, tokens=()):
    """The text of a stream and its tokens."""
    request = GenerateRequest(tuple(codec.encode(prompt)), count, sampling, tokens)
    text, shown, drawn = TextStream(codec, tokens=tokens), "", list(tokens)
    async for outputs in engine.activate(await engine.prefill(request)):
        for output in outputs:
            drawn.append(output.token)
            shown += text.feed([output.token] if output.finish != "stop" else [])
    return shown + text.finish(), drawn


async def test_eight_streams_count_on_each_from_its_own_number(engine, codec):
    starts = [3, 17, 42, 99, 128, 200, 305, 411]
    prompts = [" ".join(str(n) for n in range(start, start + 4 + i % 3)) for i, start in enumerate(starts)]
    answers = await asyncio.gather(*(spoken(engine, codec, p, 80, Sampling(temperature=0)) for p in prompts))
    for prompt, (text, _) in zip(prompts, answers, strict=True):
        first = int(prompt.split()[-1]) + 1
        assert [int(word) for word in text.split()] == list(range(first, first + 80))


async def test_a_sampled_roll_resumed_at_any_point_is_the_same_roll(engine, codec):
    sampling = Sampling(temperature=1.0, top_p=0.99, frequency_penalty=0.05, seed=5)
    whole, tokens = await spoken(engine, codec, "roll:", 60, sampling)
    assert set(whole) == set("123456")
    for cut in (1, 13, 59):
        text, again = await spoken(engine, codec, "roll:", 60, sampling, tuple(tokens[:cut]))
        assert again == tokens
        assert whole.endswith(text)


async def test_dice_are_fair(engine, codec):
    """Chi-square over 1,600 rolls of eight streams, and no two streams roll alike."""
    streams = (spoken(engine, codec, "roll:", 200, Sampling(seed=seed)) for seed in range(8))
    rolls = [text for text, _ in await asyncio.gather(*streams)]
    counts = [sum(text.count(face) for text in rolls) for face in "123456"]
    expected = sum(counts) / 6
    assert sum(counts) > 1550
    assert sum((count - expected) ** 2 / expected for count in counts) < 20.52  # 5 degrees, p = 0.001
    assert len(set(rolls)) == 8


async def test_the_answer_is_that_of_generate(engine, codec):
    ids = torch.tensor([codec.encode("41 42 43")])
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :].tolist()
    _, tokens = await spoken(engine, codec, "41 42 43", 60, Sampling(temperature=0))
    assert tokens == expected
