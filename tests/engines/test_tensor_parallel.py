"""Checkpoints in parts for several ranks: each rank has exactly its slices, and the ranks together the model."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import CheckpointObject, Split
from sllm_invoker.checkpoints.tensor_parallel import share
from sllm_invoker.runner.arriving import arriving
from sllm_invoker.runner.attach import attach, model_tensors, prepare
from sllm_invoker.runner.device_weights import Stage

from sllm_faas.errors import BadSpec, CheckpointCorrupt
from tests.engines.fake_device import FakeDevice

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])
RANKS = 2
PLANNED = (
    "llama", "llama-tied", "llama-scaled", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox",
    "mixtral", "qwen3_moe", "deepseek_v3",
)  # fmt: skip
UNPLANNED = ("gpt2", "opt", "falcon", "bloom", "mamba")
"""Architectures for which transformers has no plan."""


@pytest.fixture
def parts(case, store) -> Callable[[str], CheckpointObject]:
    """The same model as `case`'s, in parts; the store knows what it has ingested before."""

    def get(name: str) -> CheckpointObject:
        made = ingest(store, str(case(name).source), f"{name}-parts", tensor_parallel=RANKS)
        return store.get(made.digest)

    return get


def attached(checkpoint: CheckpointObject, rank: int) -> Any:
    skeleton = prepare(checkpoint, rank=rank)
    attach(skeleton)
    return skeleton


def together(shares: list[torch.Tensor], split: Split) -> torch.Tensor:
    """Block by block, each rank's share of it after the other's."""
    blocks = [each.chunk(split.groups, split.dim) for each in shares]
    return torch.cat([rank[group] for group in range(split.groups) for rank in blocks], split.dim)


@given(st.data())
def test_shares_are_equal_and_together_the_tensor(data):
    ranks, groups, each = (data.draw(st.integers(1, 4)) for _ in range(3))
    shape = data.draw(st.lists(st.integers(1, 3), max_size=2))
    dim = data.draw(st.integers(0, len(shape)))
    shape.insert(dim, ranks * groups * each)
    whole, split = torch.arange(torch.Size(shape).numel()).view(shape), Split(dim, groups)
    shares = [share(whole, split, rank, ranks) for rank in range(ranks)]
    assert {split.whole(tuple(one.shape), ranks) for one in shares} == {tuple(shape)}
    assert torch.equal(together(shares, split), whole)


@pytest.mark.parametrize("name", UNPLANNED)
def test_a_model_without_a_plan_is_refused(parts, name):
    with pytest.raises(BadSpec, match=r"has no tensor-parallel plan for \w+; tensor_parallel must be 1"):
        parts(name)


@pytest.mark.parametrize("planned", PLANNED)
def test_the_ranks_together_have_every_tensor_bit_for_bit(planned, case, parts):
    checkpoint = parts(planned)
    splits, ties = checkpoint.manifest.splits, checkpoint.manifest.ties
    wanted = {name: tensor for name, _, tensor in model_tensors(case(planned).model)}
    found = [
        {name: tensor for name, _, tensor in model_tensors(attached(checkpoint, rank).model)} for rank in range(RANKS)
    ]
    assert splits
    for name, tensor in wanted.items():
        mine = [rank[name] for rank in found]
        assert not any(each.is_meta for each in mine)
        split = splits.get(ties.get(name, name))
        if split is None:
            assert all(torch.equal(each, tensor) for each in mine), name
        else:
            assert torch.equal(together([each.detach() for each in mine], split), tensor), name


@pytest.mark.parametrize("planned", PLANNED)
def test_what_ranks_share_is_stored_once_and_a_rank_reads_no_more_than_its_part(planned, case, parts):
    checkpoint, whole = parts(planned), case(planned).checkpoint.manifest
    shared, *own = checkpoint.manifest.parts
    split = checkpoint.manifest.splits
    assert {tensor.name for tensor in shared.tensors} == {tensor.name for tensor in whole.parts[0].tensors} - set(split)
    held = {tensor.name: tensor.end - tensor.start for tensor in whole.parts[0].tensors}
    for rank in range(RANKS):
        assert checkpoint.parts_of(rank) == (shared, own[rank])
        values = sum(held[name] // RANKS if name in split else held[name] for name in held)
        headers = sum(part.data_start for part in checkpoint.parts_of(rank))
        padding = 64 * len(held)
        assert values <= sum(part.bytes for part in checkpoint.parts_of(rank)) - headers <= values + padding
    assert checkpoint.manifest.total_bytes == sum(part.bytes for part in checkpoint.manifest.parts)
    order = [tensor.name for tensor in whole.parts[0].tensors]
    for part in checkpoint.manifest.parts:
        assert [tensor.name for tensor in part.tensors] == [
            name for name in order if name in {tensor.name for tensor in part.tensors}
        ], "not in the order of execution"


def test_a_rank_maps_what_all_share_and_its_own_and_copies_nothing(parts):
    checkpoint = parts("llama")
    skeleton = attached(checkpoint, 1)
    start = ctypes.addressof(ctypes.c_char.from_buffer(skeleton.weights.buffer))
    mapped = range(start, start + len(skeleton.weights.buffer))
    assert all(tensor.data_ptr() in mapped for _, _, tensor in model_tensors(skeleton.model) if tensor.numel())
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if checkpoint.digest in line]
    here = {line.rpartition("/")[2] for line in maps if start <= int(line.partition("-")[0], 16) < mapped.stop}
    assert here == {"shared-of-2.safetensors", "part-1-of-2.safetensors"}


def test_a_write_of_a_rank_stays_in_its_process(parts):
    one, other = attached(parts("llama"), 0), attached(parts("llama"), 0)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        before = other.model.get_parameter(name).clone()
        with torch.no_grad():
            one.model.get_parameter(name).add_(1.0)
        assert torch.equal(other.model.get_parameter(name), before)


def test_tied_weights_are_split_once_and_stay_tied(parts):
    checkpoint = parts("llama-tied")
    assert checkpoint.manifest.splits.keys() & {"lm_head.weight"} == set()
    model = attached(checkpoint, 1).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (48, 32)


def test_a_bias_of_a_rowwise_layer_is_whole_for_every_rank_and_that_of_a_colwise_one_is_split(parts):
    splits = parts("gpt_neox").manifest.splits
    assert splits["gpt_neox.layers.0.attention.query_key_value.bias"] == Split(0)
    assert splits["gpt_neox.layers.0.attention.dense.weight"] == Split(1)
    assert "gpt_neox.layers.0.attention.dense.bias" not in splits


def test_gate_and_up_in_one_matrix_are_split_each(parts):
    assert parts("mixtral").manifest.splits["model.layers.0.mlp.experts.gate_up_proj"] == Split(1, groups=2)


def test_a_rank_is_attached_on_a_device_too(parts):
    skeleton, host = prepare(parts("llama"), rank=1), attached(parts("llama"), 1)
    skeleton.stage = Stage(FakeDevice(), pieces=2, piece=1 << 16, group=1)
    attach(skeleton)
    skeleton.weights.wait()
    wanted = dict(host.model.named_parameters())
    with arriving(skeleton.weights):
        for name, tensor in skeleton.model.named_parameters():
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("rank", [None, -1, 2])
def test_a_rank_that_the_checkpoint_has_not_got_is_refused(parts, rank):
    with pytest.raises(BadSpec, match="is in parts for 2 ranks, 0 to 1") as caught:
        prepare(parts("llama"), rank=rank)
    assert "tensor_parallel" in caught.value.hint


def test_a_whole_checkpoint_has_no_ranks(case):
    with pytest.raises(BadSpec, match="not split for ranks; rank 0 cannot use it"):
        prepare(case("llama").checkpoint, rank=0)


def test_a_part_that_shrank_after_prepare_is_corrupt_and_not_a_crash(parts, tmp_path):
    checkpoint = parts("qwen2")
    directory = tmp_path / "object"
    directory.mkdir()
    for path in checkpoint.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    skeleton = prepare(directory, rank=1)
    path = directory / "part-1-of-2.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointCorrupt, match="5000 bytes"):
        attach(skeleton)


def test_two_processes_with_a_part_each_compute_what_the_model_computes(case, parts, tmp_path):
    """By transformers' own hooks over gloo: bit-equal to what these compute with weights that transformers loaded and
    split itself, and but for the order of sums what one process computes with the whole model."""
    names = ["llama", "llama-tied", "gpt_neox", "phi3", "mixtral", "deepseek_v3"]
    models = [str(path) for name in names for path in (parts(name).directory, case(name).source)]
    outs = [tmp_path / f"rank-{rank}" for rank in range(RANKS)]
    script = str(Path(__file__).with_name("rank_process.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(RANKS), str(tmp_path / "store"), str(out), *models],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        said = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)
    for out in outs:
        for name, found in zip(names, torch.load(out), strict=True):
            assert found["different"] == [], name
            assert torch.equal(found["ours"], found["theirs"]), name
            with torch.inference_mode():
                expected = case(name).model(IDS).logits
            torch.testing.assert_close(found["ours"], expected, rtol=1e-4, atol=1e-4)
