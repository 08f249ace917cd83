"""What a start asks of the node's memory tier, and how urgently."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from sllm_invoker.checkpoints.channel import Loaded
from sllm_invoker.checkpoints.priority import Priority
from sllm_invoker.container import Place
from sllm_invoker.instances import Instances
from sllm_invoker.memory_tier import Opening

from sllm_faas.spec import CheckpointSpec, FunctionSpec, Target
from sllm_faas.wire.messages import Start, Stop

SPEC = FunctionSpec("model", kind="llm", checkpoint=CheckpointSpec("x", digest="0" * 64))


class Ingests:
    """Whatever is asked for is here, as soon as it `may_be`."""

    def __init__(self, directory: Path) -> None:
        self.store = MagicMock()
        self.may_be = asyncio.Event()
        self._directory = directory

    async def ready(self, *_: object, **__: object) -> Path:
        await self.may_be.wait()
        return self._directory


class Tier:
    """Reads nothing; notes how urgently it was to."""

    def __init__(self) -> None:
        self.opened: asyncio.Queue[Priority] = asyncio.Queue()
        self.hastened: list[tuple[int, Priority]] = []

    def open(self, _digest: str, _directory: Path, *, priority: Priority) -> Opening:
        self.opened.put_nowait(priority)
        loaded: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        return Opening(5, None, loaded)

    def hasten(self, opening: Opening, priority: Priority) -> None:
        self.hastened.append((opening.request, priority))

    def grant(self, megabytes: int) -> None:
        pass


class Node:
    def __init__(self, directory: Path) -> None:
        runtime, relay = MagicMock(), MagicMock()
        runtime.start.side_effect = lambda *_: asyncio.Event().wait()  # never
        relay.link.return_value.__enter__.return_value.fileno.return_value = -1
        relay.core.served.return_value = False
        relay.core.running.return_value = 0
        self.tier, self.ingests = Tier(), Ingests(directory)
        place = Place("n", directory, directory, runtime, MagicMock(), self.ingests, self.tier, MagicMock(), 1000)  # type: ignore[arg-type]
        self.instances = Instances(place, relay, lambda _: None)

    def start(self, *, ahead: bool) -> None:
        self.instances.start(Start("ins", Target("app", "model", 1), SPEC, ahead=ahead))

    async def close(self) -> None:
        self.instances.stop(Stop("ins", 0.0))
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


@pytest.mark.parametrize(("ahead", "priority"), [(True, Priority.AHEAD), (False, Priority.WAITED)])
async def test_a_start_that_somebody_waits_for_reads_first(tmp_path: Path, ahead: bool, priority: Priority) -> None:
    node = Node(tmp_path)
    node.start(ahead=ahead)
    node.ingests.may_be.set()
    assert await node.tier.opened.get() is priority
    await node.close()


async def test_a_read_ahead_of_need_is_hastened_once_when_somebody_waits(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.start(ahead=True)
    node.ingests.may_be.set()
    await node.tier.opened.get()
    for name in ("ins", "ins", "another"):
        node.instances.hasten(name)
    assert node.tier.hastened == [(5, Priority.WAITED)]
    await node.close()


async def test_what_is_hastened_before_it_is_read_is_read_first(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.start(ahead=True)
    node.instances.hasten("ins")
    node.ingests.may_be.set()
    assert await node.tier.opened.get() is Priority.WAITED
    assert node.tier.hastened == []
    await node.close()
