"""What a few passes tell about a model, and that its first layers tell the same."""

from __future__ import annotations

import pytest
import torch
import transformers
from sllm_invoker.runner.attach import tensor_places
from sllm_invoker.runner.engines.rows import supports_rows
from sllm_invoker.runner.traits import first_layers, probe

from tests.engines.conftest import ARCHITECTURES, build

DEEP = 8
LAYERS = {"gemma3_text": 6}
"""Up to the first of each kind; otherwise two."""


@pytest.fixture(scope="module")
def deep():
    """Models of many layers."""
    made = {}

    def get(name):
        if name not in made:
            its_own = {"n_layer": DEEP} if "n_layer" in ARCHITECTURES[name] else {}
            made[name] = build(name, num_hidden_layers=DEEP, **its_own)
        return made[name]

    return get


def test_the_first_layers_are_a_model_of_the_same_tensors(deep, architecture):
    whole = deep(architecture)
    first = first_layers(whole)
    held = {name: tensor for name, _, tensor, _ in tensor_places(whole)}
    found = {name: tensor for name, _, tensor, _ in tensor_places(first)}
    assert first.config.num_hidden_layers == LAYERS.get(architecture, 2)
    assert whole.config.num_hidden_layers == DEEP
    assert len(found) < len(held)
    assert all(held[name] is tensor for name, tensor in found.items())
    with torch.inference_mode():
        assert first(torch.tensor([[5, 9, 3]])).logits.isfinite().all()


def test_they_tell_whether_the_row_cache_is_exact(deep, architecture):
    whole = deep(architecture)
    assert supports_rows(first_layers(whole)) == supports_rows(whole) == (architecture not in {"bloom", "mamba"})


def test_a_model_with_no_more_layers_than_that_is_asked_itself():
    model = build("llama")
    assert first_layers(model) is model


def test_a_model_whose_first_layers_are_shaped_otherwise_is_asked_itself(deep, monkeypatch):
    model = deep("llama")
    parameter = model.model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(parameter, "data", parameter.data[:-1])
    assert first_layers(model) is model


def test_a_token_costs_the_keys_and_values_of_every_layer(deep):
    model = deep("llama")
    traits = probe(model)
    config = model.config
    assert traits.kv_bytes_per_token == 2 * DEEP * config.num_key_value_heads * config.head_dim * 4
    assert (traits.vocabulary, traits.generates, traits.batched) == (config.vocab_size, True, True)


def test_a_window_shorter_than_the_prompt_does_not_make_a_token_cheaper(deep):
    wide = build("mistral", num_hidden_layers=DEEP, sliding_window=None)
    assert probe(deep("mistral")).kv_bytes_per_token == probe(wide).kv_bytes_per_token > 0


def test_modules_are_in_the_order_in_which_they_ran(deep):
    order = probe(deep("llama")).order
    names = ["model.embed_tokens", *(f"model.layers.{number}.self_attn.q_proj" for number in range(DEEP)), "lm_head"]
    assert sorted(names, key=lambda name: order[name]) == names


def test_what_has_no_cache_that_grows_costs_nothing_and_tells_its_width(deep):
    traits = probe(deep("mamba"))
    assert (traits.kv_bytes_per_token, traits.vocabulary, traits.batched) == (0, deep("mamba").config.vocab_size, False)


def test_a_model_that_generates_nothing_is_known_as_one():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    traits = probe(transformers.BertModel(config).eval())
    assert (traits.generates, traits.batched, traits.kv_bytes_per_token, traits.vocabulary) == (False, False, 0, 40)
