"""What an invoker asks of the objects on its node, and who waits for one that is being brought there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sllm_invoker.checkpoints import remote
from sllm_invoker.checkpoints.ingest import PROCESS, ingest
from sllm_invoker.checkpoints.room import stays
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.checks import Checks
from sllm_invoker.containers.process import ProcessRuntime
from sllm_invoker.containers.tree import Tree, recorded
from sllm_invoker.containers.zygote import become_subreaper
from sllm_invoker.ingests import MODELS, Ingests
from sllm_invoker.memory_tier import MemoryTier

from sllm_faas.errors import CheckpointCorrupt, CheckpointError, StorageFull
from sllm_faas.spec import CheckpointSpec
from sllm_faas.wire.messages import Check, Progress, Uncheck
from tests.checkpoints.faults import SLABS
from tests.checkpoints.model_server import WEIGHTS, Server, serving
from tests.controller.fakes import app, llm


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    become_subreaper()
    return Tree(tmp_path)


@pytest.fixture
async def runtime(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ProcessRuntime]:
    """What it forks trusts servers on this machine."""
    monkeypatch.setenv(remote.TRUSTED, "127.0.0.1")
    made = ProcessRuntime("node-0", tree)
    yield made
    await made.close()


@pytest.fixture
async def tier(store: CheckpointStore, tree: Tree) -> AsyncIterator[MemoryTier]:
    """Room for three slabs of 16 MiB."""
    made = MemoryTier(store.root, 48, tree, options=SLABS)
    made.start()
    yield made
    await made.close()


async def test_an_object_that_was_ready_is_so_at_once_until_its_files_change(
    filled: CheckpointStore, runtime: ProcessRuntime
):
    ingests = Ingests(filled, runtime)
    digest = filled.resolve("tiny")
    spec = CheckpointSpec("anything", digest=digest)
    assert await ingests.ready(spec, lambda *_: None) == filled.path(digest)

    later = Ingests(filled, runtime)
    assert later.refresh() == set()
    assert later.here == {digest}
    for each in (ingests, later):
        with pytest.raises(StopIteration) as answer:  # nothing else had to run for it
            each.ready(spec, lambda *_: None).send(None)
        assert answer.value.value == filled.path(digest)

    part = filled.get(digest).part_path()
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    with pytest.raises(CheckpointCorrupt):
        await ingests.ready(spec, lambda *_: None)


# -- brought by those who wait -------------------------------------------------------------------------------

HELD = 30_000
"""Bytes of the weights after which the mirror waits."""


@pytest.fixture
def server(source: Path) -> Iterator[Server]:
    with serving(source) as made:
        made.hold = HELD
        yield made


@pytest.fixture
def ingests(store: CheckpointStore, runtime: ProcessRuntime) -> Ingests:
    return Ingests(store, runtime)


def running(folder: Path) -> list[int]:
    """The processes on record in `folder` that ingest."""
    found = []
    for pid in recorded(folder):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == PROCESS:
                found.append(pid)
    return found


class Waiter:
    """Somebody who waits for a checkpoint; `under_way` is set when some of its weights are here."""

    def __init__(
        self, ingests: Ingests, spec: CheckpointSpec, folder: Path, *, pull: bool = False, ahead: bool = False
    ) -> None:
        self.under_way = asyncio.Event()
        before = sum(path.stat().st_size for path in folder.iterdir() if path.name == "config.json")

        def report(stage: str, done: int, _total: int) -> None:
            if stage == "fetch" and done > before:
                self.under_way.set()

        pulls = pull or ahead
        waits = ingests.bring(spec, "tiny", report, ahead=ahead) if pulls else ingests.ready(spec, report)
        self.task: asyncio.Task[object] = asyncio.create_task(waits)

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def all_ended() -> None:
    """Every other task of this loop."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


async def test_a_pull_that_nobody_waits_for_any_more_ends_and_the_next_goes_on(ingests, server, source, tmp_path):
    waiter = Waiter(ingests, CheckpointSpec(server.url), source)
    await waiter.under_way.wait()
    assert running(tmp_path)
    await waiter.leave()
    await all_ended()
    assert await asyncio.to_thread(server.left.wait, 30), "its process is gone"
    assert not running(tmp_path)


async def test_a_pull_ends_with_the_check_of_a_version_that_was_superseded(ingests, server, source, tmp_path):
    under_way, answers = asyncio.Event(), []
    before = (source / "config.json").stat().st_size

    def report(step: Progress) -> None:
        if step.stage == "fetch" and step.done > before:
            under_way.set()

    class Runtime:
        async def prepare(self, *_: object) -> None:
            """Its libraries are there."""

    place: Any = SimpleNamespace(ingests=ingests, runtime=Runtime())
    relay: Any = None
    checks = Checks(place, relay, answers.append, report)
    checks.check(Check(app(llm(source=server.url)), 1))
    await under_way.wait()
    assert running(tmp_path)
    checks.end(Uncheck("app", 1))
    await all_ended()
    assert await asyncio.to_thread(server.left.wait, 30), "its process is gone"
    assert not running(tmp_path)
    assert not answers
    assert not list((ingests.store.root / "objects").iterdir())

    server.go_on()
    ingest(ingests.store, server.url, "tiny")
    assert server.weights_asked() == ["", f"bytes={HELD}-"]


async def test_one_of_two_who_wait_for_a_pull_may_leave(ingests, server, source):
    """The other one is told how it ended: here, that it is not the content asked for."""
    spec = CheckpointSpec(server.url, revision=f"blake3:{'0' * 64}")
    start = Waiter(ingests, spec, source)
    await start.under_way.wait()
    pull = Waiter(ingests, spec, source, pull=True)
    await asyncio.sleep(0)  # it waits
    await start.leave()
    server.go_on()
    with pytest.raises(CheckpointCorrupt, match="was asked for"):
        await pull.task
    assert server.weights_asked() == [""]


async def test_a_pull_ahead_of_need_gives_way_until_a_start_needs_it(ingests, server, source, tmp_path):
    """Then it goes on from there, and whoever had asked for it before is told how it ended too."""

    async def niceness() -> int:
        (pid,) = running(tmp_path)
        return os.getpriority(os.PRIO_PROCESS, pid)

    spec = CheckpointSpec(server.url, revision=f"blake3:{'0' * 64}")
    copy = Waiter(ingests, spec, source, ahead=True)
    await copy.under_way.wait()
    assert await niceness() == 19
    start = Waiter(ingests, spec, source)
    assert await asyncio.to_thread(server.left.wait, 30), "its process is gone"
    server.go_on()
    for waiter in (start, copy):
        with pytest.raises(CheckpointCorrupt, match="was asked for"):
            await waiter.task
    assert server.weights_asked() == ["", f"bytes={HELD}-"]


async def test_who_asks_while_a_pull_is_being_given_up_gets_one_of_its_own(ingests, server, source):
    spec = CheckpointSpec(server.url, revision=f"blake3:{'0' * 64}")
    first = Waiter(ingests, spec, source)
    await first.under_way.wait()
    first.task.cancel()
    second = Waiter(ingests, spec, source)
    server.hold = 0
    with pytest.raises(CheckpointCorrupt, match="was asked for"):
        await second.task
    assert first.task.cancelled()
    assert server.weights_asked() == ["", f"bytes={HELD}-"]
    assert (source / WEIGHTS).stat().st_size > HELD


# -- what they bring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["base", "libs"])
async def test_what_its_spec_says_is_brought_from_whatever_layer_there_is(store, source, runtime, layer):
    await (runtime.warm() if layer == "base" else runtime.prepare(MODELS, ""))
    ingests = Ingests(store, runtime)
    digest, size = await ingests.bring(CheckpointSpec(str(source), tensor_parallel=2), "parts", lambda *_: None)
    found = store.get(digest).manifest
    assert (found.layout.tensor_parallel, found.total_bytes) == (2, size)
    assert stays(store) == {}


@pytest.mark.e2e
async def test_a_start_of_what_was_evicted_brings_it_again(store, model, size, runtime):
    changes: list[set[str]] = []
    ingests = Ingests(store, runtime, limit=size * 3 // 2, changed=lambda: changes.append(ingests.refresh()))
    specs = [CheckpointSpec(str(model(name))) for name in "ab"]
    first = (await ingests.ready(specs[0], lambda *_: None)).name
    assert ingests.here == {first}
    lease = store.use(first)
    with pytest.raises(StorageFull, match="in use"):
        await ingests.ready(specs[1], lambda *_: None)
    lease.close()
    second = (await ingests.ready(specs[1], lambda *_: None)).name
    assert (ingests.here, {first} in changes) == ({second}, True)

    known = CheckpointSpec(specs[0].source, digest=first)
    assert await ingests.ready(known, lambda *_: None) == store.path(first)
    assert (ingests.here, {second} in changes) == ({first}, True)
    store.verify(first)


@pytest.mark.e2e
async def test_what_was_brought_is_found_in_memory(store, source, runtime, tier):
    ingests = Ingests(store, runtime, feed=tier.feed)
    spec = CheckpointSpec(str(source))
    digest, _ = await ingests.bring(spec, "tiny", lambda *_: None, forward=False)
    assert (await tier.look()).residents == ()
    store.remove(digest)
    directory = await ingests.ready(spec, lambda *_: None)
    loaded = await tier.open(digest, directory, prefetch=True).loaded
    assert (loaded.tier, loaded.bytes) == ("dram", 0)
    assert tier.resident() == (digest,)


async def test_one_that_is_killed_is_an_error_and_the_next_goes_on(ingests, server, source, tmp_path):
    waiter = Waiter(ingests, CheckpointSpec(server.url), source)
    await waiter.under_way.wait()
    (pid,) = running(tmp_path)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="ended killed by SIGKILL and with no answer"):
        await waiter.task
    server.go_on()
    ingest(ingests.store, server.url, "tiny")
    assert server.weights_asked() == ["", f"bytes={HELD}-"]
