"""Ingest: complete or not at all, once, and nothing that could run code."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from sllm_invoker.checkpoints.ingest import ingest

from sllm_faas.errors import (
    BadSpec,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointUnavailable,
    StorageFull,
)


def objects(store):
    return sorted(path.name for path in (store.root / "objects").iterdir())


def leftovers(store):
    return list((store.root / "tmp").iterdir())


def test_an_ingested_model_is_whole_named_and_verified(store, source):
    result = ingest(store, str(source), "llamas/tiny")
    assert not result.known
    assert store.resolve("llamas/tiny") == result.digest
    assert (store.root / "verified" / result.digest).exists()
    store.verify("llamas/tiny")
    assert leftovers(store) == []


def test_object_files_are_read_only(store, source):
    directory = store.path(ingest(store, str(source), "tiny").digest)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o444}


def test_progress_tells_the_stages_in_order(store, source):
    seen = []
    ingest(store, str(source), "tiny", progress=lambda done, total, stage: seen.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["resolve", "hash", "load", "write", "sync"]
    written = [done for stage, done, _ in seen if stage == "write"]
    assert written == sorted(written)
    assert seen[-1][1] == seen[-1][2] == store.get("tiny").manifest.total_bytes


def _age(directory: Path) -> None:
    """As if nobody had touched the files for an hour."""
    for path in directory.iterdir():
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3_600 * 10**9))


def test_an_untouched_source_is_recognised_without_reading_it(store, source, monkeypatch):
    _age(source)
    first = ingest(store, str(source), "tiny")
    monkeypatch.setattr("sllm_invoker.checkpoints.ingest.content_digest", None)
    again = ingest(store, str(source), "again")
    assert (again.digest, again.known) == (first.digest, True)
    assert store.resolve("again") == first.digest


def test_a_source_that_was_just_written_is_recognised_by_its_content(store, source, monkeypatch):
    first = ingest(store, str(source), "tiny")
    monkeypatch.setattr("sllm_invoker.checkpoints.ingest._write", None)
    again = ingest(store, str(source), "tiny")
    assert (again.digest, again.known) == (first.digest, True)


def test_the_same_content_elsewhere_is_the_same_object(store, source):
    first = ingest(store, str(source), "one")
    source.rename(source.with_name("moved"))
    second = ingest(store, str(source.with_name("moved")), "two")
    assert second.digest == first.digest
    assert second.known
    assert objects(store) == [first.digest]


def test_what_was_written_counts_as_verified_until_it_changes(store, source, monkeypatch):
    tiny = store.get(ingest(store, str(source), "tiny").digest)
    with monkeypatch.context() as nothing_is_read:
        nothing_is_read.setattr("sllm_invoker.checkpoints.store.verify_object", None)
        assert store.ensure_verified("tiny").digest == tiny.digest
    tiny.part_path().chmod(0o644)
    tiny.part_path().write_bytes(tiny.part_path().read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointCorrupt):
        store.ensure_verified("tiny")


def test_changed_weights_are_another_object_and_the_name_follows(store, source):
    _age(source)
    first = ingest(store, str(source), "tiny")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    second = ingest(store, str(source), "tiny")
    assert second.digest != first.digest
    assert store.resolve("tiny") == second.digest
    assert len(objects(store)) == 2


def test_a_removed_object_is_ingested_again(store, source):
    digest = ingest(store, str(source), "tiny").digest
    store.remove("tiny")
    again = ingest(store, str(source), "tiny")
    assert (again.digest, again.known) == (digest, False)
    store.verify("tiny")


def test_dtype_converts_the_weights(store, source):
    whole = store.path(ingest(store, str(source), "whole").digest)
    half = ingest(store, str(source), "half", dtype="bfloat16")
    manifest = store.get("half").manifest
    assert manifest.layout.dtype == "bfloat16"
    assert manifest.kv_bytes_per_token * 2 == store.get("whole").manifest.kv_bytes_per_token
    assert {t.dtype for t in manifest.parts[0].tensors if t.kind == "parameter"} == {"BF16"}
    assert store.path(half.digest) != whole


def test_chunk_sums_cover_a_part_of_several_chunks(store, source, monkeypatch):
    for module in ("object", "part"):
        monkeypatch.setattr(f"sllm_invoker.checkpoints.{module}.CHUNK_BYTES", 4096)
    monkeypatch.setattr("sllm_invoker.checkpoints.object.chunks_of.__defaults__", (4096,))
    ingest(store, str(source), "tiny")
    part = store.get("tiny").manifest.parts[0]
    assert len(part.chunks) == -(-part.bytes // 4096) > 10
    store.verify("tiny")


def test_a_source_in_shards_gives_the_same_weights(store, source, tmp_path):
    whole = ingest(store, str(source), "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ingest(store, str(tmp_path / "shards"), "shards")
    assert store.get("shards").manifest.parts == store.get(whole.digest).manifest.parts


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_two_processes_ingest_the_same_at_once_and_make_one_object(store, source):
    command = [sys.executable, "-m", "sllm_invoker.checkpoints.ingest"]
    command += ["--root", str(store.root), "--source", str(source), "--name", "tiny"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    results = [answer[-1]["result"] for answer in lines]
    assert results[0]["digest"] == results[1]["digest"]
    assert sorted(result["known"] for result in results) == [False, True]
    assert objects(store) == [results[0]["digest"]]
    assert leftovers(store) == []
    writer = next(answer for answer in lines if not answer[-1]["result"]["known"])
    assert {"stage", "done", "total"} == set(writer[0])


@pytest.mark.e2e
def test_a_known_source_is_recognised_without_torch(store, source):
    _age(source)
    ingest(store, str(source), "tiny")
    code = (
        "import sys; from pathlib import Path; from sllm_invoker.checkpoints import ingest, store;"
        "done = ingest.ingest(store.CheckpointStore(Path(sys.argv[1])), sys.argv[2], 'tiny');"
        "print(done.known, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(store.root), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


@pytest.mark.e2e
def test_as_a_process_an_error_is_one_json_line_and_status_one(store, tmp_path):
    command = [sys.executable, "-m", "sllm_invoker.checkpoints.ingest"]
    command += ["--root", str(store.root), "--source", str(tmp_path / "nothing"), "--name", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["code"] == "checkpoint_unavailable"
    assert error["status"] == 503


def test_what_a_dead_process_left_is_removed_and_a_live_one_is_not_touched(store, source):
    dead, live = store.root / "tmp" / "dead", store.root / "tmp" / "live"
    for path in (dead, live):
        path.mkdir()
        (path / "part").write_text("x")
    handle = os.open(live, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ingest(store, str(source), "tiny")
        assert leftovers(store) == [live]
    finally:
        os.close(handle)


# -- refused -------------------------------------------------------------------------------------------------


def refused(store, source, error, match, **options):
    with pytest.raises(error, match=match):
        ingest(store, str(source), "tiny", **options)
    assert objects(store) == []
    assert leftovers(store) == []
    with pytest.raises(CheckpointUnavailable):
        store.resolve("tiny")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused(store, source, name):
    (source / "model.safetensors").rename(source / name)
    refused(store, source, BadSpec, f"pickled weights \\({name}\\)")


def test_a_directory_without_weights_is_refused(store, source):
    (source / "model.safetensors").unlink()
    refused(store, source, BadSpec, "no weights")


def test_a_model_that_needs_its_own_code_is_refused(store, source, edit_json):
    edit_json(
        source / "config.json",
        model_type="own_thing",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "configuration_own.OwnConfig"},
    )
    (source / "configuration_own.py").write_text("raise SystemExit('this must not run')")
    refused(store, source, BadSpec, "code of its own")


def test_an_unknown_architecture_is_refused(store, source, edit_json):
    edit_json(source / "config.json", architectures=["OwnForCausalLM"])
    refused(store, source, BadSpec, "OwnForCausalLM")


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM", "LlamaModel"]])
def test_the_config_must_name_one_architecture(store, source, edit_json, architectures):
    edit_json(source / "config.json", architectures=architectures)
    refused(store, source, BadSpec, "one architecture")


def test_plain_weights_that_the_config_calls_quantised_are_refused(store, source, edit_json):
    edit_json(source / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(store, source, CheckpointIncomplete, "quantised by its config, and its weight is not")


@pytest.mark.parametrize("url", ["gs://bucket/model", "ftp://host/model", "file:///etc"])
def test_urls_are_refused_by_scheme(store, url):
    refused(store, url, BadSpec, f"{url.split(':')[0]}:// sources are not supported")


def test_a_path_that_is_not_there_is_unavailable(store, tmp_path):
    refused(store, tmp_path / "nothing", CheckpointUnavailable, "no directory")


def test_a_file_is_refused(store, source):
    refused(store, source / "config.json", BadSpec, "is a file")


def test_a_directory_without_config_is_refused(store, source):
    (source / "config.json").unlink()
    refused(store, source, BadSpec, r"no config\.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_that_is_not_json_is_corrupt(store, source, text):
    (source / "config.json").write_text(text)
    refused(store, source, CheckpointCorrupt, r"config\.json")


@pytest.mark.parametrize("change", [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"hidden_size": -1}])
def test_a_config_that_describes_nothing_possible_is_refused(store, source, edit_json, change):
    edit_json(source / "config.json", **change)
    refused(store, source, (BadSpec, CheckpointCorrupt), "config|cannot|shape")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_source_is_corrupt(store, source, keep):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(store, source, CheckpointCorrupt, r"model\.safetensors")


def test_a_missing_weight_is_named(store, source):
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refused(store, source, CheckpointIncomplete, r"model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_weight_of_another_shape_is_corrupt(store, source):
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:8].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refused(store, source, CheckpointCorrupt, "norm|shape|mismatch")


def test_an_index_that_names_a_missing_file_is_incomplete(store, source):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(store, source, CheckpointIncomplete, "model-00001-of-00002")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_not_one_is_corrupt(store, source, text):
    (source / "model.safetensors.index.json").write_text(text)
    refused(store, source, CheckpointCorrupt, "index")


def test_a_broken_tokenizer_is_corrupt(store, source):
    (source / "tokenizer.json").write_text("{}")
    refused(store, source, CheckpointCorrupt, "tokenizer")


def test_a_model_without_tokenizer_is_ingested_as_such(store, source):
    for path in (*source.glob("tokenizer*"), source / "chat_template.jinja"):
        path.unlink(missing_ok=True)
    ingest(store, str(source), "tiny")
    checkpoint = store.get("tiny")
    assert not checkpoint.manifest.chat_template
    assert "tokenizer.json" not in {file.name for file in checkpoint.manifest.files}


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"name": "../up"}, {"name": ""}, {"name": "a/b/c"}])
def test_bad_options_are_refused_before_any_work(store, source, options):
    with pytest.raises(BadSpec):
        ingest(store, str(source), **{"name": "tiny", **options})
    assert objects(store) == []


def test_a_full_disk_is_storage_full_and_leaves_nothing(store, source, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sllm_invoker.checkpoints.part._HashingWriter.write", full)
    refused(store, source, StorageFull, "no space left")


# -- Hugging Face --------------------------------------------------------------------------------------------


def test_a_repo_is_fetched_by_its_files_and_its_revision_recorded(store, source, monkeypatch):
    asked = {}

    def snapshot(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(source.rename(source.with_name("0123abcd")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    ingest(store, "owner/model", "tiny")
    assert store.get("tiny").manifest.source.name == "owner/model"
    assert store.get("tiny").manifest.source.revision == "0123abcd"
    assert asked["repo"] == "owner/model"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["patterns"])


def test_a_full_cache_of_hugging_face_is_storage_full(store, monkeypatch):
    def snapshot(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(StorageFull, match="cache of Hugging Face"):
        ingest(store, "org/model", "x")


def test_a_repo_that_cannot_be_reached_is_unavailable_with_a_hint(store, monkeypatch):
    def snapshot(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(CheckpointUnavailable, match="offline") as caught:
        ingest(store, "owner/model", "tiny")
    assert "HF_TOKEN" in caught.value.hint
    assert issubclass(CheckpointUnavailable, CheckpointError)
