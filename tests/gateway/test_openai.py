"""OpenAI's endpoints as the official client sees them, and as raw HTTP."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import openai
import pytest
from sllm_gateway import note
from sllm_gateway.openai_parse import ChatBody, CompletionBody, EmbeddingBody, parse, parse_chat, parse_completion

from sllm_faas.errors import BadRequest, ContextTooLong, UnsupportedParameter, WorkerLost, to_info
from sllm_faas.wire import llm
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Done, Failed, Invoke
from tests.gateway.fakes import FakeInvoker, Rig, Running, bearer, token

pytestmark = pytest.mark.asyncio(loop_scope="module")
HELLO = [{"role": "user", "content": "hello"}]


def client(gateway: Rig, key: str = "caller") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=token(key), max_retries=0)


def asked(gateway: Rig) -> llm.LlmRequest:
    """What the last invocation asked of the model."""
    return msgspec.msgpack.decode(gateway.invoker.got[Type.INVOKE][-1].body.payload, type=llm.LlmRequest)


async def test_a_chat_is_answered_whole(gateway: Rig) -> None:
    async with client(gateway) as api:
        answer = await api.chat.completions.create(model="counting", messages=HELLO, n=2, logprobs=True)
    assert [choice.message.content for choice in answer.choices] == ["one two", "one two"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content[0].bytes == [111, 110, 101]
    assert answer.usage.total_tokens == 7
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.id.startswith("chatcmpl-")


async def test_a_chat_is_streamed_role_first_usage_last(gateway: Rig) -> None:
    async with client(gateway) as api:
        stream = await api.chat.completions.create(
            model="app/counting", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_streams_events_have_integer_ids_and_end_with_done(gateway: Rig) -> None:
    answer = await gateway.http.post(
        "/v1/chat/completions", json={"model": "counting", "messages": HELLO, "stream": True}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert [line for line in answer.text.splitlines() if line.startswith("id: ")] == ["id: 0", "id: 1"]
    assert '"usage"' not in answer.text


async def test_completions_take_every_kind_of_prompt(gateway: Rig) -> None:
    async with client(gateway) as api:
        for prompt, expected in (
            ("a", ("a",)),
            (["a", "b"], ("a", "b")),
            ([1, 2], ((1, 2),)),
            ([[1], [2, 3]], ((1,), (2, 3))),
        ):
            answer = await api.completions.create(model="counting", prompt=prompt, logprobs=2, echo=True)
            assert len(answer.choices) == len(expected)
            assert asked(gateway).prompts == expected
            assert answer.choices[0].logprobs.tokens == ["one"]
            assert answer.choices[0].logprobs.text_offset == [0]
    assert asked(gateway).echo
    assert asked(gateway).max_tokens == 16


@pytest.mark.parametrize("comments", [True, False])
async def test_a_resumed_stream_shows_nothing_but_a_comment_if_one_is_wanted(gateway: Rig, comments: bool) -> None:
    def dies_once(invoker: FakeInvoker, running: Running) -> None:
        running.sent = running.header.seq
        if not running.invoke.outputs:
            invoker.output(running, llm.encode(llm.LlmOutput(0, (7,), "one")))
            invoker.end(running, Type.FAILED, Failed(to_info(WorkerLost("the container ended"))))
        else:
            invoker.output(running, llm.encode(llm.LlmOutput(0, (8,), " two", (), "length")))
            invoker.end(running, Type.DONE, Done(usage={"prompt_tokens": 1, "completion_tokens": 2}))

    before = gateway.invoker.scripts["complete"]
    gateway.invoker.scripts["complete"] = dies_once
    headers = {**bearer("caller"), **({"X-Sllm-Comments": "1"} if comments else {})}
    try:
        answer = await gateway.http.post(
            "/v1/completions", json={"model": "counting", "prompt": "a", "stream": True}, headers=headers
        )
    finally:
        gateway.invoker.scripts["complete"] = before
    assert [line for line in answer.text.splitlines() if line.startswith(":")] == (
        [": resumed node-0 -> node-0"] if comments else []
    )
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in answer.text.splitlines() if line[:7] == "data: {"]
    assert "".join(texts) == "one two"
    resumed = gateway.invoker.got[Type.INVOKE][-1]
    assert msgspec.msgpack.decode(resumed.body.resume, type=llm.LlmResume) == llm.LlmResume(((7,),), (None,))
    text = (await gateway.http.get("/metrics")).text
    assert 'sllm_handover_gap_seconds_count{kind="resume"}' in text


async def test_completions_are_streamed(gateway: Rig) -> None:
    async with client(gateway) as api:
        stream = await api.completions.create(model="counting", prompt="a", n=2, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one two", "one two"]


async def test_embeddings_come_as_floats_and_as_base64(gateway: Rig) -> None:
    async with client(gateway) as api:
        plain = await api.embeddings.create(model="counting", input=["a", "b"], encoding_format="float")
        coded = await api.embeddings.create(model="counting", input="a")
    assert [item.embedding for item in plain.data] == [[1.0, 0.0], [1.0, 0.0]]
    assert coded.data[0].embedding == [1.0, 0.0]
    assert plain.usage.prompt_tokens == 4
    raw = await gateway.http.post(
        "/v1/embeddings", json={"model": "counting", "input": "a", "encoding_format": "base64"}
    )
    assert base64.b64decode(raw.json()["data"][0]["embedding"]) == b"\x00\x00\x80\x3f\x00\x00\x00\x00"


async def test_models_are_listed_and_found(gateway: Rig) -> None:
    async with client(gateway) as api:
        assert [model.id async for model in api.models.list()] == ["counting"]
        assert (await api.models.retrieve("app/counting")).owned_by == "app"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await api.models.retrieve("nope")


async def test_sampling_settings_reach_the_model(gateway: Rig) -> None:
    async with client(gateway) as api:
        await api.chat.completions.create(
            model="counting",
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "x"}]}
            ],
            temperature=0.5,
            top_p=0.25,
            presence_penalty=-1,
            frequency_penalty=2,
            seed=-1,
            stop=["a", "b"],
            max_completion_tokens=7,
            extra_body={"top_k": 5, "ignore_eos": True},
        )
    request = asked(gateway)
    assert request.messages == ({"role": "system", "content": "be x"},)
    assert (request.temperature, request.top_p, request.top_k) == (0.5, 0.25, 5)
    assert (request.presence_penalty, request.frequency_penalty) == (-1.0, 2.0)
    assert request.seed == 2**63 - 1
    assert request.stop == ("a", "b")
    assert request.max_tokens == 7
    assert request.ignore_eos


async def test_without_a_seed_one_is_drawn(gateway: Rig) -> None:
    seeds = set()
    async with client(gateway) as api:
        for _ in range(3):
            await api.chat.completions.create(model="counting", messages=HELLO)
            seeds.add(asked(gateway).seed)
    assert len(seeds) == 3


async def test_the_clients_own_exception_classes_are_raised(gateway: Rig) -> None:
    async with client(gateway) as api, client(gateway, "viewer") as viewer, client(gateway, "wrong") as wrong:
        with pytest.raises(openai.NotFoundError) as missing:
            await api.chat.completions.create(model="countin", messages=HELLO)
        assert "counting" in str(missing.value), "the client shows the message alone"
        with pytest.raises(openai.BadRequestError) as bad:
            await api.chat.completions.create(model="counting", messages=HELLO, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.PermissionDeniedError):
            await viewer.chat.completions.create(model="counting", messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            await wrong.chat.completions.create(model="counting", messages=HELLO)


async def test_what_only_the_container_finds_wrong_is_a_400_for_streams_too(gateway: Rig) -> None:
    def too_long(invoker: FakeInvoker, running: Running) -> None:
        invoker.end(running, Type.FAILED, Failed(to_info(ContextTooLong("9 tokens; allowed: 8", param="messages"))))

    gateway.invoker.scripts["chat"], script = too_long, gateway.invoker.scripts["chat"]
    try:
        async with client(gateway) as api:
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await api.chat.completions.create(model="counting", messages=HELLO, stream=stream)
                assert caught.value.code == "context_length_exceeded"
    finally:
        gateway.invoker.scripts["chat"] = script


async def test_a_stream_that_breaks_ends_with_an_error_the_client_raises(gateway: Rig) -> None:
    def breaks(invoker: FakeInvoker, running: Running) -> None:
        invoker.output(running, llm.encode(llm.LlmOutput(0, (1,), "one")))
        invoker.output(running, b"\xc1 not an output")

    gateway.invoker.scripts["chat"], script = breaks, gateway.invoker.scripts["chat"]
    try:
        async with client(gateway) as api:
            with pytest.raises(openai.APIError, match="something else than text"):
                stream = await api.chat.completions.create(model="counting", messages=HELLO, stream=True)
                async for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError):
                await api.chat.completions.create(model="counting", messages=HELLO)
    finally:
        gateway.invoker.scripts["chat"] = script
    await gateway.settled()


async def test_a_lost_gateways_chat_goes_on_with_the_same_ids(gateway: Rig) -> None:
    identity = b"c" * 16
    begun = note.Note("chat", "chatcmpl-7", "counting", 123, "fp_1", True)
    invoke = Invoke("counting", "msgpack", True, context=note.pack(begun))
    lost = Running(b"", Header(Type.INVOKE, identity, 1, 8, credit=1024), invoke, b"", 1024)
    outputs = [llm.encode(llm.LlmOutput(0, (at,), text)) for at, text in enumerate(("a", "b", "c"))]
    gateway.invoker.orphans[identity] = (lost, outputs)
    answer = await gateway.http.get(f"/v1/invocations/inv-{identity.hex()}/events", headers={"Last-Event-ID": "0"})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == "bc"
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-7"}
    assert chunks[-1]["usage"]
    assert answer.text.endswith("data: [DONE]\n\n")


CHAT = {"model": "counting", "messages": HELLO}
TEXT = {"model": "counting", "prompt": "a"}


@pytest.mark.parametrize(
    ("base", "extra", "param"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"logit_bias": {"1": 2}}, "logit_bias"),
        (CHAT, {"store": True}, "store"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"modalities": ["audio"]}, "modalities"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"temprature": 1}, "temprature"),
        (CHAT, {"temperature": -0.1}, "temperature"),
        (CHAT, {"temperature": "1"}, "temperature"),
        (CHAT, {"top_p": 1.1}, "top_p"),
        (CHAT, {"top_k": -2}, "top_k"),
        (CHAT, {"presence_penalty": 2.1}, "presence_penalty"),
        (CHAT, {"frequency_penalty": -2.1}, "frequency_penalty"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"n": 1.5}, "n"),
        (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"stop": [""]}, "stop"),
        (CHAT, {"seed": 1.5}, "seed"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"include_use": True}}, "stream_options"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages"),
        (TEXT, {"suffix": "x"}, "suffix"),
        (TEXT, {"best_of": 2}, "best_of"),
        (TEXT, {"logprobs": 6}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, "prompt"),
        (TEXT, {"prompt": None}, "prompt"),
        (TEXT, {"messages": HELLO}, "messages"),
    ],
)
async def test_a_parameter_that_cannot_be_honoured_is_a_400_naming_it(
    gateway: Rig, base: dict[str, Any], extra: dict[str, Any], param: str
) -> None:
    path = "/v1/chat/completions" if base is CHAT else "/v1/completions"
    answer = await gateway.http.post(path, json={**base, **extra})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "tool_choice": "none", "tools": [], "logit_bias": {}, "n": 1},
        {"temperature": None, "top_p": None, "stop": None, "seed": None, "max_tokens": None, "stream": None},
        {"modalities": ["text"], "audio": None, "function_call": "auto", "top_k": -1},
    ],
)
async def test_parameters_that_change_nothing_are_accepted(gateway: Rig, extra: dict[str, Any]) -> None:
    answer = await gateway.http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a"}, "model"),
        ({"model": "counting"}, "input"),
        ({"model": "counting", "input": "a", "dimensions": 8}, "dimensions"),
        ({"model": "counting", "input": []}, "input"),
        ({"model": "counting", "input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"model": 3, "input": "a"}, "model"),
    ],
)
async def test_wrong_embedding_requests_name_the_parameter(gateway: Rig, body: dict[str, Any], param: str) -> None:
    answer = await gateway.http.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_prompt_is_never_repeated_in_an_error(gateway: Rig) -> None:
    for messages in (
        [{"role": "my secret plan", "content": "x"}],
        [{"role": "user", "content": {"my secret plan": 1}}],
    ):
        answer = await gateway.http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        assert answer.status_code == 400
        assert "secret" not in answer.text


async def test_the_parsers_are_pure() -> None:
    body = parse({"model": "m", "messages": HELLO}, ChatBody)
    assert parse_chat(body, lambda: 42).seed == 42
    assert parse_completion(parse({"model": "m", "prompt": "a", "n": 3}, CompletionBody), lambda: 1).n == 3
    with pytest.raises(UnsupportedParameter):
        parse({"model": "m", "input": "a", "dimensions": 1}, EmbeddingBody)
    with pytest.raises(BadRequest):
        many = parse({"model": "m", "prompt": ["a"] * 100, "n": 100}, CompletionBody)
        parse_completion(many, lambda: 1)
