"""Containers as real processes: forked from zygotes, and gone with all that is theirs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sllm_invoker.containers import tree
from sllm_invoker.containers.base import Exited

from sllm_faas.errors import SllmError
from sllm_faas.spec import FunctionSpec, MethodSpec

from .conftest import Containers


async def until(condition: Callable[[], bool]) -> None:
    """Turns of the loop until it holds: what is waited for is another process's, or the loop's own, and sends no event
    to a test."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_output_below_python_is_read_to_the_end(containers: Containers) -> None:
    one = await containers.start("one")
    await one.says("below python")
    assert "up one" in one.text
    assert await one.handle.stop(0) == Exited(-signal.SIGKILL)


async def test_the_exit_status_is_told(containers: Containers) -> None:
    one = await containers.start("one", "exit")
    assert await one.ends() == Exited(3)
    assert str(one.handle.exited) == "with exit status 3"


async def test_a_start_says_from_which_warmth_it_began(containers: Containers) -> None:
    cold = await containers.start("one")
    warm = await containers.start("two")
    assert (cold.handle.warmth, warm.handle.warmth) == ("cold", "base")


async def test_nothing_of_its_family_outlives_an_instance(containers: Containers) -> None:
    one = await containers.start("one", "family")
    await one.says("up one")
    family = tree.descendants(one.handle.pid)
    assert len([pid for pid in family if tree.alive(pid)]) == 2
    other = await containers.start("two")
    os.kill(one.handle.pid, signal.SIGKILL)
    await one.ends()
    assert not [pid for pid in family if tree.alive(pid)]
    assert other.handle.exited is None and tree.alive(other.handle.pid)


async def test_what_ignores_sigterm_is_killed_after_the_grace(containers: Containers) -> None:
    one = await containers.start("one", "stubborn")
    await one.says("up one")
    assert await one.handle.stop(0.05) == Exited(-signal.SIGKILL)


async def test_twenty_starts_at_once(containers: Containers) -> None:
    many = await asyncio.gather(*(containers.start(f"i{number}") for number in range(20)))
    assert len({each.handle.pid for each in many}) == 20
    await asyncio.gather(*(each.says("up") for each in many))


async def test_a_killed_zygote_touches_no_instance_and_is_made_again(containers: Containers) -> None:
    one = await containers.start("one")
    await one.says("up one")
    base = one.handle.pid and tree.look(one.handle.pid)
    assert base
    os.kill(base.parent, signal.SIGKILL)
    two = await containers.start("two")
    await two.says("up two")
    assert one.handle.exited is None and tree.alive(one.handle.pid)
    assert await one.handle.stop(0) == Exited(-signal.SIGKILL)


async def test_a_layer_that_lives_serves_though_the_one_below_it_died(containers: Containers) -> None:
    code = FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), libs=("numpy",))
    one = await containers.start("one", spec=code)
    assert [made.warmth for made in one.handle.made] == ["base", "libs"]
    instance = tree.look(one.handle.pid)
    libs = instance and tree.look(instance.parent)
    assert libs and libs.parent != os.getpid()
    os.kill(libs.parent, signal.SIGKILL)
    await until(lambda: "base" not in containers.runtime.pool.layers())
    two = await containers.start("two", spec=code)
    assert (two.handle.warmth, two.handle.made) == ("libs", ())
    await two.says("up two")


async def test_an_instance_inherits_no_descriptor_of_its_zygotes(containers: Containers) -> None:
    one = await containers.start("one", "descriptors")
    text = await one.says("up one")
    fds = [int(word) for word in text.splitlines()[0].split()[1:]]
    assert len(fds) <= 5, text  # standard three, the lifeline, the directory being listed


async def test_two_instances_draw_different_numbers(containers: Containers) -> None:
    texts = [await (await containers.start(name, "random")).says("up") for name in ("one", "two")]
    assert texts[0].splitlines()[0] != texts[1].splitlines()[0]


async def standby_of(containers: Containers, key: str = "base") -> int:
    """The process that will be the next instance of that layer, once it waits for that."""
    link = containers.runtime._zygotes[key]
    await until(lambda: link.standby != 0)
    return link.standby


async def test_the_next_instance_is_the_process_that_stood_by(containers: Containers) -> None:
    one = await containers.start("one", "random")
    ahead = await standby_of(containers)
    two = await containers.start("two", "random")
    three = await containers.start("three", "random")
    assert two.handle.pid == ahead != three.handle.pid
    drawn = {(await each.says("up")).splitlines()[0] for each in (one, two, three)}
    assert len(drawn) == 3
    assert await two.handle.stop(0) == Exited(-signal.SIGKILL)
    assert await standby_of(containers) != ahead


async def test_one_that_stood_by_tells_its_exit_status(containers: Containers) -> None:
    await containers.start("one")
    await standby_of(containers)
    two = await containers.start("two", "exit")
    assert await two.ends() == Exited(3)


async def test_one_that_stood_by_inherits_no_descriptor(containers: Containers) -> None:
    await containers.start("one")
    await standby_of(containers)
    text = await (await containers.start("two", "descriptors")).says("up two")
    fds = [int(word) for word in text.splitlines()[0].split()[1:]]
    assert len(fds) <= 5, text


async def test_one_that_dies_while_it_stands_by_is_done_without(containers: Containers) -> None:
    one = await containers.start("one")
    ahead = await standby_of(containers)
    os.kill(ahead, signal.SIGKILL)
    await until(lambda: containers.runtime._zygotes["base"].standby == 0)
    two = await containers.start("two")
    assert await two.says("up two")
    assert two.handle.pid != ahead and one.handle.exited is None
    assert await standby_of(containers) != ahead


async def test_one_that_stands_by_ends_with_its_zygote(containers: Containers) -> None:
    one = await containers.start("one")
    ahead = await standby_of(containers)
    base = tree.look(one.handle.pid)
    assert base
    os.kill(base.parent, signal.SIGKILL)
    await until(lambda: not tree.alive(ahead))


async def test_one_that_stands_by_is_memory_of_its_layer(containers: Containers) -> None:
    code = FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), libs=("numpy",))
    await containers.start("one", spec=code)
    alone = containers.runtime.pool.memory_mb()
    await standby_of(containers, "libs:numpy")
    await until(lambda: containers.runtime.pool.memory_mb() > alone)


async def test_a_template_that_cannot_be_prepared_is_the_starters_error(
    containers: Containers, llm: FunctionSpec
) -> None:
    with pytest.raises(SllmError) as caught:
        await containers.start("one", spec=llm, object_dir="/nowhere")
    assert caught.value.traceback
    assert await (await containers.start("two")).says("up two")


async def test_the_tree_is_on_record_while_it_lives(containers: Containers) -> None:
    one = await containers.start("one")
    assert one.handle.pid in tree.recorded(containers.directory)
    await one.handle.stop(0)
    assert one.handle.pid not in tree.recorded(containers.directory)


def test_the_record_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LINES", 10)
    here = tree.Tree(tmp_path)
    here.add(os.getpid())
    for _ in range(50):
        here.add(os.getppid())
        here.remove(os.getppid())
        assert set(tree.recorded(tmp_path)) == {os.getpid()}
    assert len((tmp_path / tree.RECORD).read_bytes().splitlines()) <= 11


async def test_stats_count_the_whole_family(containers: Containers) -> None:
    one = await containers.start("one", "family")
    await one.says("up one")
    stats = one.handle.stats()
    assert stats is not None and stats.processes >= 3 and stats.memory_mb > 0
    await one.handle.stop(0)
    assert one.handle.stats() is None


def test_a_record_whose_process_is_another_now_kills_nobody(tmp_path: Path) -> None:
    (tmp_path / tree.RECORD).write_text(json.dumps({"pid": os.getppid(), "started": 1}))
    assert tree.reap(tmp_path) == 0
    assert not (tmp_path / tree.RECORD).exists()


def test_what_is_no_line_of_a_record_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / tree.RECORD).write_bytes(b'[1]\n\xff\n{"pid": 1}\n{"pid": 5, "started": 7}\n{"pid": ')
    assert tree.recorded(tmp_path) == {5: 7}
    assert tree.reap(tmp_path) == 0


async def test_a_zygote_that_died_is_made_again_before_anybody_needs_it(containers: Containers) -> None:
    one = await containers.start("one")
    await one.says("up one")
    base = tree.look(one.handle.pid or 0)
    assert base
    os.kill(base.parent, signal.SIGKILL)
    await until(lambda: "base" not in containers.runtime.pool)

    def made_again() -> bool:
        containers.runtime.tidy()
        return "base" in containers.runtime.pool

    await until(made_again)
    two = await containers.start("two")
    assert two.handle.warmth == "base"
