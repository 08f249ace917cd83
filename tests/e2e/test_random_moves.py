"""Running answers with random settings are moved at random while others come and go: each is the undisturbed one."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import httpx
import pytest

from benchmarks import moves
from benchmarks.common import leftovers
from tests.e2e.conftest import platform_at

pytestmark = pytest.mark.e2e


async def play(url: str, headers: dict[str, str]) -> moves.Run:
    async with httpx.AsyncClient(base_url=url, headers={**headers, "X-Sllm-Comments": "1"}, timeout=60) as client:
        run = moves.Run(client, random.Random(3), goal=20)
        await run.undisturbed(8)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(run.read())
            group.create_task(run.move())
        assert await leftovers(client, 20) == 0
        return run


def test_answers_that_are_moved_at_random_are_the_undisturbed_ones() -> None:
    with tempfile.TemporaryDirectory(prefix="sllm-moves-") as folder:
        app = Path(folder) / "app.py"
        app.write_text(moves.APP)
        with platform_at(Path(folder) / "state", "--invokers", "2") as platform:
            platform.sllm("deploy", str(app))
            run = asyncio.run(play(platform.url, platform.headers))
    assert run.wrong == []
    assert run.outcomes["moved"] >= 20
    assert run.moved_answers > 0
