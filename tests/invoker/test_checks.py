"""Checks of versions: what nobody waits for any more ends, and can be asked for again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sllm_invoker.checks import Checks

from sllm_faas.wire.messages import Check, Checked, Uncheck
from tests.controller.fakes import app, llm


class Ingests:
    """`brings`: who waits for a checkpoint."""

    def __init__(self) -> None:
        self.brings: list[asyncio.Future[tuple[str, int]]] = []
        self.most = self.waiting = 0
        self.asked = asyncio.Event()

    async def bring(self, *_: Any, **__: Any) -> tuple[str, int]:
        self.brings.append(asyncio.get_running_loop().create_future())
        self.asked.set()
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            return await self.brings[-1]
        finally:
            self.waiting -= 1

    async def until_asked(self) -> None:
        await self.asked.wait()
        self.asked.clear()


class Runtime:
    """Takes until `may_end` to stop preparing."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def prepare(self, *_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()


def version(number: int, name: str = "app") -> Check:
    return Check(app(llm(), name=name), number)


@pytest.fixture
def ingests() -> Ingests:
    return Ingests()


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def answers() -> list[Checked]:
    return []


@pytest.fixture
def checks(ingests: Ingests, runtime: Runtime, answers: list[Checked]) -> Checks:
    place: Any = SimpleNamespace(ingests=ingests, runtime=runtime)
    relay: Any = None
    return Checks(place, relay, answers.append, lambda _: None)


async def all_ended() -> None:
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


async def test_a_check_that_nobody_waits_for_waits_for_its_checkpoint_no_more(checks, ingests, runtime, answers):
    runtime.may_end.set()
    for check in (version(1), version(11), version(1, "other")):
        checks.check(check)
        await ingests.until_asked()
    for uncheck in (Uncheck("app", 1), Uncheck("app", 1), Uncheck("gone", 1)):
        checks.end(uncheck)
    for others in ingests.brings[1:]:
        others.set_exception(OSError("the mirror is gone"))
    await all_ended()
    assert ingests.brings[0].cancelled()
    assert sorted((answer.app, answer.version) for answer in answers) == [("app", 11), ("other", 1)]
    assert not checks.bundles()


async def test_one_that_is_asked_for_again_while_it_ends_is_another(checks, ingests, runtime, answers):
    """An app that was deleted and is deployed anew begins with the same number."""
    checks.check(version(1))
    await ingests.until_asked()
    checks.end(Uncheck("app", 1))
    checks.check(version(1))
    await ingests.until_asked()
    assert ingests.brings[0].cancelled()
    assert checks.bundles()
    runtime.may_end.set()
    ingests.brings[1].set_exception(OSError("the mirror is gone"))
    await all_ended()
    (answer,) = answers
    assert answer.error is not None
    assert not checks.bundles()


async def test_the_next_version_waits_for_the_checkpoint_before_the_one_it_supersedes_leaves(checks, ingests, runtime):
    """So what is being brought goes on."""
    runtime.may_end.set()
    checks.check(version(1))
    await ingests.until_asked()
    checks.check(version(2))
    checks.end(Uncheck("app", 1))
    await ingests.until_asked()
    assert ingests.most == 2
    ingests.brings[1].set_exception(OSError("the mirror is gone"))
    await all_ended()
    assert not checks.bundles()
