"""The same on a real GPU."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import socket
import subprocess
import sys
import time

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


MAKER = """
import os, signal, socket, sys, torch
from sllm_invoker.runner import cuda
device = cuda.open_stage().device
shared = device.share(int(sys.argv[2]))
device.copy(shared.memory, torch.full((int(sys.argv[2]),), 7, dtype=torch.uint8))
device.record().wait()
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"there"], [shared.descriptor])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_memory_outlives_the_process_that_made_it_and_is_free_after_the_last_view_and_descriptor():
    device = cuda.open_stage().device
    if (tried := device.share(SIZE)) is None:
        pytest.skip("the driver has no memory that processes share, or cuda.bindings is missing")
    os.close(tried.descriptor)
    del tried
    size = 256 << 20
    gc.collect()
    device.trim()
    before = device.memory().free
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-c", MAKER, str(theirs.fileno()), str(size - 3)]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], check=False).returncode == -signal.SIGKILL
        _, (descriptor,), _, _ = socket.recv_fds(ours, 100, 1)
    assert freed(device, before - size - (64 << 20)), "the context of the process that made it was not freed"
    assert device.memory().free < before - size // 2, "what it made went with it"
    memory = device.open(descriptor, size - 3)
    again = device.open(descriptor, size - 3)
    os.close(descriptor)
    assert int(memory.long().sum()) == 7 * (size - 3)
    del memory
    assert int(again[-1]) == 7
    del again
    device.trim()
    assert freed(device, before - (64 << 20))


def freed(device, bytes_free):
    """Whether so much is free within moments: the driver may take its time after the end of a process."""
    until = time.monotonic() + 5.0
    while device.memory().free < bytes_free:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_copies_into_shared_memory_and_computing_on_it_are_as_on_other():
    device = cuda.open_stage().device
    if (shared := device.share(SIZE)) is None:
        pytest.skip("the driver has no memory that processes share, or cuda.bindings is missing")
    os.close(shared.descriptor)
    host = torch.randn(SIZE // 4096, 1024)
    device.copy(shared.memory, host.view(torch.uint8).flatten())
    device.record().hold()
    weight = shared.memory.view(torch.float32).view(-1, 1024)
    expected = host.to(device.place)
    assert torch.equal(weight @ expected.T, expected @ expected.T)


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
