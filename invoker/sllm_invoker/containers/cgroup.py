"""A memory limit around a container, where the machine allows one: control groups, version 1 or 2.

Everything about the two layouts is in here; others see `Cgroups.make(name, limit)`, `limit` and `remove(name)`. Where
no group may be made (not root, read-only, delegated elsewhere) this does nothing, and says so once.

Not accounting: the limit is a fence against one container taking the node, so it is far above what a
function says it needs, and page cache of mapped weights counts in it only until the kernel reclaims it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sllm_faas import logging

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def _memory_parent(root: Path) -> tuple[Path, str] | None:
    """(our group's directory, name of the limit file), or None where there is no memory controller."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own[controllers] = path
    if "memory" in own:
        return root / "memory" / own["memory"].lstrip("/"), "memory.limit_in_bytes"
    if "" in own:
        parent = root / own[""].lstrip("/")
        with contextlib.suppress(OSError):
            if "memory" in (parent / "cgroup.subtree_control").read_text().split():
                return parent, "memory.max"
    return None


class Cgroups:
    """Groups of one node, named after it: `make` and `remove` are a pair."""

    def __init__(self, node: str, root: Path = ROOT) -> None:
        self._node = node
        self._parent = _memory_parent(root)
        self._log = logging.get("invoker").bind(node=node)
        if self._parent is None:
            self._unavailable("there is no memory controller that this process may use")

    @property
    def available(self) -> bool:
        return self._parent is not None

    def _unavailable(self, reason: str) -> None:
        self._parent = None
        self._log.info("no_memory_limits", reason=reason)

    def _path(self, name: str) -> Path:
        assert self._parent is not None
        return self._parent[0] / f"sllm-{self._node}-{name}"

    def make(self, name: str, limit_mb: int) -> list[str]:
        """Directories whose `cgroup.procs` the container is to enter; [] where limits are not to be had."""
        if self._parent is None or limit_mb <= 0:
            return []
        path = self._path(name)
        try:
            path.mkdir(exist_ok=True)
            self._limit(path, limit_mb)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.rmdir()
            self._unavailable(f"{path.parent} cannot be used: {error.strerror}")
            return []
        return [str(path)]

    def limit(self, name: str, limit_mb: int) -> None:
        """Another limit for a group there is; 0: none."""
        if self._parent is not None:
            with contextlib.suppress(OSError):
                self._limit(self._path(name), limit_mb)

    def _limit(self, path: Path, limit_mb: int) -> None:
        assert self._parent is not None
        file = self._parent[1]
        without = "max" if file == "memory.max" else "-1"
        (path / file).write_text(str(limit_mb * 1024 * 1024) if limit_mb > 0 else without)

    def remove(self, name: str) -> None:
        """Of a container whose processes are gone."""
        if self._parent is not None:
            with contextlib.suppress(OSError):
                self._path(name).rmdir()

    def killed_for_memory(self, name: str) -> bool:
        """Whether the kernel killed a process of the group because of its limit."""
        if self._parent is None:
            return False
        for file in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                for line in (self._path(name) / file).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill" and int(value):
                        return True
        return False

    def clean(self) -> None:
        """Remove the empty groups that an earlier life left."""
        if self._parent is not None:
            with contextlib.suppress(OSError):
                for path in self._parent[0].glob(f"sllm-{self._node}-*"):
                    with contextlib.suppress(OSError):
                        path.rmdir()
