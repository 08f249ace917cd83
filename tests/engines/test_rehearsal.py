"""A process that waits to become an instance computes a small model of the same kind, and nothing of it remains."""

from __future__ import annotations

import torch
from sllm_invoker.runner import rehearsal
from sllm_invoker.runner.attach import attach, model_tensors, prepare

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])


def test_every_architecture_is_rehearsed_and_computes_the_same_afterwards(architecture, case):
    expected = case(architecture)
    skeleton = prepare(expected.checkpoint)
    before = {name: tensor.device for name, _, tensor in model_tensors(skeleton.model)}
    layers = skeleton.model.config.get_text_config().num_hidden_layers
    rehearsal.run(skeleton, rehearsal.small(skeleton))
    assert before == {name: tensor.device for name, _, tensor in model_tensors(skeleton.model)}
    assert skeleton.model.config.get_text_config().num_hidden_layers == layers
    attach(skeleton)
    with torch.inference_mode():
        assert torch.equal(skeleton.model(IDS).logits, expected.model(IDS).logits)


def test_the_small_model_has_the_shapes_of_a_layer_and_no_weights_but_zeros(case):
    skeleton = prepare(case("llama").checkpoint)
    small = dict(rehearsal.small(skeleton).named_parameters())
    whole = dict(skeleton.model.named_parameters())
    layer = "model.layers.0.mlp.up_proj.weight"
    assert small[layer].shape == whole[layer].shape
    assert not any("layers.1." in name for name in small)
    assert not any(tensor.any() for tensor in small.values())
