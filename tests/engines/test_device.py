"""Weights on a device: the bytes are right whenever the copies happen, and computing waits for its own group alone."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.checkpoints.mapping import map_slabs
from sllm_invoker.checkpoints.object import ByteRange, Part
from sllm_invoker.checkpoints.slabs import SlabPool
from sllm_invoker.runner import attach as attaching
from sllm_invoker.runner import cuda, template
from sllm_invoker.runner.arriving import arriving
from sllm_invoker.runner.attach import attach, prepare
from sllm_invoker.runner.device_weights import DeviceWeights, Stage, grouped
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling
from sllm_invoker.runner.engines.rows import _reserve
from sllm_invoker.runner.llm import device_cache, device_room, open_model
from sllm_invoker.runner.weights import Weights, from_file

from sllm_faas.errors import BadSpec, CheckpointCorrupt, NoCapacity, PlatformError, Unavailable
from sllm_faas.spec import CheckpointSpec, FunctionSpec

from .fake_device import FakeDevice

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
PIECE = 1000  # odd on purpose: tensors and groups end within pieces


class Gated(Weights):
    """A file whose bytes may be read up to `until`."""

    def __init__(self, checkpoint, until=0, broken_at=1 << 40):
        part = checkpoint.manifest.parts[0]
        super().__init__(from_file(checkpoint.part_path(), part).buffer, part, ready=0)
        self.until, self.broken_at = until, broken_at
        self._moved = threading.Condition()

    def open(self, until):
        with self._moved:
            self.until = until
            self._moved.notify_all()

    def wait(self, end=None):
        wanted = self.part.bytes if end is None else end
        if wanted > self.broken_at:
            raise CheckpointCorrupt("chunk 1 has changed.")
        with self._moved:
            assert self._moved.wait_for(lambda: self.until >= wanted, timeout=30), f"{wanted} bytes never came"
        self.tier = "dram"


@pytest.fixture
def staged(case, monkeypatch):
    """A skeleton before a fake device, groups as small as the layers are."""

    def make(name, device=None, weights=None, buffers=2):
        device = device or FakeDevice()
        if weights is not None:
            monkeypatch.setattr(attaching, "from_file", lambda _path, _part: weights)
        skeleton = prepare(case(name).checkpoint)
        skeleton.stage = Stage(device, pieces=buffers, piece=PIECE, group=1)
        return skeleton, device

    return make


def test_logits_are_those_of_the_model_in_host_memory(architecture, case, staged):
    expected = case(architecture)
    skeleton, _ = staged(architecture)
    attach(skeleton)
    with torch.inference_mode(), arriving(skeleton.weights):
        assert torch.equal(skeleton.model(IDS).logits, expected.model(IDS).logits)
    weights = skeleton.weights
    assert len(weights.groups) > 1
    unchanged(weights, expected.checkpoint)
    for name, tensor in skeleton.model.named_parameters():
        at = tensor.untyped_storage().data_ptr()
        assert any(at == group.memory.data_ptr() for group in weights.groups), f"{name} is not on the device"


def test_the_first_layer_runs_before_the_last_was_read(case, staged):
    checkpoint = case("llama").checkpoint
    part = checkpoint.manifest.parts[0]
    first = next(layer for layer in part.layers if layer.name == "model.layers.0")
    weights = Gated(checkpoint, until=part.data_start + first.end)
    skeleton, device = staged("llama", weights=weights)
    attach(skeleton)
    read = []

    def ran(*_):
        read.append(weights.until)
        weights.open(1 << 40)

    skeleton.model.get_submodule("model.layers.0").register_forward_hook(ran)
    with torch.inference_mode(), arriving(skeleton.weights):
        logits = skeleton.model(IDS).logits
    assert torch.equal(logits, case("llama").model(IDS).logits)
    assert read == [part.data_start + first.end] and device.held
    assert device.held == sorted(device.held), "groups are not in the order of execution"


def unchanged(weights, checkpoint):
    """Computing wrote nothing to them: the next instance may start from the same memory."""
    weights.wait()
    data = checkpoint.part_path().read_bytes()
    for group in weights.groups:
        assert group.memory.numpy().tobytes() == data[group.start : group.end]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
async def test_an_engine_draws_the_same_tokens_through_a_device(case, engine, staged, name):
    request = GenerateRequest((3, 14, 15), 6, Sampling(temperature=0))
    expected = await _draw(engine(name), request)
    skeleton, _ = staged(name)
    skeleton.eos = frozenset()
    made = create(skeleton, max_sequences=2)
    made.attach(case(name).checkpoint.directory)
    try:
        assert await _draw(made, request) == expected
        unchanged(skeleton.weights, case(name).checkpoint)
    finally:
        made.close()


async def test_a_function_with_a_gpu_is_on_its_way_there_while_the_skeleton_is_built(case, engine, monkeypatch):
    checkpoint, device = case("llama").checkpoint, FakeDevice()
    request = GenerateRequest((3, 14, 15), 6, Sampling(temperature=0), ignore_eos=True)
    expected = await _draw(engine("llama"), request)
    asked = []
    prepare = attaching.prepare
    monkeypatch.setattr(attaching, "prepare", lambda *args: asked.append(list(device.calls)) or prepare(*args))
    monkeypatch.setattr(cuda, "open_stage", lambda: Stage(device, piece=PIECE, group=1))
    spec = FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("anything"), gpus=1, concurrency=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = open_model(spec, str(checkpoint.directory))
        assert torch.get_num_threads() == 1, "a small model runs on one thread"
    finally:
        torch.set_num_threads(threads)
    assert asked[0][0][0] == "allocate"
    try:
        assert await _draw(model._engine, request) == expected
    finally:
        model.close()


def test_a_skeleton_made_where_nothing_is_forked_leaves_the_threads_as_they_were(case):
    spec = FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("anything"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        template.take_skeleton(spec, str(case("llama").checkpoint.directory))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_warming_runs_a_tiny_model_where_the_device_is(monkeypatch):
    ran = []
    monkeypatch.setattr(cuda, "open_stage", lambda: Stage(FakeDevice(), piece=PIECE))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", _noting(ran))
    cuda.warm()
    assert [tuple(ids.shape) for ids in ran] == [(1, 16), (1, 1)]


def _noting(ran, forward=transformers.LlamaForCausalLM.forward):
    def noted(self, ids, *args, **kwargs):
        ran.append(ids)
        return forward(self, ids, *args, **kwargs)

    return noted


def test_a_sealed_slab_is_mapped_shared_for_reading_and_not_for_writing():
    pool = SlabPool(1, slab_bytes=1 << 16)
    try:
        slab = pool.create()
        pool.seal(slab.number)
        slab.view[:4] = b"slab"
        mapping = map_slabs([slab.fd], 1 << 16, 1 << 16, shared=True)
        slab.view[:4] = b"late"
        assert bytes(mapping.buffer[:4]) == b"late"
        mapping.unmap()
        with pytest.raises(PermissionError):
            mmap.mmap(slab.fd, 1 << 16)
    finally:
        pool.close()


def test_once_everything_is_there_nothing_waits_any_more(case, staged):
    skeleton, device = staged("llama")
    attach(skeleton)
    weights = skeleton.weights
    for thread in [each for each in threading.enumerate() if each.name == "to-device"]:
        thread.join()
    assert weights.arrived
    with torch.inference_mode(), arriving(weights):
        skeleton.model(IDS)
    assert device.held == []


def test_a_buffer_is_not_written_before_its_last_copy_is_done(case):
    """The fake copies at the latest moment: a buffer used too early shows as wrong bytes."""
    checkpoint = case("llama").checkpoint
    part = checkpoint.manifest.parts[0]
    weights = DeviceWeights(
        from_file(checkpoint.part_path(), part), Stage(FakeDevice(), pieces=2, piece=PIECE, group=1)
    )
    unchanged(weights, checkpoint)


def test_the_buffers_are_locked_once_and_refusal_costs_speed_alone(case):
    device = FakeDevice()
    stage = Stage(device, pieces=3, piece=PIECE)
    assert (stage.locked, sorted(device.registered.values())) == (3, [PIECE] * 3)
    stage = Stage(FakeDevice(refuses=True), pieces=3, piece=PIECE)
    assert stage.locked == 0
    checkpoint = case("llama").checkpoint
    weights = DeviceWeights(from_file(checkpoint.part_path(), checkpoint.manifest.parts[0]), stage)
    weights.wait()


def test_weights_that_do_not_arrive_fail_every_wait_with_their_error(case):
    weights = Gated(case("llama").checkpoint, until=1 << 40, broken_at=20_000)
    found = DeviceWeights(weights, Stage(FakeDevice(), piece=PIECE, group=1))
    for _ in range(2):
        with pytest.raises(CheckpointCorrupt, match="chunk 1"):
            found.wait()
    assert not found.arrived
    found.wait(10_000)  # what was there before is


def test_a_copy_that_fails_is_the_platforms_error(case):
    class Broken(FakeDevice):
        def copy(self, target, source):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checkpoint = case("llama").checkpoint
    source = from_file(checkpoint.part_path(), checkpoint.manifest.parts[0])
    found = DeviceWeights(source, Stage(Broken(), piece=PIECE))
    with pytest.raises(PlatformError, match="illegal memory access"):
        found.wait()


def test_a_device_that_is_too_small_is_said_before_anything_is_allocated(case):
    device = FakeDevice(total=1000)
    checkpoint = case("llama").checkpoint
    source = from_file(checkpoint.part_path(), checkpoint.manifest.parts[0])
    with pytest.raises(NoCapacity, match="1000 of 1000 are free"):
        DeviceWeights(source, Stage(device, piece=PIECE))
    assert device.calls == []


def test_a_quantised_model_is_refused_on_a_device(staged):
    skeleton, _ = staged("llama")
    skeleton.packed = (object(),)
    with pytest.raises(BadSpec, match="quantised"):
        attach(skeleton)


@given(st.lists(st.integers(1, 500), max_size=12), st.integers(1, 1000))
def test_groups_cover_all_layers_once_and_in_order(sizes, least):
    layers, at = [], 0
    for size in sizes:
        layers.append(ByteRange(f"l{at}", at, at + size))
        at += size + 7  # padding
    total = 4096 + (layers[-1].end if layers else 64)
    found = grouped(Part("p", total, 4096, "", (), (), tuple(layers)), least)
    assert (found[0][0], found[-1][1]) == (4096, total)
    assert all(start < end for start, end in found)
    for layer in layers:
        assert sum(start <= 4096 + layer.start and 4096 + layer.end <= end for start, end in found) == 1
    assert all(end - start >= least for start, end in found[:-1])


@pytest.mark.parametrize(
    ("room", "per_token", "context", "concurrency", "expected"),
    [
        (100_000, 10, 1000, 4, (4, 4000)),
        (100_000, 10, 1000, 16, (8, 8000)),
        (5_000, 10, 1000, 16, (1, 425)),
        (5_000, 0, 1000, 16, (16, None)),
    ],
)
def test_a_device_caches_as_many_whole_contexts_as_fit(room, per_token, context, concurrency, expected):
    assert device_cache(room, per_token, context, concurrency) == expected


@pytest.mark.parametrize(("per_token", "context", "concurrency"), [(131_072, 8192, 4), (10, 1000, 3), (0, 1000, 2)])
def test_the_room_an_instance_asks_for_is_what_all_its_contexts_take(per_token, context, concurrency):
    room = device_room(per_token, context, concurrency)
    expected = (concurrency, concurrency * context if per_token else None)
    assert device_cache(room + 1, per_token, context, concurrency) == expected


def test_no_room_for_a_single_token_is_an_error():
    with pytest.raises(NoCapacity, match="0 bytes of GPU memory are left"):
        device_cache(-5, 10, 1000, 1)


def test_the_cache_of_a_device_is_zeros_of_its_own_and_has_no_pages():
    mapping, store = _reserve(3, 16, torch.empty(1, 2, 5, 4, device="meta", dtype=torch.bfloat16))
    assert mapping is None
    assert (tuple(store.shape), store.device.type, store.dtype) == ((3, 16, 2, 4), "meta", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_error_says_what_to_look_at():
    with pytest.raises(Unavailable, match="sees no CUDA device"):
        cuda.open_stage()


async def _draw(made, request):
    sequence = await made.prefill(request)
    return [output.token async for step in made.activate(sequence) for output in step]
