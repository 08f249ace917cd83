"""The language-model adapter: requests to sequences, tokens to outputs, over a scripted engine."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sllm_invoker.runner import llm
from sllm_invoker.runner.engines.base import (
    AttachReport,
    EngineStats,
    GenerateRequest,
    TokenLogprob,
    TokenOutput,
)
from sllm_invoker.runner.tokens import TextCodec

from sllm_faas.errors import PlatformError
from sllm_faas.spec import CheckpointSpec, FunctionSpec
from sllm_faas.wire.codec import Frame, pack, unpack_as
from sllm_faas.wire.header import Type
from sllm_faas.wire.llm import (
    LlmEmbeddings,
    LlmOutput,
    LlmRequest,
    LlmResume,
    choice_seed,
)
from sllm_faas.wire.messages import Invoke
from tests.runner.llm_rig import Rig as LlmRig

MODEL = Path(__file__).parents[2] / "examples" / "counting" / "model"
EOS = 1
CHAT = LlmRequest(messages=({"role": "user", "content": "41 42"},), max_tokens=10)


@dataclass
class Drawn:
    """A sequence of the scripted engine."""

    request: GenerateRequest
    tokens: Sequence[int] = ()
    cancelled: bool = False


@dataclass
class ScriptedEngine:
    """Draws what `script(request)` says, one list of outputs per step."""

    script: Callable[[GenerateRequest], list[list[TokenOutput]]]
    max_context: int = 64
    vocabulary: int = 2000
    sequences: list[Drawn] = field(default_factory=list)

    def attach(self, checkpoint: Path) -> AttachReport:
        raise NotImplementedError

    async def prefill(self, request: GenerateRequest, *, patient: bool = False) -> Drawn:
        self.sequences.append(Drawn(request))
        return self.sequences[-1]

    async def extend(self, sequence: Any, tokens: Sequence[int]) -> None:
        raise NotImplementedError

    async def activate(self, sequence: Any, tokens: Sequence[int] = ()) -> AsyncIterator[list[TokenOutput]]:
        try:
            for step in self.script(sequence.request):
                yield step
            await asyncio.Event().wait()  # a script without an end is held until it is cancelled
        finally:
            sequence.cancelled = True

    async def pause(self, sequence: Any) -> None:
        raise NotImplementedError

    def proceed(self, sequence: Any) -> None:
        raise NotImplementedError

    def cancel(self, sequence: Any) -> None:
        sequence.cancelled = True

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[float(len(ids)), 0.5] for ids in inputs]

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def close(self) -> None: ...


class Rig:
    """A scripted language model and one call of it."""

    def __init__(self, script: Callable[[GenerateRequest], list[list[TokenOutput]]]) -> None:
        self.codec = TextCodec.load(MODEL)
        self.engine = ScriptedEngine(script)
        self.call = LlmRig(self.engine, self.codec, concurrency=4).call(CHAT)
        self.send, self.until, self.end, self.text = self.call.send, self.call.until, self.call.end, self.call.text

    def invoke(self, request: LlmRequest, method: str = "chat", **fields: Any) -> None:
        self.call.request, self.call.method = request, method
        self.call.invoke(**fields)

    async def run(self, request: LlmRequest, method: str = "chat", **fields: Any) -> Frame:
        self.invoke(request, method, **fields)
        return await self.end()

    @property
    def outputs(self) -> list[LlmOutput]:
        return self.call.outputs

    def ids(self, text: str) -> list[int]:
        return self.codec.encode(text)


def steps(ids: Sequence[int], finish: Any = "length", per_step: int = 1) -> list[list[TokenOutput]]:
    last = len(ids) - 1
    drawn = [TokenOutput(token, at, finish=finish if at == last else None) for at, token in enumerate(ids)]
    return [drawn[at : at + per_step] for at in range(0, len(drawn), per_step)]


def numbers(*values: int) -> list[int]:
    return TextCodec.load(MODEL).encode(" ".join(map(str, values)))


# -- one choice ------------------------------------------------------------------------------------------------


async def test_text_tokens_and_usage_of_a_chat() -> None:
    ids = numbers(43, 44, 45)
    rig = Rig(lambda _: steps(ids))
    end = await rig.run(CHAT)
    prompt = rig.engine.sequences[0].request.prompt
    assert list(prompt) == rig.codec.encode_chat(CHAT.messages)
    assert rig.text().split() == ["43", "44", "45"]
    assert [token for output in rig.outputs for token in output.tokens] == ids
    assert [output.finish for output in rig.outputs] == [None, None, "length"]
    assert end.body.usage == {"prompt_tokens": len(prompt), "completion_tokens": 3}
    assert [span[0] for span in end.body.spans] == ["prefill", "decode"]


async def test_one_output_per_engine_step() -> None:
    rig = Rig(lambda _: steps(numbers(1, 2, 3, 4, 5), per_step=2))
    await rig.run(CHAT)
    assert [len(output.tokens) for output in rig.outputs] == [2, 2, 1]


async def test_the_end_token_has_no_text_but_counts() -> None:
    rig = Rig(lambda _: steps([*numbers(7), EOS], "stop"))
    end = await rig.run(CHAT)
    assert rig.text().strip() == "7"
    assert rig.outputs[-1].finish == "stop"
    assert end.body.usage["completion_tokens"] == 2


async def test_a_stop_string_ends_the_choice_is_not_shown_and_frees_the_sequence() -> None:
    rig = Rig(lambda _: [*steps(numbers(1, 2, 3, 4, 5, 6), finish=None, per_step=4)])
    end = await rig.run(LlmRequest(prompts=("0",), stop=(" 3",)), "complete")
    assert rig.text().split() == ["1", "2"]
    assert rig.outputs[-1].finish == "stop"
    assert end.body.usage["completion_tokens"] == 3
    assert rig.engine.sequences[0].cancelled


async def test_settings_reach_the_engine_and_max_tokens_is_cut_to_the_context() -> None:
    rig = Rig(lambda _: steps(numbers(1)))
    request = LlmRequest(
        prompts=((5, 6, 7),), max_tokens=1000, temperature=0.5, top_p=0.9, top_k=3, presence_penalty=0.1,
        frequency_penalty=0.2, seed=42, ignore_eos=True,
    )  # fmt: skip
    await rig.run(request, "complete")
    wanted = rig.engine.sequences[0].request
    assert (wanted.prompt, wanted.max_tokens, wanted.ignore_eos) == ((5, 6, 7), 61, True)
    sampling = wanted.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 3, 42)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logprobs) == (0.1, 0.2, None)


async def test_logprobs_name_the_token_and_the_best() -> None:
    seven, eight = numbers(7)[0], numbers(8)[0]
    drawn = TokenOutput(
        seven, 0, logprob=-0.25, top=(TokenLogprob(seven, -0.25), TokenLogprob(eight, -2.0)), finish="length"
    )
    rig = Rig(lambda _: [[drawn]])
    await rig.run(LlmRequest(prompts=("6",), logprobs=2), "complete")
    (logprob,) = rig.outputs[0].logprobs
    assert (logprob.token.strip(), logprob.logprob) == ("7", -0.25)
    assert bytes(logprob.bytes).decode() == logprob.token
    assert [(token.strip(), value) for token, value, _ in logprob.top] == [("7", -0.25), ("8", -2.0)]


async def test_echo_shows_the_prompt_first() -> None:
    rig = Rig(lambda _: steps(numbers(43)))
    await rig.run(LlmRequest(prompts=("41 42",), echo=True), "complete")
    assert rig.text().split() == ["41", "42", "43"]


# -- several choices -------------------------------------------------------------------------------------------


async def test_choices_of_several_prompts_are_numbered_and_seeded() -> None:
    rig = Rig(lambda request: steps([request.prompt[-1] + 1]))
    end = await rig.run(LlmRequest(prompts=((10,), (20, 30)), n=2, seed=9), "complete")
    requests = {s.request.prompt: [] for s in rig.engine.sequences}
    for sequence in rig.engine.sequences:
        requests[sequence.request.prompt].append(sequence.request.sampling.seed)
    assert requests == {(10,): [9, choice_seed(9, 1)], (20, 30): [9, choice_seed(9, 1)]}
    assert {output.choice: output.tokens for output in rig.outputs} == {0: (11,), 1: (11,), 2: (31,), 3: (31,)}
    assert end.body.usage == {"prompt_tokens": 3, "completion_tokens": 4}


async def test_a_failing_choice_fails_the_call_and_stops_the_others() -> None:
    def script(request: GenerateRequest) -> list[list[TokenOutput]]:
        if request.sampling.seed != 0:
            raise PlatformError("the model failed")
        return steps(numbers(1, 2), finish=None)

    rig = Rig(script)
    end = await rig.run(LlmRequest(prompts=("1",), n=3), "complete")
    assert (end.header.type, end.body.error.message) == (Type.FAILED, "the model failed")
    assert all(sequence.cancelled for sequence in rig.engine.sequences)


async def test_choices_share_one_credit() -> None:
    rig = Rig(lambda _: steps(numbers(1, 2, 3)))
    rig.invoke(LlmRequest(prompts=("1",), n=2), "complete", credit=2)
    await rig.until(lambda: len(rig.outputs) == 2)
    for credit in range(3, 7):
        rig.send(Type.CREDIT, credit=credit)
        await rig.until(lambda credit=credit: len(rig.outputs) == credit)
    assert (await rig.end()).header.seq == 6
    assert [rig.text(choice).split() for choice in (0, 1)] == [["1", "2", "3"]] * 2


# -- refusing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "method", "code", "param"),
    [
        (LlmRequest(prompts=(tuple(range(64)),)), "complete", "context_length_exceeded", "prompt"),
        (LlmRequest(prompts=(tuple(range(65)),)), "embed", "context_length_exceeded", "input"),
        (LlmRequest(messages=({"role": "user", "content": "1 " * 80},)), "chat", "context_length_exceeded", "messages"),
        (LlmRequest(), "chat", "bad_request", "messages"),
        (LlmRequest(), "complete", "bad_request", "prompt"),
        (LlmRequest(prompts=("1",), echo=True, logprobs=0), "complete", "unsupported_parameter", "echo"),
        (LlmRequest(messages=({"role": "user", "content": 5},)), "chat", "bad_request", "messages"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(request_: LlmRequest, method: str, code: str, param: str) -> None:
    rig = Rig(lambda _: steps(numbers(1)))
    end = await rig.run(request_, method)
    assert end.header.type is Type.FAILED
    assert (end.body.error.code, end.body.error.status, end.body.error.param) == (code, 400, param)
    assert not rig.engine.sequences


async def test_too_long_a_prompt_is_told_in_numbers() -> None:
    rig = Rig(lambda _: steps(numbers(1)))
    end = await rig.run(LlmRequest(prompts=(tuple(range(70)),)), "complete")
    assert "70 tokens" in end.body.error.message
    assert "64" in end.body.error.message


async def test_a_payload_that_is_no_request_is_refused() -> None:
    rig = Rig(lambda _: steps(numbers(1)))
    rig.send(Type.INVOKE, Invoke("chat", payload=b"\x93\x01\x02\x03"))
    assert (await rig.end()).body.error.code == "bad_request"


# -- cancelling and resuming -----------------------------------------------------------------------------------


async def test_cancelling_frees_every_sequence() -> None:
    rig = Rig(lambda _: steps(numbers(1, 2, 3), finish=None))
    rig.invoke(LlmRequest(prompts=("1",), n=2), "complete")
    await rig.until(lambda: len(rig.outputs) == 6)
    rig.send(Type.CANCEL)
    assert (await rig.end()).header.type is Type.CANCELLED
    assert [sequence.cancelled for sequence in rig.engine.sequences] == [True, True]


async def test_cancelling_while_waiting_for_credit_frees_the_sequence() -> None:
    rig = Rig(lambda _: steps(numbers(1, 2, 3)))
    rig.invoke(CHAT, credit=1)
    await rig.until(lambda: len(rig.outputs) == 1)
    rig.send(Type.CANCEL)
    assert (await rig.end()).header.type is Type.CANCELLED
    assert rig.engine.sequences[0].cancelled


@pytest.mark.parametrize("cut", range(1, 6))
async def test_a_resumed_choice_goes_on_without_repetition(cut: int) -> None:
    """Whatever the cut: the text before it and the text after it are the whole text, stop strings included."""
    ids = numbers(11, 12, 13, 14, 15, 16)

    def script(request: GenerateRequest) -> list[list[TokenOutput]]:
        return [
            [TokenOutput(token, at, finish="length" if at == 5 else None)]
            for at, token in enumerate(ids)
            if at >= len(request.tokens)
        ]

    request = LlmRequest(prompts=("10",), stop=(" 16 17",), seed=3)
    whole = Rig(script)
    await whole.run(request, "complete")
    before = whole.outputs[:cut]
    rest = Rig(script)
    resume = pack(LlmResume((tuple(ids[:cut]),), (None,)))
    end = await rest.run(request, "complete", resume=resume, outputs=cut)
    assert rest.call.frames[0].header.seq == cut
    assert "".join(output.text for output in before) + rest.text() == whole.text()
    assert end.body.usage["completion_tokens"] == 6


async def test_a_choice_that_had_finished_is_not_drawn_again() -> None:
    rig = Rig(lambda _: steps(numbers(5, 6)))
    resume = pack(LlmResume(((), tuple(numbers(1, 2))), (None, "stop")))
    end = await rig.run(LlmRequest(prompts=("1",), n=2), "complete", resume=resume, outputs=2)
    assert {output.choice for output in rig.outputs} == {0}
    assert end.body.usage["completion_tokens"] == 4


# -- embedding -------------------------------------------------------------------------------------------------


async def test_embeddings_are_float32_vectors_with_usage() -> None:
    rig = Rig(lambda _: [])
    end = await rig.run(LlmRequest(prompts=("1 2 3", (7,))), "embed")
    result = unpack_as(LlmEmbeddings, end.body.payload)
    assert [struct.unpack("<2f", vector) for vector in result.vectors] == [(3.0, 0.5), (1.0, 0.5)]
    assert result.usage.prompt_tokens == end.body.usage["prompt_tokens"] == 4


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory_mb", "per_token", "context", "tokens"),
    [
        (256, 1024, 8192, 16 * 8192),  # no more than all sequences can fill
        (256, 128 * 1024, 100_000, 4096),  # 512 MiB
        (4096, 128 * 1024, 100_000, 24_576),  # three quarters of 4 GiB
        (256, 0, 8192, None),  # a state that does not grow
    ],
)
def test_the_cache_is_bounded_by_the_promised_memory(
    memory_mb: int, per_token: int, context: int, tokens: int | None
) -> None:
    spec = FunctionSpec("m", "llm", checkpoint=CheckpointSpec("s"), memory_mb=memory_mb, concurrency=16)
    assert llm.cache_tokens(spec, per_token, context) == tokens
