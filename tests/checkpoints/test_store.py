"""The directory of objects: names, pins, removal, verification."""

from __future__ import annotations

import mmap
import os
import shutil

import pytest
from sllm_invoker.checkpoints.store import CheckpointStore

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointUnavailable, Conflict


def test_an_object_is_found_by_name_digest_and_prefix(filled):
    digest = filled.resolve("tiny")
    assert filled.resolve(digest) == filled.resolve(digest[:8]) == digest
    assert filled.get(digest[:12]).digest == digest


@pytest.mark.parametrize("ref", ["nobody", "", "..", "../objects", "a" * 63, "/etc/passwd", "0" * 8])
def test_what_names_nothing_is_unavailable_and_tells_what_there_is(filled, ref):
    with pytest.raises(CheckpointUnavailable, match="tiny"):
        filled.get(ref)


def test_the_listing_shows_names_and_pins(filled):
    filled.set_ref("team/other", filled.resolve("tiny"))
    filled.pin("tiny")
    (entry,) = filled.list()
    assert entry.refs == ("team/other", "tiny")
    assert entry.pinned
    assert entry.manifest.architecture == "LlamaForCausalLM"
    filled.unpin("tiny")
    assert not filled.list()[0].pinned


def test_a_corrupt_object_does_not_spoil_the_listing(filled):
    digest = filled.resolve("tiny")
    shutil.copytree(filled.path(digest), filled.path("0" * 64))
    (filled.path("0" * 64) / "manifest.json").write_text("{")
    assert [entry.digest for entry in filled.list()] == [digest]


def test_a_pinned_object_is_not_removed(filled):
    filled.pin("tiny")
    with pytest.raises(Conflict, match="pinned"):
        filled.remove("tiny")
    filled.unpin("tiny")
    filled.remove("tiny")
    assert filled.list() == ()
    with pytest.raises(CheckpointUnavailable):
        filled.resolve("tiny")
    assert list((filled.root / "tmp").iterdir()) == []


def test_a_removed_object_stays_readable_to_who_has_it_mapped(filled):
    path = filled.get("tiny").part_path()
    before = path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        filled.remove("tiny")
        assert mapping[:] == before


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/../b", "/a", ".hidden", "x" * 97])
def test_a_bad_name_is_refused(filled, name):
    with pytest.raises(BadSpec, match="not a checkpoint name"):
        filled.set_ref(name, filled.resolve("tiny"))


def test_ensure_verified_reads_the_bytes_once(filled, monkeypatch):
    filled.ensure_verified("tiny")
    monkeypatch.setattr("sllm_invoker.checkpoints.store.verify_object", None)
    assert filled.ensure_verified("tiny").digest == filled.resolve("tiny")


def test_ensure_verified_reads_again_when_a_file_was_touched(filled):
    filled.ensure_verified("tiny")
    path = filled.get("tiny").part_path()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointCorrupt):
        filled.ensure_verified("tiny")


def test_a_failed_verify_takes_the_mark_away(filled):
    filled.verify("tiny")
    path = filled.get("tiny").part_path()
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(CheckpointCorrupt):
            filled.verify("tiny")
    with pytest.raises(CheckpointCorrupt):
        filled.ensure_verified("tiny")


def test_two_stores_over_one_root_see_the_same(filled):
    other = CheckpointStore(filled.root)
    other.set_ref("more", filled.resolve("tiny"))
    assert filled.resolve("more") == other.resolve("tiny")
