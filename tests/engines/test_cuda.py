"""The same on a real GPU."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from sllm_invoker.checkpoints.mapping import map_slabs
from sllm_invoker.runner import cuda
from sllm_invoker.runner.arriving import arriving
from sllm_invoker.runner.attach import attach, prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling

pytestmark = pytest.mark.gpu
SIZE = 8 << 20


def test_bytes_copied_on_the_side_stream_arrive_and_computing_comes_after_them():
    device = cuda.open_stage().device
    host = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    assert device.register(host.data_ptr(), SIZE)
    try:
        target = device.allocate(SIZE)
        device.copy(target, host)
        device.record().hold()
        assert torch.equal(target.clone().cpu(), host)
    finally:
        device.unregister(host.data_ptr())


def test_slabs_mapped_shared_can_be_registered_read_only_and_a_refusal_breaks_nothing():
    device = cuda.open_stage().device
    fd = os.memfd_create("slab")
    os.truncate(fd, SIZE)
    os.pwrite(fd, b"\x07" * SIZE, 0)
    mapping = map_slabs([fd], SIZE, SIZE, shared=True)
    os.close(fd)
    locked = device.register(mapping.address, SIZE, read_only=True)
    target = device.allocate(SIZE)
    device.copy(target, torch.frombuffer(mapping.buffer, dtype=torch.uint8))
    device.record().hold()
    assert int(target.long().sum()) == 7 * SIZE
    if locked:
        device.unregister(mapping.address)
    assert not device.register(ctypes.addressof(ctypes.c_ubyte()) & ~(mmap.PAGESIZE - 1), 1 << 40)
    assert float(torch.ones(4, device=device.place).sum()) == 4.0


def test_logits_are_those_of_the_same_model_moved_there(case):
    expected = case("llama")
    skeleton = prepare(expected.checkpoint)
    skeleton.stage = cuda.open_stage()
    attach(skeleton)
    ids = torch.tensor([[3, 14, 15, 92, 65, 35]], device=skeleton.device)
    with torch.inference_mode():
        with arriving(skeleton.weights):
            ours = skeleton.model(ids).logits
        theirs = expected.model.to(skeleton.device)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    expected.model.to("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "mamba"])
async def test_an_engine_draws_greedily_what_it_draws_on_the_cpu(case, engine, name):
    requests = [GenerateRequest(tuple(range(3, 3 + 4 * n)), 8, Sampling(temperature=0)) for n in (1, 2, 3)]
    expected = [await _draw(engine(name), request) for request in requests]
    skeleton = prepare(case(name).checkpoint)
    skeleton.stage, skeleton.eos = cuda.open_stage(), frozenset()
    made = create(skeleton, max_sequences=4)
    made.attach(case(name).checkpoint.directory)
    try:
        sequences = [await made.prefill(request) for request in requests]
        streams = [made.activate(sequence) for sequence in sequences]
        found = [[output.token async for step in stream for output in step] for stream in streams]
        assert found == expected
    finally:
        made.close()


def test_warming_leaves_only_context_and_libraries_behind():
    cuda.warm()
    before = cuda.open_stage().device.memory().free
    cuda.warm()
    assert cuda.open_stage().device.memory().free >= before - (64 << 20)


async def _draw(made, request):
    sequence = await made.prefill(request)
    return [output.token async for step in made.activate(sequence) for output in step]
