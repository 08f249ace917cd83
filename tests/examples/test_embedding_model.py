"""The committed embedding model: near numbers, near vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[2] / "examples" / "embedding" / "model"


@pytest.fixture(scope="module")
def embed() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()

    def embed(text: str) -> Any:
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].mean(0), dim=-1)

    return embed


def test_similarity_falls_with_the_distance_of_the_numbers(embed: Any) -> None:
    for start in (42, 437, 810):
        near = [float(embed(str(start)) @ embed(str(start + d))) for d in (0, 10, 30, 100)]
        assert near == sorted(near, reverse=True)
        assert near[1] == pytest.approx(math.exp(-0.1), abs=0.1)


def test_the_nearest_of_all_numbers_is_a_neighbour(embed: Any) -> None:
    numbers = list(range(0, 1000, 7))
    vectors = torch.stack([embed(str(number)) for number in numbers])
    likeness = vectors @ vectors.T
    likeness.fill_diagonal_(-1)
    assert all(abs(row - int(nearest)) == 1 for row, nearest in enumerate(likeness.argmax(1)))


def test_a_text_lies_at_the_mean_of_its_numbers(embed: Any) -> None:
    text = embed("40 44")
    assert float(text @ embed("42")) > float(text @ embed("60")) > float(text @ embed("200"))


def test_words_lie_far_from_numbers_and_near_each_other(embed: Any) -> None:
    assert abs(float(embed("the red cat") @ embed("42"))) < 0.15
    assert float(embed("the red cat") @ embed("hello there")) > 0.9
