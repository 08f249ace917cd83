"""Ingest for several ranks: what it is asked, what it refuses, and what becomes of its objects."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from sllm_invoker.checkpoints.dram import DramTier
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import (
    CheckpointObject,
    Manifest,
    Split,
    identity,
    open_object,
    verify_object,
    write_manifest,
)
from sllm_invoker.checkpoints.room import stays
from sllm_invoker.checkpoints.store import CheckpointStore

from sllm_faas.errors import BadSpec, CheckpointCorrupt, SllmError
from sllm_faas.spec import AdapterSpec, CheckpointSpec, FunctionSpec


@pytest.fixture
def parts(source: Path, store: CheckpointStore) -> CheckpointObject:
    """The tiny model for two ranks, files writable so that a test can break them."""
    made = ingest(store, str(source), "parts", tensor_parallel=2)
    for path in (store.path(made.digest), *store.path(made.digest).iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return store.get(made.digest)


def refused(store: CheckpointStore, source: Path, ranks: object, match: str) -> BadSpec:
    with pytest.raises(BadSpec, match=match) as caught:
        ingest(store, str(source), "parts", tensor_parallel=ranks)  # type: ignore[arg-type]
    assert not store.digests()
    assert list((store.root / "tmp").iterdir()) == []
    return caught.value


# -- identity ------------------------------------------------------------------------------------------------


def test_it_is_another_object_for_other_ranks_and_the_same_for_the_same(store, source, parts):
    whole = ingest(store, str(source), "whole")
    again = ingest(store, str(source), "again", tensor_parallel=2)
    assert (again.digest, again.known) == (parts.digest, True)
    assert whole.digest != parts.digest
    assert store.get(whole.digest).manifest.files == parts.manifest.files
    assert not whole.known
    assert ingest(store, str(source), "whole", tensor_parallel=1).known
    assert [part.name for part in parts.manifest.parts] == [
        "shared-of-2.safetensors",
        "part-0-of-2.safetensors",
        "part-1-of-2.safetensors",
    ]


def test_the_same_content_elsewhere_is_known_for_its_ranks_alone(store, source, parts, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    assert ingest(store, str(other), "other", tensor_parallel=2).digest == parts.digest
    assert not ingest(store, str(other), "other").known


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_dtype_is_that_of_the_source_or_what_is_asked_for(store, source, dtype):
    transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    made = ingest(store, str(source), "parts", tensor_parallel=2, dtype=dtype)
    found = store.get(made.digest).manifest
    kinds = {tensor.dtype for part in found.parts for tensor in part.tensors if tensor.kind == "parameter"}
    assert (found.layout.dtype, kinds) == (("bfloat16", {"BF16"}) if dtype == "auto" else ("float32", {"F32"}))


def test_one_that_can_be_had_again_may_leave_the_disk(store, parts, source):
    assert stays(store) == {}
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert "has changed" in stays(store)[parts.digest]


# -- wrong input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [0, -1, True, 2.0, "2", None, 1025])
def test_what_is_no_number_of_ranks_is_refused(store, source, ranks):
    refused(store, source, ranks, r"tensor_parallel is .+; allowed: an integer, 1 to 1024")
    with pytest.raises(ValueError, match="allowed: an integer, 1 to 1024"):
        CheckpointSpec("org/model", tensor_parallel=ranks)


def test_a_tensor_that_does_not_fall_into_equal_shares_is_named_with_its_shape_and_what_is_allowed(store, source):
    error = refused(store, source, 3, r"model\.layers\.0\.self_attn\.q_proj\.weight of shape \[32, 32\]")
    assert "3 equal shares along dimension 0; allowed for this model: 1, 2." in error.message


def test_heads_are_not_cut(store, source):
    """The 16 rows of the key projection would fall into 4 shares, of half a head each."""
    error = refused(store, source, 4, "it has 2 key-value heads; allowed for this model: 1, 2")
    assert error.param == "tensor_parallel"
    refused(store, source, 25, "of shape")


def test_a_style_that_transformers_does_not_know_is_refused(store, source, monkeypatch):
    monkeypatch.setattr(transformers.LlamaConfig, "base_model_tp_plan", {"layers.*.mlp.up_proj": "diagonal"})
    refused(store, source, 2, "plan of LlamaForCausalLM cannot be carried out: .*diagonal")


def test_tied_weights_that_would_come_apart_are_refused(store, source, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tp_plan", {"lm_head": "rowwise"})
    refused(store, source, 2, r"lm_head\.weight and model\.embed_tokens\.weight are one tensor")


def test_adapters_are_for_one_process_and_so_are_their_bases(store, parts, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(BadSpec, match="the base of an adapter must be whole"):
        ingest(store, str(adapter), "adapter", base="parts")
    with pytest.raises(BadSpec, match="its tensor_parallel must be 1"):
        ingest(store, str(adapter), "adapter", base="parts", tensor_parallel=2)


def test_functions_take_whole_checkpoints(parts):
    split = CheckpointSpec("org/model", tensor_parallel=2)
    with pytest.raises(ValueError, match="'chat' has tensor_parallel 2; allowed: 1"):
        FunctionSpec("chat", kind="llm", checkpoint=split)
    with pytest.raises(ValueError, match="'chat:legal' has tensor_parallel 2; allowed: 1"):
        FunctionSpec(
            "chat", kind="llm", checkpoint=CheckpointSpec("org/model"), adapters=(AdapterSpec("legal", split),)
        )


def test_the_memory_tier_takes_whole_checkpoints(parts):
    tier = DramTier(0, lambda work: work())
    try:
        with pytest.raises(BadSpec, match="is in parts for 2 ranks"):
            tier.open(parts.digest, parts.directory, "somebody")
    finally:
        tier.close()


# -- what becomes of them ------------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_part_is_found(parts):
    chance = random.Random(5)
    for path in sorted(parts.directory.iterdir()) * 4:
        content = path.read_bytes()
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :])
        with pytest.raises((CheckpointCorrupt, BadSpec)):  # a digit of the format's number: another format
            verify_object(open_object(parts.directory))
        path.write_bytes(content)
    verify_object(open_object(parts.directory))


@pytest.mark.parametrize("name", ["shared-of-2.safetensors", "part-0-of-2.safetensors", "part-1-of-2.safetensors"])
def test_a_part_that_is_missing_or_cut_is_refused(parts, name):
    path = parts.directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt, match=name):
        open_object(parts.directory)
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match=f"{name}: the file is missing"):
        open_object(parts.directory)


Change = Callable[[Manifest], Manifest]


def _ranks(count: int) -> Change:
    return lambda m: dataclasses.replace(m, layout=dataclasses.replace(m.layout, tensor_parallel=count))


def _splits(change: Callable[[dict[str, Split]], dict[str, Split]]) -> Change:
    return lambda m: dataclasses.replace(m, splits=change(m.splits))


def _part(index: int, **changes: object) -> Change:
    def change(m: Manifest) -> Manifest:
        parts = list(m.parts)
        parts[index] = dataclasses.replace(parts[index], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(m, parts=tuple(parts))

    return change


HEAD = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_ranks(1), "3 parts for 1 ranks"),
        (_ranks(3), "3 parts for 3 ranks"),
        (_ranks(0), "3 parts for 0 ranks"),
        (_part(2, tensors=()), "part-1-of-2.safetensors has other tensors than part-0-of-2.safetensors|not in the man"),
        (_splits(lambda _: {}), "are not those that are split"),
        (_splits(lambda found: {**found, "more": Split(0)}), "are not those that are split"),
        (_splits(lambda found: {**found, HEAD: Split(2)}), "cannot be split along dimension 2 in 1 groups"),
        (_splits(lambda found: {**found, HEAD: Split(0, 7)}), "cannot be split along dimension 0 in 7 groups"),
        (_splits(lambda found: {**found, HEAD: Split(0, 0)}), "cannot be split along dimension 0 in 0 groups"),
    ],
)
def test_a_manifest_whose_ranks_do_not_fit_together_is_corrupt(parts, change, match):
    changed = change(parts.manifest)
    digest = identity(changed.layout, changed.parts, changed.files, changed.base)
    write_manifest(parts.directory, dataclasses.replace(changed, digest=digest))
    with pytest.raises(CheckpointCorrupt, match=match):
        open_object(parts.directory)


@pytest.mark.parametrize("events", [1, 8, 20, 50])  # of 58: in the shared part, in a rank's, in the last
def test_an_ingest_that_breaks_off_shows_nothing_and_the_next_one_is_whole(store, source, events):
    left = [events]

    def broken(_done: int, _total: int, stage: str) -> None:
        left[0] -= stage == "write"
        if not left[0]:
            raise SllmError("broken off")

    with pytest.raises(SllmError, match="broken off"):
        ingest(store, str(source), "parts", tensor_parallel=2, progress=broken)
    assert not store.digests()
    assert list((store.root / "tmp").iterdir()) == []
    made = ingest(store, str(source), "parts", tensor_parallel=2)
    store.verify(made.digest)


def test_progress_goes_once_from_nothing_to_everything(store, source):
    told: list[tuple[int, int]] = []
    made = ingest(
        store, str(source), "parts", tensor_parallel=2,
        progress=lambda done, total, stage: told.append((done, total)) if stage == "write" else None,
    )  # fmt: skip
    assert told == sorted(told)
    assert all(done <= total for done, total in told)
    assert told[-1] == (store.get(made.digest).manifest.total_bytes,) * 2
