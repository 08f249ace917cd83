"""Binding a checkpoint: exact, in place, complete."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
import torch
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.runner.attach import attach, end_tokens, model_tensors, prepare
from torch.profiler import ProfilerActivity, profile

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, CheckpointUnavailable

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])


def test_logits_are_bit_equal_to_from_pretrained_on_the_first_call_and_later(architecture, case):
    expected = case(architecture)
    skeleton = prepare(expected.checkpoint)
    attach(skeleton)
    with torch.inference_mode():
        for ids in (IDS, IDS[:, 2:7], IDS):
            assert torch.equal(skeleton.model(ids).logits, expected.model(ids).logits)


def test_the_last_position_alone_is_multiplied_with_the_head_as_it_is(case):
    """By mm: bmm first copies the whole head."""
    skeleton = prepare(case("llama").checkpoint)
    attach(skeleton)
    vocabulary, width = skeleton.model.lm_head.weight.shape
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        skeleton.model(IDS, logits_to_keep=1)
    events = profiled.events()
    products = {event.name for event in events if [width, vocabulary] in [shape[-2:] for shape in event.input_shapes]}
    assert "aten::mm" in products
    assert "aten::bmm" not in products


def test_a_side_file_that_changed_is_refused_before_anything_is_built_of_it(case, tmp_path):
    directory = tmp_path / "object"
    shutil.copytree(case("llama").checkpoint.directory, directory)
    path = directory / "config.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0.02", "0.03"))
    with pytest.raises(CheckpointCorrupt, match=r"config\.json: its content has changed"):
        prepare(directory)


def test_every_tensor_is_a_view_of_the_map(architecture, case):
    skeleton = prepare(case(architecture).checkpoint)
    report = attach(skeleton)
    assert skeleton.weights is not None
    start = ctypes.addressof(ctypes.c_char.from_buffer(skeleton.weights.buffer))
    mapped = range(start, start + len(skeleton.weights.buffer))
    tensors = list(model_tensors(skeleton.model))
    assert all(tensor.data_ptr() in mapped for _, _, tensor in tensors if tensor.numel())
    assert report.bytes == len(mapped)


def test_tied_weights_are_one_parameter(case):
    skeleton = prepare(case("llama-tied").checkpoint)
    attach(skeleton)
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight


def test_a_write_to_the_map_stays_in_this_process(case):
    """Copy-on-write: two attaches of one object do not see each other's writes."""
    one, other = prepare(case("llama").checkpoint), prepare(case("llama").checkpoint)
    attach(one)
    attach(other)
    before = other.model.model.norm.weight.clone()
    with torch.no_grad():
        one.model.model.norm.weight.add_(1.0)
    assert torch.equal(other.model.model.norm.weight, before)


def test_the_skeleton_is_on_meta_until_attached_and_in_eval_mode_after(case):
    skeleton = prepare(case("llama").checkpoint)
    assert all(tensor.is_meta for _, _, tensor in model_tensors(skeleton.model))
    attach(skeleton)
    assert not skeleton.model.training


def _without(checkpoint: CheckpointObject, drop: Callable[[str], bool]) -> CheckpointObject:
    part = checkpoint.manifest.parts[0]
    kept = tuple(tensor for tensor in part.tensors if not drop(tensor.name))
    manifest = dataclasses.replace(checkpoint.manifest, parts=(dataclasses.replace(part, tensors=kept),))
    return CheckpointObject(checkpoint.directory, manifest)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.rotary_emb.inv_freq"])
def test_a_tensor_that_stays_on_meta_is_named(case, missing):
    """A parameter, and a buffer that no source file has."""
    with pytest.raises(CheckpointIncomplete, match=missing):
        prepare(_without(case("llama").checkpoint, lambda name: name == missing))


def test_an_object_that_shrank_after_prepare_is_corrupt_and_not_a_crash(case, tmp_path):
    directory = shutil.copytree(case("llama").checkpoint.directory, tmp_path / "object")
    skeleton = prepare(directory)
    path = skeleton.checkpoint.part_path()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointCorrupt, match="5000 bytes"):
        attach(skeleton)


def test_an_object_that_has_gone_since_prepare_is_unavailable(case, tmp_path):
    directory = shutil.copytree(case("llama").checkpoint.directory, tmp_path / "object")
    skeleton = prepare(directory)
    shutil.rmtree(directory)
    with pytest.raises(CheckpointUnavailable):
        attach(skeleton)


def test_a_copy_of_the_object_elsewhere_can_be_attached(case, tmp_path):
    directory = shutil.copytree(case("llama").checkpoint.directory, tmp_path / "object")
    skeleton = prepare(case("llama").checkpoint)
    attach(skeleton, directory)
    assert skeleton.checkpoint.directory == directory


def test_a_skeleton_of_another_model_is_refused(case):
    skeleton = prepare(case("llama").checkpoint)
    with pytest.raises(BadSpec, match="the skeleton is of"):
        attach(skeleton, case("gpt2").checkpoint.directory)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 9}, {3, 4}),
        ({"eos_token_id": 3}, {}, {3}),
        ({}, {"eos_token_id": 9}, {9}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_bytes(msgspec.json.encode(generation))
    assert end_tokens(tmp_path) == expected


def test_end_tokens_that_are_not_ids_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointCorrupt, match="neither an id nor a list"):
        end_tokens(tmp_path)


_FORKING = """
import asyncio, gc, os, sys
from pathlib import Path
from sllm_invoker.runner.attach import prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling

directory = Path(sys.argv[1])
skeleton = prepare(directory)
gc.freeze()

async def main():
    import torch
    torch.set_num_threads(2)
    engine = create(skeleton, max_sequences=2)
    engine.attach(directory)
    sequence = await engine.prefill(GenerateRequest((3, 14, 15), 6, Sampling(temperature=0)))
    tokens = [output.token async for step in engine.activate(sequence) for output in step]
    engine.close()
    print(tokens, flush=True)

for _ in range(2):
    if (child := os.fork()) == 0:
        asyncio.run(main())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.e2e
def test_a_skeleton_made_before_a_fork_is_attached_by_each_child(case):
    """As containers do it: the template prepares on one thread, its children attach and compute on several."""
    expected = case("llama").model.generate(torch.tensor([[3, 14, 15]]), max_new_tokens=6, do_sample=False)
    done = subprocess.run(
        [sys.executable, "-c", _FORKING, str(case("llama").checkpoint.directory)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [str(expected[0, 3:].tolist())] * 2
