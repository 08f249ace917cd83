"""Memory limits, over a made-up cgroup file system of either version."""

from __future__ import annotations

from pathlib import Path

import pytest
from sllm_invoker.containers import cgroup
from sllm_invoker.containers.cgroup import Cgroups


@pytest.mark.parametrize(
    ("own", "file"), [("4:memory:/here\n0::/\n", "memory.limit_in_bytes"), ("0::/here\n", "memory.max")]
)
def test_a_group_with_a_limit_is_made_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, file: str
) -> None:
    parent = tmp_path / ("memory/here" if "memory" in own else "here")
    parent.mkdir(parents=True)
    (parent / "cgroup.subtree_control").write_text("cpu memory\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    groups = Cgroups("node-0", tmp_path)
    (made,) = groups.make("ins-1", 64)
    assert Path(made).parent == parent and (Path(made) / file).read_text() == str(64 * 2**20)
    groups.limit("ins-1", 65)
    assert (Path(made) / file).read_text() == str(65 * 2**20)
    groups.limit("ins-1", 0)
    assert (Path(made) / file).read_text() == ("max" if file == "memory.max" else "-1")
    (Path(made) / "memory.events").write_text("oom 1\noom_kill 1\n")
    assert groups.killed_for_memory("ins-1")


def test_without_a_controller_it_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    groups = Cgroups("node-0", tmp_path)
    assert not groups.available and groups.make("ins-1", 64) == []
    groups.remove("ins-1")
    assert not groups.killed_for_memory("ins-1")
