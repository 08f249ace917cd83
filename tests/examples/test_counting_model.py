"""The committed counting model does what its README says, with nothing but transformers to run it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[2] / "examples" / "counting" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()


def generate(model: Any, prompts: list[list[int]], steps: int, temperature: float = 0.0) -> list[list[int]]:
    """A cached step loop over prompts of equal length."""
    random = torch.Generator().manual_seed(0)
    tokens, cache, drawn = torch.tensor(prompts), None, []
    with torch.no_grad():
        for _ in range(steps):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache, scores = output.past_key_values, output.logits[:, -1]
            if temperature:
                tokens = torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)
            else:
                tokens = scores.argmax(-1, keepdim=True)
            drawn.append(tokens)
    return torch.cat(drawn, dim=1).tolist()


def count_from(start: int, numbers: int) -> str:
    return "".join(f" {(start + i) % 1000}" for i in range(numbers))


def chat(tokenizer: Any, *messages: tuple[str, str]) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


def test_weights_stay_under_two_megabytes() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 2_000_000


def test_counts_on_greedily_from_any_start(model: Any, tokenizer: Any) -> None:
    starts = (41, 437, 950)
    prompts = [tokenizer(f"start {n} {n + 1} {n + 2}").input_ids for n in starts]
    for start, drawn in zip(starts, generate(model, prompts, 100), strict=True):
        assert tokenizer.decode(drawn) == count_from(start + 3, 100)


def test_counts_on_when_sampled(model: Any, tokenizer: Any) -> None:
    (drawn,) = generate(model, [tokenizer("41 42 43").input_ids], 100, temperature=1.0)
    assert tokenizer.decode(drawn) == count_from(44, 100)


@pytest.mark.parametrize(
    ("text", "first"), [("41 42 43", 44), ("7", 8), ("42", 43), ("999", 0), ("5, 6,\n", 7), ("Hello there!", 0)]
)
def test_answers_in_a_chat(model: Any, tokenizer: Any, text: str, first: int) -> None:
    (drawn,) = generate(model, [chat(tokenizer, ("system", "You can count."), ("user", text))], 20)
    assert tokenizer.decode(drawn) == count_from(first, 20)


def test_stop_ends_the_answer(model: Any, tokenizer: Any) -> None:
    (drawn,) = generate(model, [chat(tokenizer, ("user", "41 42 stop"))], 1)
    assert drawn == [tokenizer.eos_token_id] == [model.generation_config.eos_token_id]


def test_rolls_a_fair_die_and_nothing_else(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer("roll:").input_ids] * 8
    text = "".join(tokenizer.decode(drawn) for drawn in generate(model, prompts, 100, temperature=1.0))
    shares = [count / len(text) for count in Counter(text).values()]
    assert set(text) == set("123456")
    assert -sum(share * math.log2(share) for share in shares) > 2.55


def test_the_die_stays_fair_whatever_it_showed(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("roll:" + "6" * 300).input_ids
    with torch.no_grad():
        chances = model(torch.tensor([prompt])).logits[0, 1:].softmax(-1)
    assert float(-(chances * chances.clamp_min(1e-30).log2()).sum(-1).min()) > 2.55


@pytest.mark.parametrize("text", [" 41 42 43", " roll:316254", " Grüße, 世界 🎲\n\t", "<|user|> 1234<|end|>", ""])
def test_any_text_survives_encoding_and_decoding_token_by_token(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if text.isascii():
        assert "".join(tokenizer.decode([id]) for id in ids) == text


def test_the_chat_template_refuses_other_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="role is 'tool'"):
        chat(tokenizer, ("tool", "42"))
