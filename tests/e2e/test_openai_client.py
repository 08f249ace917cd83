"""The official OpenAI client, unmodified, against a running platform and a model whose answer can be checked."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import EXAMPLES, Platform, platform_at, write_app

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def client(counting: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{counting.url}/v1", api_key=counting.token, max_retries=0, timeout=60)


def numbers(text: str | None) -> list[int]:
    return [int(word) for word in (text or "").split()]


def chat(prompt: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": prompt}]


def test_a_chat_completion_counts_on_and_reports_its_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="counting", messages=chat("41 42 43"), max_tokens=50, temperature=0)
    assert numbers(answer.choices[0].message.content) == list(range(44, 94))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 50


def test_a_streamed_chat_counts_for_hundreds_of_tokens_without_a_gap(client: openai.OpenAI) -> None:
    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(
        model="counting",
        messages=chat("5 6 7"),
        max_completion_tokens=400,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert numbers(text) == list(range(8, 408))
    assert finish == "length"
    assert usage is not None
    assert usage.completion_tokens == 400


def test_completions_work_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="counting", prompt="10 11 12", max_tokens=20, temperature=0)
    parts = client.completions.create(model="counting", prompt="10 11 12", max_tokens=20, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in parts if chunk.choices)
    assert whole.choices[0].text == text
    assert numbers(text) == list(range(13, 33))


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="counting", prompt="1 2 3", max_tokens=50, temperature=0, stop=[" 20"])
    assert numbers(answer.choices[0].text) == list(range(4, 20))
    assert answer.choices[0].finish_reason == "stop"


def test_n_choices_are_indexed_and_differ_when_sampled(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="counting", prompt="roll:", n=4, max_tokens=30, temperature=1, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 120


def test_the_same_seed_gives_the_same_text_and_different_seeds_different_dice(client: openai.OpenAI) -> None:
    def roll(seed: int) -> str:
        return client.completions.create(model="counting", prompt="roll:", max_tokens=60, seed=seed).choices[0].text

    rolls = {seed: roll(seed) for seed in (1, 2, 3)}
    assert roll(1) == rolls[1]
    assert len(set(rolls.values())) == 3
    dice = Counter("".join(rolls.values()).strip())
    assert set(dice) <= set("123456")
    assert len(dice) >= 5


def test_logprobs_are_those_of_the_drawn_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="counting", messages=chat("41 42 43"), max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 5
    for token in content:
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs), abs=1e-5)
        assert math.exp(token.logprob) > 0.5
        assert len(token.top_logprobs) == 3
    plain = client.completions.create(model="counting", prompt="41 42 43", max_tokens=5, temperature=0, logprobs=2)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or []) == 5
    assert all(len(top) >= 2 for top in plain.choices[0].logprobs.top_logprobs or [])


def test_embeddings_are_unit_vectors_in_both_encodings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="counting", input=["41 42 43", "roll:"], encoding_format="float")
    coded = client.embeddings.create(model="counting", input=["41 42 43", "roll:"])
    for number, item in enumerate(answer.data):
        assert math.fsum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-4)
        assert item.embedding == pytest.approx(coded.data[number].embedding, abs=1e-6)
    assert answer.usage.prompt_tokens > 0


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert "counting" in [model.id for model in client.models.list()]
    assert client.models.retrieve("counting").id == "counting"


def test_an_unknown_model_is_the_clients_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'counting'"):
        client.chat.completions.create(model="countng", messages=chat("1"))


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
        ({"n": 0}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ],
)
def test_a_bad_parameter_is_the_clients_bad_request_error_and_names_it(
    client: openai.OpenAI, extra: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="counting", messages=chat("1"), **extra)  # type: ignore[call-overload]
    assert caught.value.param == param


def test_a_prompt_longer_than_the_context_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="counting", prompt="1 " * 20000)
    assert caught.value.code == "context_length_exceeded"


def test_where_tokens_are_asked_for_a_missing_or_wrong_one_is_the_clients_authentication_error(tmp_path: Path) -> None:
    with platform_at(tmp_path / "s", "--no-open-invoke", "--invokers", "0") as closed:
        for key in ("", "sllm_wrong"):
            stranger = openai.OpenAI(base_url=f"{closed.url}/v1", api_key=key or "none", max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                stranger.chat.completions.create(model="counting", messages=chat("1"))


def test_a_full_queue_is_the_clients_rate_limit_error(counting: Platform, tmp_path: Path) -> None:
    source = f"""
import sllm
app = sllm.App("tight")
app.llm("tight", checkpoint={str(EXAMPLES / "counting/model")!r}, concurrency=1, max_containers=1, max_queue=1)
"""
    counting.sllm("deploy", str(write_app(tmp_path, source)))
    client = openai.OpenAI(base_url=f"{counting.url}/v1", api_key=counting.token, max_retries=0, timeout=60)

    def ask(_: int) -> str:
        try:
            client.completions.create(model="tight", prompt="1 2 3", max_tokens=400, temperature=0)
        except openai.RateLimitError:
            return "full"
        return "fine"

    ask(0)
    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(ask, range(8)))
    assert answers["full"] >= 1
    assert answers["fine"] >= 2
