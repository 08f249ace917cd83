"""Who has which GPU: the table, the pool, and real worker processes before a driver that the test plays."""

from __future__ import annotations

import ast
import asyncio
import ctypes
import os
import signal
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sllm_invoker.containers import gpu_workers, nvml, tree
from sllm_invoker.containers.gpus import SLACK, TABLE, Gpu, GpuPool

from sllm_faas.errors import IllegalTransition, NoCapacity, PlatformError, StartFailed
from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec

from .conftest import Containers, Watched

GB = 1 << 30
CODE = FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), gpus=1)


def pool_of(*uuids: str, **options: Any) -> GpuPool:
    pool = GpuPool(**options)
    for uuid in uuids:
        pool.add(Gpu(uuid, "H100", 80 * GB), 79 * GB)
    return pool


# -- the pool ------------------------------------------------------------------------------------------------


def test_what_the_table_does_not_say_is_an_error() -> None:
    pool = pool_of("a")
    with pytest.raises(IllegalTransition, match="GPU a is free: end"):
        pool.end("a")
    assert ("lost", "take") not in TABLE


def test_a_device_with_a_worker_is_taken_first() -> None:
    pool = pool_of("a", "b")
    pool.grown("b")
    assert pool.take() == "b"
    assert pool.take() == "a"
    with pytest.raises(NoCapacity, match="a is held, b is held"):
        pool.take()


def test_each_device_wants_its_spares_and_another_one_while_an_instance_runs() -> None:
    pool = pool_of("a", "b", spares=2)
    assert pool.missing(0) == ["a", "a", "b", "b"]
    for uuid in pool.missing(0):
        pool.grown(uuid)
    assert pool.missing(0) == []
    pool.became(pool.take())
    assert pool.missing(0) == ["a"]


def test_a_worker_that_keeps_dying_is_made_again_more_and_more_seldom() -> None:
    pool, waits = pool_of("a", first_backoff=1, max_backoff=5), []
    for _ in range(5):
        pool.grown("a")
        waits.append(pool.died("a", 100.0))
    assert waits == [1, 2, 4, 5, 5]
    assert (pool.missing(104.9), pool.missing(105.0)) == ([], ["a"])
    pool.grown("a")
    pool.ready("a", 79 * GB, 78 * GB)
    assert pool.died("a", 200.0) == 1


def test_memory_is_back_when_only_the_waiting_workers_hold_some() -> None:
    pool = pool_of("a")
    pool.grown("a")
    pool.ready("a", 79 * GB, 78 * GB)
    assert pool.context == GB
    pool.became(pool.take())
    pool.grown("a")
    pool.ready("a", 60 * GB, 40 * GB)  # beside an instance that takes memory too: nothing is learned
    assert pool.context == GB
    pool.end("a")
    assert not pool.settle("a", 77 * GB)
    assert pool.state("a") == "returning"
    assert pool.settle("a", 78 * GB - SLACK)
    assert pool.state("a") == "free"


def test_what_was_left_on_a_device_on_purpose_need_not_come_back() -> None:
    pool = pool_of("a")
    pool.take()
    pool.end("a")
    assert not pool.settle("a", 60 * GB, kept=18 * GB)
    assert pool.settle("a", 60 * GB, kept=19 * GB)


def test_the_device_that_has_most_of_what_is_needed_comes_first_then_workers_then_the_emptiest() -> None:
    pool = pool_of("a", "b", "c", "d")
    pool.grown("b")
    kept = {"a": 5, "b": 9, "c": 4, "d": 3}
    assert pool.take({"c": 2, "a": 1}, kept) == "c"
    assert pool.take({"c": 2}, kept) == "b"
    assert pool.take({}, kept) == "d"


def test_a_device_whose_memory_is_late_is_nobodys_until_it_is_back() -> None:
    pool = pool_of("a")
    pool.take()
    pool.end("a")
    pool.late("a")
    assert (pool.lost(), pool.missing(0)) == (("a",), [])
    with pytest.raises(NoCapacity, match="a is lost"):
        pool.take()
    assert pool.settle("a", 79 * GB)
    assert pool.take() == "a"


class Histories(RuleBasedStateMachine):
    """Instances hold memory of their own; whatever happens, nobody gets a device on which some is left."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of("a", "b")
        self.pool.context = GB
        self.left = {"a": 0, "b": 0}
        self.workers = {"a": 0, "b": 0}

    def free(self, uuid: str) -> int:
        return 79 * GB - self.left[uuid] - self.workers[uuid] * GB

    @rule()
    def spare(self) -> None:
        for uuid in self.pool.missing(0.0):
            self.pool.grown(uuid)
            self.workers[uuid] += 1

    @precondition(lambda self: "free" in self.pool.states().values())
    @rule(memory=st.integers(0, 60))
    def take(self, memory: int) -> None:
        uuid = self.pool.take()
        assert self.left[uuid] <= SLACK
        if self.workers[uuid]:
            self.pool.became(uuid)
            self.workers[uuid] -= 1
        self.left[uuid] = memory * GB

    @rule(uuid=st.sampled_from("ab"), gone=st.booleans(), late=st.booleans())
    def end(self, uuid: str, gone: bool, late: bool) -> None:
        if self.pool.state(uuid) == "held":
            self.pool.end(uuid)
        if gone:
            self.left[uuid] = 0
        if self.pool.state(uuid) in ("returning", "lost") and self.pool.settle(uuid, self.free(uuid)):
            return
        if self.pool.state(uuid) == "returning" and late:
            self.pool.late(uuid)

    @invariant()
    def what_is_free_is_empty(self) -> None:
        assert all(self.left[uuid] <= SLACK for uuid, state in self.pool.states().items() if state == "free")


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


# -- the driver ----------------------------------------------------------------------------------------------


class Library:
    """NVML as C sees it."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 999 if name == self.fails else getattr(self, f"_{name}")(*arguments)

    def _nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = 0x1000 + index.value
        return 0

    def _nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, buffer: Any, _size: Any) -> int:
        buffer.value = f"GPU-{handle.value:x}".encode()
        return 0

    def _nvmlDeviceGetName(self, _handle: Any, buffer: Any, _size: Any) -> int:
        buffer.value = b"NVIDIA H100"
        return 0

    def _nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, info: Any) -> int:
        info._obj.total, info._obj.free = 80 * GB, handle.value * GB // 0x1000
        return 0


def test_the_drivers_library_names_the_gpus_and_their_memory() -> None:
    probe = nvml.Nvml(Library())
    assert probe.gpus() == (Gpu("GPU-1000", "NVIDIA H100", 80 * GB), Gpu("GPU-1001", "NVIDIA H100", 80 * GB))
    assert probe.free("GPU-1000") == GB
    with pytest.raises(PlatformError, match="nvmlDeviceGetCount_v2 failed with NVML error 999"):
        nvml.Nvml(Library(fails="nvmlDeviceGetCount_v2")).gpus()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "abc"), ("", ""), ("1", "b"), ("2,0", "ca"), ("GPU-b", "b"), ("0,7,1", "a"), ("GPU-", ""), ("-1", "")],
)
def test_a_node_has_only_the_gpus_it_was_allowed(visible: str | None, expected: str) -> None:
    uuids = [f"GPU-{letter}" for letter in "abc"]
    assert nvml.allowed(uuids, visible) == tuple(f"GPU-{letter}" for letter in expected)


# -- workers as processes ------------------------------------------------------------------------------------


class Driver:
    """A `Probe`; `left` is what dead instances did not give back."""

    def __init__(self, *uuids: str) -> None:
        self.uuids = uuids
        self.left = dict.fromkeys(uuids, 0)

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(Gpu(uuid, "H100", 80 * GB) for uuid in self.uuids)

    def free(self, uuid: str) -> int:
        return 79 * GB - self.left[uuid]


@pytest.fixture
def driver() -> Driver:
    return Driver("GPU-0")


@pytest.fixture
def options(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(gpu_workers, "PATIENCE", 0.2)
    return {"probe": driver, "warm": "stub_runner:warm"}


async def waiting(containers: Containers) -> int:
    """The pid of a worker that is up and waits."""
    gpus = containers.runtime.gpus
    gpus.tidy()
    async with asyncio.timeout(30):
        while not gpus.ready:
            await asyncio.sleep(0.01)
    (tasks,) = gpus._waiting.values()
    return tasks[0].result().pid


async def test_a_worker_that_waits_becomes_the_instance_and_sees_its_gpu_alone(containers: Containers) -> None:
    pid = await waiting(containers)
    one = await containers.start("one", "gpu", CODE)
    assert (one.handle.pid, one.handle.warmth, one.handle.made) == (pid, "libs", ())
    assert "sees 'GPU-0'" in await one.says("up one")
    assert await one.handle.stop(0) == (one.handle.exited)
    assert str(one.handle.exited) == "killed by SIGKILL"


async def test_the_first_start_waits_for_a_worker_and_says_so(containers: Containers) -> None:
    one = await containers.start("one", "exit", CODE)
    assert one.handle.warmth == "cold"
    assert [(made.warmth, made.ours) for made in one.handle.made] == [("libs", True)]
    assert str(await one.ends()) == "with exit status 3"


async def test_one_device_is_held_by_one_instance(containers: Containers) -> None:
    one = await containers.start("one", spec=CODE)
    with pytest.raises(NoCapacity, match="GPU-0 is held"):
        await containers.start("two", spec=CODE)
    await one.handle.stop(0)
    assert await (await containers.start("two", spec=CODE)).says("up two")


async def test_who_asks_for_no_gpu_sees_none(containers: Containers) -> None:
    one = await containers.start("one", "gpu")
    assert "sees ''" in await one.says("up one")


async def test_a_device_is_nobodys_until_its_memory_is_back(containers: Containers, driver: Driver) -> None:
    one = await containers.start("one", spec=CODE)
    await one.says("up one")
    spare = await waiting_beside(containers)
    driver.left["GPU-0"] = 10 * GB
    await one.handle.stop(0)
    assert not tree.alive(spare), "the worker that may hold the memory was kept"
    with pytest.raises(NoCapacity, match="GPU-0 is lost"):
        await containers.start("two", spec=CODE)
    driver.left["GPU-0"] = 0
    containers.runtime.gpus.tidy()
    assert await (await containers.start("two", spec=CODE)).says("up two")


async def waiting_beside(containers: Containers) -> int:
    """The pid of a worker that waits while an instance runs."""
    gpus = containers.runtime.gpus
    gpus.tidy()
    (task,) = gpus._waiting["GPU-0"]
    return (await asyncio.wait_for(asyncio.shield(task), 30)).pid


async def test_memory_that_a_waiting_worker_held_is_back_once_that_is_ended(
    containers: Containers, driver: Driver
) -> None:
    one = await containers.start("one", spec=CODE)
    await one.says("up one")
    spare = await waiting_beside(containers)
    free = driver.free
    driver.free = lambda uuid: free(uuid) - 10 * GB * tree.alive(spare)  # type: ignore[method-assign]
    await one.handle.stop(0)
    assert containers.runtime.gpus.pool.state("GPU-0") == "free"


async def test_a_worker_that_dies_waiting_is_replaced(containers: Containers) -> None:
    containers.runtime.gpus.pool.first_backoff = 0.0
    pid = await waiting(containers)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while containers.runtime.gpus.ready:
            await asyncio.sleep(0.01)
    assert await waiting(containers) != pid


async def test_a_start_that_is_given_up_leaves_the_device_free(containers: Containers) -> None:
    start = asyncio.create_task(containers.start("one", spec=CODE))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert containers.runtime.gpus.pool.state("GPU-0") == "free"
    two: Watched = await containers.start("two", spec=CODE)
    assert [made.ours for made in two.handle.made] == [False], "the worker that was begun was not used"


MODEL = FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("anything"), gpus=1)


async def keeps(containers: Containers, name: str, count: int, checkpoint: str = "a") -> tuple[Watched, list[str]]:
    """An instance that gets so many of its three groups whole, and whose those are that it found."""
    one = await containers.start(name, f"keep{count}", MODEL, f"/objects/{checkpoint}")
    said = await one.says(f"up {name}")
    return one, ast.literal_eval(said.split("found ")[1].splitlines()[0])


async def test_what_a_killed_instance_had_whole_is_the_next_ones(containers: Containers) -> None:
    one, found = await keeps(containers, "one", 2)
    assert found == ["", "", ""]
    pid = one.handle.pid
    os.kill(pid, signal.SIGKILL)
    await one.ends()
    two, found = await keeps(containers, "two", 3)
    assert found == [f"{pid}:0", f"{pid}:1", ""]
    assert containers.runtime.on_gpu() == (), "nobody else can start there"
    await two.handle.stop(0)
    assert containers.runtime.on_gpu() == ("a",)
    three, found = await keeps(containers, "three", 3, checkpoint="b")
    assert found == ["", "", ""], "another checkpoint's memory was handed out"
    await three.handle.stop(0)
    assert containers.runtime.on_gpu() == ("a", "b")


async def test_code_that_takes_a_device_finds_it_empty(containers: Containers) -> None:
    one, _ = await keeps(containers, "one", 3)
    await one.handle.stop(0)
    two = await containers.start("two", spec=CODE)
    await two.says("up two")
    await two.handle.stop(0)
    assert containers.runtime.on_gpu() == ()


async def test_memory_that_does_not_come_back_takes_what_is_kept_with_it(
    containers: Containers, driver: Driver
) -> None:
    one, _ = await keeps(containers, "one", 3)
    memory, free = containers.runtime.gpus.memory, driver.free
    driver.free = lambda uuid: free(uuid) - GB * bool(memory.used(uuid))  # type: ignore[method-assign]
    await one.handle.stop(0)
    assert memory.resident(["GPU-0"]) == ()
    assert containers.runtime.gpus.pool.state("GPU-0") == "free"


class TestTwo:
    @pytest.fixture
    def driver(self) -> Driver:
        return Driver("GPU-0", "GPU-1")

    async def test_an_instance_gets_the_device_that_has_its_checkpoint(self, containers: Containers) -> None:
        one, _ = await keeps(containers, "one", 3)
        two, _ = await keeps(containers, "two", 1, checkpoint="b")
        assert (one.handle.gpu, two.handle.gpu) == ("GPU-0", "GPU-1")
        for each in (one, two):
            await each.handle.stop(0)
        three, found = await keeps(containers, "three", 1, checkpoint="b")
        assert (three.handle.gpu, found) == ("GPU-1", [f"{two.handle.pid}:0", "", ""])


class TestBroken:
    @pytest.fixture
    def options(self, driver: Driver) -> dict[str, Any]:
        return {"probe": driver, "warm": "stub_runner:broken"}

    async def test_why_a_worker_did_not_come_up_is_the_starters_error(self, containers: Containers) -> None:
        for _ in range(2):
            with pytest.raises(StartFailed, match="no driver"):
                await containers.start("one", spec=CODE)
            assert containers.runtime.gpus.pool.state("GPU-0") == "free"


class TestNone:
    @pytest.fixture
    def driver(self) -> Driver:
        return Driver()

    async def test_a_node_without_gpus_says_so(self, containers: Containers) -> None:
        with pytest.raises(NoCapacity, match="no GPU is free here: there is none"):
            await containers.start("one", spec=CODE)
