"""The port of a container runtime: how an isolated process tree is started, watched and ended.

    start(spec) ──► Handle ──► Output* ──► Exited
                      └── signal, stop(grace), stats

`process` forks instances from warm zygotes; other runtimes come behind the same port. Invariant: after `stop`
returned, or `Exited` was told, nothing of the container's process tree is alive.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from sllm_faas.errors import PlatformError
from sllm_faas.spec import FunctionSpec, Warmth


class ForkFailed(PlatformError):
    """The runtime could not make a process: out of memory or process numbers, or its zygotes keep dying."""

    code = "fork_failed"
    status = 503


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What to start. `config` is the runner's configuration as JSON: it holds secrets and is never logged. `entry`,
    `module:function`, is what it runs if not a function; that is called with the config and those descriptors.

    `spec` and `object_dir` choose the warmth layers; None where there is nothing to prepare. `memory_limit_mb`
    is enforced where control groups allow it. `link` and `weights` are descriptors to hand to the instance, its socket
    to the invoker and a channel to the checkpoint store, or -1; they stay the caller's.
    """

    name: str
    config: bytes
    spec: FunctionSpec | None = None
    object_dir: str = ""
    memory_limit_mb: int = 0
    link: int = -1
    weights: int = -1
    entry: str = ""

    def bare(self) -> ContainerSpec:
        """What its layers are made of, and no more."""
        return ContainerSpec("", b"", self.spec, self.object_dir)


@dataclass(frozen=True, slots=True)
class Exited:
    """`status` as of waitpid's exit code: negative for a signal; None when nobody could tell."""

    status: int | None

    def __str__(self) -> str:
        if self.status is None:
            return "for an unknown reason"
        if self.status < 0:
            try:
                name = signal.Signals(-self.status).name
            except ValueError:
                name = f"signal {-self.status}"
            return f"killed by {name}"
        return f"with exit status {self.status}"


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes the process tree wrote to its descriptor 1 or 2."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Made:
    """A layer that was missing when a start came through: `seconds` until it was there; `ours`: made for this start,
    else another's making was waited for."""

    warmth: Warmth
    seconds: float
    ours: bool


Event = Output | Exited
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Stats:
    """Of the whole process tree: resident MiB without what it shares, CPU seconds, processes."""

    memory_mb: float
    cpu_seconds: float
    processes: int


class Handle(Protocol):
    @property
    def pid(self) -> int: ...
    @property
    def warmth(self) -> Warmth:
        """The layer that existed when the start began."""

    @property
    def made(self) -> tuple[Made, ...]:
        """The layers that were missing, in order."""

    @property
    def exited(self) -> Exited | None: ...
    def signal(self, number: int) -> None:
        """Signal the main process; nothing happens when it is gone."""

    async def stop(self, grace: float) -> Exited:
        """SIGTERM, after `grace` seconds SIGKILL, of the whole tree; returns when nothing of it is alive."""

    def stats(self) -> Stats | None: ...


class Runtime(Protocol):
    async def start(self, spec: ContainerSpec, on_event: OnEvent) -> Handle:
        """Raises ForkFailed, and what preparing a layer raised (ImportFailed, CheckpointError …)."""

    async def run(self, spec: ContainerSpec, on_event: OnEvent) -> Handle:
        """`start` from the warmest of its layers that is there: none is made for it. Raises ForkFailed."""

    def on_gpu(self) -> tuple[str, ...]:
        """Digests of checkpoints that are whole on a GPU that no instance holds: a start of one finds it there."""

    async def prepare(self, spec: FunctionSpec, object_dir: str) -> None:
        """Make the layers that instances of `spec` start from, ahead of the first. Raises as `start` does."""

    async def close(self) -> None:
        """Kill everything it started, zygotes too."""
