"""The object format: what it promises, and that every way to break it is a typed error."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sllm_invoker.checkpoints.object import (
    CHUNK_BYTES,
    PAD_PREFIX,
    TENSOR_ALIGNMENT,
    open_object,
    read_header,
    read_manifest,
    verify_object,
    write_manifest,
)

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointError, CheckpointUnavailable


@pytest.fixture
def checkpoint(filled):
    return filled.get("tiny")


def test_the_part_file_is_safetensors_that_any_tool_opens(checkpoint):
    with safe_open(checkpoint.part_path(), framework="pt") as file:
        names = {name for name in file.keys() if not name.startswith(PAD_PREFIX)}  # noqa: SIM118
    assert names == {tensor.name for tensor in checkpoint.manifest.parts[0].tensors}


def test_data_starts_at_a_page_and_tensors_at_cache_lines(checkpoint):
    part = checkpoint.manifest.parts[0]
    assert part.data_start % 4096 == 0
    assert all(tensor.start % TENSOR_ALIGNMENT == 0 for tensor in part.tensors)


def test_tensors_are_in_execution_order(checkpoint):
    names = [tensor.name for tensor in checkpoint.manifest.parts[0].tensors]
    layer = [name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1] == "model.rotary_emb.inv_freq"
    assert layer[0] == "input_layernorm.weight"
    assert layer.index("self_attn.o_proj.weight") < layer.index("post_attention_layernorm.weight")
    assert names[-1] == "model.norm.weight"


def test_layers_are_consecutive_byte_ranges(checkpoint):
    part = checkpoint.manifest.parts[0]
    names = [layer.name for layer in part.layers]
    assert names == [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm",
    ]
    assert part.layers[0].start == 0
    assert all(a.end <= b.start < a.end + TENSOR_ALIGNMENT for a, b in zip(part.layers, part.layers[1:], strict=False))
    assert part.data_start + part.layers[-1].end == part.bytes


def test_ties_and_buffers_are_recorded(checkpoint):
    assert checkpoint.manifest.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    kinds = {tensor.name: tensor.kind for tensor in checkpoint.manifest.parts[0].tensors}
    assert kinds["model.rotary_emb.inv_freq"] == "buffer"


def test_the_manifest_knows_what_placement_needs(checkpoint):
    manifest = checkpoint.manifest
    assert manifest.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4  # layers, k and v, heads, dim, float32
    assert manifest.max_context == 128
    assert manifest.vocabulary == 300
    assert manifest.total_bytes == checkpoint.part_path().stat().st_size
    assert manifest.architecture == "LlamaForCausalLM"
    assert manifest.chat_template
    assert manifest.layout.dtype == "float32"


def test_verify_reads_every_byte_and_reports_it(checkpoint):
    seen = []
    verify_object(checkpoint, lambda done, total, stage: seen.append((done, total, stage)))
    assert seen[-1] == (checkpoint.manifest.total_bytes, checkpoint.manifest.total_bytes, "verify")


# -- broken --------------------------------------------------------------------------------------------------


def _rewrite_header(checkpoint, change):
    path = checkpoint.part_path()
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(raw[:8] + text + raw[8 + length :])


def _norm(header):
    return header["model.norm.weight"]


BROKEN_HEADERS = {
    "a hole": (lambda h: _norm(h)["data_offsets"].__setitem__(0, _norm(h)["data_offsets"][0] + 64), "norm"),
    "an overlap": (lambda h: _norm(h)["data_offsets"].__setitem__(0, _norm(h)["data_offsets"][0] - 64), "norm"),
    "out of range": (lambda h: _norm(h).update(data_offsets=[0, 10**12]), "norm"),
    "negative": (lambda h: _norm(h).update(data_offsets=[-128, 0]), "malformed"),
    "another dtype": (lambda h: _norm(h).update(dtype="I32"), "manifest says"),
    "another size": (lambda h: _norm(h).update(dtype="F16"), "bytes"),
    "another shape": (lambda h: _norm(h).update(shape=[4, 8]), "manifest says"),
    "unknown dtype": (lambda h: _norm(h).update(dtype="F7"), "unknown dtype"),
    "no offsets": (lambda h: _norm(h).pop("data_offsets"), "malformed"),
    "not an entry": (lambda h: h.update({"model.norm.weight": 3}), "malformed"),
    "a name swapped": (lambda h: h.update({"x": h.pop("model.norm.weight")}), "norm"),
}


@pytest.mark.parametrize("what", BROKEN_HEADERS)
def test_a_broken_header_is_corrupt_and_names_the_reason(checkpoint, what):
    change, reason = BROKEN_HEADERS[what]
    _rewrite_header(checkpoint, change)
    with pytest.raises(CheckpointCorrupt, match=reason):
        open_object(checkpoint.directory)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 4096, -1])
def test_a_truncated_part_is_found_at_open(checkpoint, keep):
    path = checkpoint.part_path()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointCorrupt, match="manifest says"):
        open_object(checkpoint.directory)


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 8, (50).to_bytes(8, "little") + b"{" * 50, (2).to_bytes(8, "little") + b"[]"]
)
def test_a_file_that_is_not_safetensors_is_corrupt(tmp_path, head):
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(CheckpointCorrupt):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("name", ["part-0-of-1.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint.directory / name).unlink()
    with pytest.raises(CheckpointCorrupt, match=rf"{name}.*missing"):
        open_object(checkpoint.directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', '{"format": "one"}', "\x00\xff"])
def test_a_manifest_that_is_not_one_is_corrupt(checkpoint, text):
    (checkpoint.directory / "manifest.json").write_text(text)
    with pytest.raises(CheckpointCorrupt, match="not a manifest"):
        open_object(checkpoint.directory)


def test_a_newer_format_asks_for_a_new_ingest(checkpoint, edit_json):
    edit_json(checkpoint.directory / "manifest.json", format=99)
    with pytest.raises(BadSpec, match="format 99"):
        open_object(checkpoint.directory)


def test_a_file_name_cannot_leave_the_directory(checkpoint):
    files = (dataclasses.replace(checkpoint.manifest.files[0], name="../config.json"),)
    write_manifest(checkpoint.directory, dataclasses.replace(checkpoint.manifest, files=files))
    with pytest.raises(CheckpointCorrupt, match="not a plain file name"):
        open_object(checkpoint.directory)


def test_a_manifest_that_was_edited_is_corrupt(checkpoint, edit_json):
    edit_json(checkpoint.directory / "manifest.json", source={"name": "another", "digest": "0"})
    with pytest.raises(CheckpointCorrupt, match="checksum"):
        open_object(checkpoint.directory)


def test_a_manifest_of_other_contents_does_not_match_its_digest(checkpoint):
    layout = dataclasses.replace(checkpoint.manifest.layout, transformers="0")
    write_manifest(checkpoint.directory, dataclasses.replace(checkpoint.manifest, layout=layout))
    with pytest.raises(CheckpointCorrupt, match="digest"):
        open_object(checkpoint.directory)


def test_a_flipped_byte_of_a_manifest_is_noticed_wherever_it_is(checkpoint):
    path, chance = checkpoint.directory / "manifest.json", random.Random(5)
    raw = path.read_bytes()
    for at in range(chance.randrange(8), len(raw), 8):
        changed = bytearray(raw)
        changed[at] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
        with pytest.raises((CheckpointCorrupt, BadSpec)):
            read_manifest(checkpoint.directory)


def test_a_changed_byte_is_found_by_verify_with_its_chunk(checkpoint):
    path = checkpoint.part_path()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointCorrupt, match=f"chunk {len(raw) // CHUNK_BYTES} "):
        verify_object(open_object(checkpoint.directory))


def test_a_changed_side_file_is_found_by_verify(checkpoint):
    path = checkpoint.directory / "config.json"
    path.write_text(path.read_text().replace("128", "129"))
    with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
        verify_object(open_object(checkpoint.directory))


def test_no_such_directory_is_unavailable(tmp_path):
    with pytest.raises(CheckpointUnavailable):
        open_object(tmp_path / "nothing")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_header_or_manifest_is_noticed_or_harmless(checkpoint, data):
    """Never anything but an error of ours: no crash, no foreign exception."""
    path = data.draw(st.sampled_from([checkpoint.directory / "manifest.json", checkpoint.part_path()]))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, min(len(raw), 3000) - 1))
    piece = data.draw(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from([b'"', b"9", b"}", b"-", b"null"])))
    try:
        path.write_bytes(raw[:at] + piece + raw[at + len(piece) :])
        try:
            open_object(checkpoint.directory)
        except (CheckpointError, BadSpec):
            pass
    finally:
        path.write_bytes(raw)
    open_object(checkpoint.directory)


def test_object_and_store_import_no_torch():
    code = (
        "import sys, sllm_invoker.checkpoints.store, sllm_invoker.checkpoints.object;"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
