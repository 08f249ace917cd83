"""Quantised checkpoints: transformers' own kernels over weights that were mapped, not copied."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.runner.attach import attach, prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling

from sllm_faas.errors import BadSpec

pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])
SETTINGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Wide enough for a block of 64 weights in a row."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    directory: Path = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=list(SETTINGS))
def quantised(request, plain, store, tmp_path_factory):
    """The model as transformers loads it from its quantised directory, and the object made of that."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    settings = transformers.BitsAndBytesConfig(**SETTINGS[request.param])
    made = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    made.save_pretrained(directory)
    ingest(store, str(directory), request.param)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval(), store.get(request.param)


def test_logits_are_bit_equal_to_transformers_with_the_same_kernels(quantised):
    model, checkpoint = quantised
    skeleton = prepare(checkpoint)
    attach(skeleton)
    with torch.inference_mode():
        for ids in (IDS, IDS[:, 2:7], IDS):
            assert torch.equal(skeleton.model(ids).logits, model(ids).logits)


def test_the_manifest_tells_the_method_and_the_weights_are_small(quantised):
    model, checkpoint = quantised
    manifest = checkpoint.manifest
    assert manifest.quantization == "bitsandbytes"
    assert manifest.parameters == model.num_parameters()
    widths = {entry.dtype for entry in manifest.parts[0].tensors if entry.name.endswith("q_proj.weight")}
    assert widths <= {"I8", "U8"}


def test_quantised_weights_are_views_of_the_map_with_their_scales(quantised):
    skeleton = prepare(quantised[1])
    attach(skeleton)
    start = ctypes.addressof(ctypes.c_char.from_buffer(skeleton.weights.buffer))
    mapped = range(start, start + len(skeleton.weights.buffer))
    weight = skeleton.model.model.layers[0].self_attn.q_proj.weight
    scales = weight.SCB if weight.dtype == torch.int8 else weight.quant_state.absmax
    assert weight.data_ptr() in mapped
    assert quantised[1].manifest.layout.dtype == "float32"
    assert scales.data_ptr() in mapped


async def test_the_engine_generates_what_transformers_generates(quantised):
    model, checkpoint = quantised
    engine = create(prepare(checkpoint))
    engine.attach(checkpoint.directory)
    try:
        prompt = tuple(IDS[0].tolist())
        sequence = await engine.prefill(GenerateRequest(prompt, 8, Sampling(temperature=0), ignore_eos=True))
        drawn = [output.token async for outputs in engine.activate(sequence) for output in outputs]
        assert drawn == model.generate(IDS, max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    finally:
        engine.close()


def test_another_dtype_cannot_be_asked_of_a_quantised_model(quantised, store):
    with pytest.raises(BadSpec, match="quantised; dtype"):
        ingest(store, quantised[1].manifest.source.name, "other", dtype="bfloat16")


def test_a_method_that_is_not_supported_is_named(plain, store, tmp_path):
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadSpec, match="gptq, which is not supported; supported: bitsandbytes"):
        ingest(store, str(tmp_path), "gptq")


def test_without_the_library_the_extra_is_named(quantised, store, monkeypatch):
    found: Callable[[str], object] = lambda name: None if name == "bitsandbytes" else object()  # noqa: E731
    monkeypatch.setattr("sllm_invoker.runner.quantized.importlib.util.find_spec", found)
    with pytest.raises(BadSpec, match="needs bitsandbytes") as caught:
        prepare(quantised[1])
    assert "sllm-faas[quantized]" in caught.value.hint
