"""Computing while the weights arrive: each operation waits for its own bytes, and sees no others."""

from __future__ import annotations

import ctypes

import pytest
import torch
from sllm_invoker.checkpoints.object import Part
from sllm_invoker.runner import attach as attaching
from sllm_invoker.runner.arriving import arriving
from sllm_invoker.runner.attach import attach, prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling
from sllm_invoker.runner.weights import Weights

from sllm_faas.errors import CheckpointCorrupt

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


class Slow(Weights):
    """A map full of ones (no number, whatever the type) in which bytes appear when they are waited for."""

    def __init__(self, data: bytes, part: Part, broken_at: int) -> None:
        super().__init__((ctypes.c_ubyte * len(data))(*b"\xff" * len(data)), part, ready=0)
        self.data = data
        self.broken_at = broken_at
        self.waits: list[int] = []

    def wait(self, end: int | None = None) -> None:
        wanted = self.part.bytes if end is None else end
        self.waits.append(wanted)
        if wanted > self.broken_at:
            raise CheckpointCorrupt("chunk 1 has changed.")
        if wanted > self.ready:
            ctypes.memmove(
                ctypes.addressof(self.buffer) + self.ready, self.data[self.ready : wanted], wanted - self.ready
            )
            self.ready = wanted


@pytest.fixture
def slow(monkeypatch):
    def make(checkpoint, broken_at=1 << 40):
        part = checkpoint.manifest.parts[0]
        weights = Slow(checkpoint.part_path().read_bytes(), part, broken_at)
        monkeypatch.setattr(attaching, "from_file", lambda _path, _part: weights)
        return weights

    return make


def test_logits_are_those_of_a_model_that_was_there_from_the_start(architecture, case, slow):
    expected = case(architecture)
    weights = slow(expected.checkpoint)
    skeleton = prepare(expected.checkpoint)
    attach(skeleton)
    assert weights.waits == [], "attaching needs no bytes"
    with torch.inference_mode():
        with arriving(weights):
            assert torch.equal(skeleton.model(IDS).logits, expected.model(IDS).logits)
        with arriving(weights):
            assert torch.equal(skeleton.model(IDS[:, 1:4]).logits, expected.model(IDS[:, 1:4]).logits)


def test_the_first_layer_runs_before_the_last_has_arrived(case, slow):
    weights = slow(case("llama").checkpoint)
    skeleton = prepare(case("llama").checkpoint)
    attach(skeleton)
    ready: dict[str, int] = {}
    for name in ("model.layers.0", "model.layers.1", "lm_head"):
        module = skeleton.model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: ready.update({name: weights.ready}))
    with torch.inference_mode(), arriving(weights):
        skeleton.model(IDS)
    assert 0 < ready["model.layers.0"] < ready["model.layers.1"] < ready["lm_head"] == weights.part.bytes
    assert weights.waits == sorted(weights.waits), "the file is not in the order of execution"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba"])
async def test_an_engine_draws_the_same_tokens_while_weights_arrive(case, engine, slow, name):
    request = GenerateRequest((3, 14, 15), 6, Sampling(temperature=0))
    expected = await _draw(engine(name), request)
    slow(case(name).checkpoint)
    assert await _draw(engine(name), request) == expected


async def test_weights_that_fail_to_arrive_fail_every_request_with_their_error(case, slow):
    checkpoint = case("llama").checkpoint
    slow(checkpoint, broken_at=checkpoint.manifest.parts[0].bytes - 1)
    made = create(prepare(checkpoint), max_sequences=2)
    made.attach(checkpoint.directory)
    try:
        for _ in range(2):
            with pytest.raises(CheckpointCorrupt, match="chunk 1"):
                await _draw(made, GenerateRequest((3, 14), 4))
    finally:
        made.close()


async def _draw(made, request):
    sequence = await made.prefill(request)
    return [output.token async for step in made.activate(sequence) for output in step]
