"""A generation that goes on elsewhere says what is missing of the undisturbed one: at every boundary of outputs, on a
real (tiny) model, whatever the sampling."""

from __future__ import annotations

import pytest
from sllm_invoker.runner.engines.base import Engine
from sllm_invoker.runner.tokens import TextCodec

from sllm_faas.wire.codec import pack
from sllm_faas.wire.header import Type
from sllm_faas.wire.llm import LlmOutput, LlmRequest, LlmResume
from tests.runner.llm_rig import Rig, by_choice, logprobs, resume_of

COUNT = LlmRequest(prompts=("41 42 43",), max_tokens=24, temperature=0.0)
ROLL = LlmRequest(prompts=("roll:",), max_tokens=20, seed=11)

KINDS = {
    "greedy": (COUNT, "complete"),
    "chat": (LlmRequest(messages=({"role": "user", "content": "7 8 9"},), max_tokens=16, temperature=0.0), "chat"),
    "sampled": (ROLL, "complete"),
    "filtered": (
        LlmRequest(prompts=("roll:",), max_tokens=20, seed=3, top_p=0.8, top_k=4, temperature=1.3),
        "complete",
    ),
    "penalties": (
        LlmRequest(prompts=("roll:",), max_tokens=20, seed=5, presence_penalty=0.7, frequency_penalty=0.4),
        "complete",
    ),
    "stop string": (LlmRequest(prompts=("41 42 43",), max_tokens=40, temperature=0.0, stop=(" 48 49",)), "complete"),
    "logprobs": (LlmRequest(prompts=("roll:",), max_tokens=12, seed=2, logprobs=3), "complete"),
    "choices": (LlmRequest(prompts=("roll:",), n=3, max_tokens=8, seed=9, stop=("3",)), "complete"),
    "prompts": (LlmRequest(prompts=("1 2 3", "roll:"), n=2, max_tokens=6, seed=4), "complete"),
    "echo": (LlmRequest(prompts=("1 2 3", "roll:"), max_tokens=6, seed=4, echo=True), "complete"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_resumed_at_every_boundary_it_is_the_undisturbed_one(kind: str, engine: Engine, codec: TextCodec) -> None:
    request, method = KINDS[kind]
    rig = Rig(engine, codec, concurrency=4)
    whole = await rig.run(request, method)
    done = (await whole.end()).body
    count = max(1, len(request.prompts)) * request.n
    for cut in range(len(whole.outputs) + 1):
        before = whole.outputs[:cut]
        resume = pack(resume_of(before, count))
        rest = await rig.run(request, method, resume=resume, outputs=cut)
        end = await rest.end()
        assert end.header.type is Type.DONE
        assert by_choice(before + rest.outputs) == by_choice(whole.outputs)
        assert end.body.usage == done.usage
        assert end.header.seq == cut + len(rest.outputs)
        if rest.outputs:
            assert rest.frames[0].header.seq == cut
        for choice in range(count):
            expected, found = logprobs(whole.outputs, choice), logprobs(before + rest.outputs, choice)
            assert [one.token for one in found] == [one.token for one in expected]
            assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-4)


async def test_choices_that_said_nothing_may_be_missing_in_the_resume_state(engine: Engine, codec: TextCodec) -> None:
    request, method = KINDS["choices"]
    rig = Rig(engine, codec)
    whole = await rig.run(request, method)
    first: list[LlmOutput] = [output for output in whole.outputs if output.choice == 0]
    short = pack(resume_of(first, 1))
    rest = await rig.run(request, method, resume=short, outputs=len(first))
    assert by_choice(first + rest.outputs) == by_choice(whole.outputs)


async def test_a_resume_state_of_another_request_is_refused(engine: Engine, codec: TextCodec) -> None:
    rig = Rig(engine, codec)
    for state in (LlmResume(((1,), (2,)), (None, None)), LlmResume(((1,),), ())):
        call = await rig.run(COUNT, resume=pack(state), outputs=1)
        end = await call.end()
        assert (end.header.type, end.body.error.code) == (Type.FAILED, "bad_request")
    call = await rig.run(COUNT, resume=b"\xc1", outputs=1)
    assert (await call.end()).body.error.code == "bad_request"
