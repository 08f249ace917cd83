"""What an invoker asks of the objects on its node."""

from __future__ import annotations

from pathlib import Path

import pytest
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.containers.tree import Tree
from sllm_invoker.ingests import Ingests

from sllm_faas.errors import CheckpointCorrupt
from sllm_faas.spec import CheckpointSpec


async def test_an_object_that_was_ready_is_so_at_once_until_its_files_change(filled: CheckpointStore, tmp_path: Path):
    ingests = Ingests(filled, Tree(tmp_path), tmp_path)
    digest = filled.resolve("tiny")
    spec = CheckpointSpec("anything", digest=digest)
    assert await ingests.ready(spec, lambda *_: None) == filled.path(digest)

    later = Ingests(filled, Tree(tmp_path), tmp_path)
    assert later.digests() == (digest,)
    for each in (ingests, later):
        with pytest.raises(StopIteration) as answer:  # nothing else had to run for it
            each.ready(spec, lambda *_: None).send(None)
        assert answer.value.value == filled.path(digest)

    part = filled.get(digest).part_path()
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    with pytest.raises(CheckpointCorrupt):
        await ingests.ready(spec, lambda *_: None)
