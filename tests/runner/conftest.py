from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.runner.attach import prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import Engine
from sllm_invoker.runner.tokens import TextCodec

from tests.runner.harness import Runner, start

COUNTING = Path(__file__).parents[2] / "examples" / "counting" / "model"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="sllm-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def instances() -> Iterator[dict[str, Runner]]:
    """Instances that many tests share, started when first asked for. They end with the module: tests of
    containers may come next in this process, and these kill every child that is not theirs."""
    shared = _Shared()
    yield shared
    shared.close()


class _Shared(dict[str, Runner]):
    def __init__(self) -> None:
        super().__init__()
        self._open: list[tempfile.TemporaryDirectory[str]] = []
        self._contexts: list[object] = []

    def __missing__(self, name: str) -> Runner:
        directory = tempfile.TemporaryDirectory(prefix="sllm-")
        context = start(name, Path(directory.name))
        runner = context.__enter__()
        runner.ready()
        self._open.append(directory)
        self._contexts.append(context)
        self[name] = runner
        return runner

    def close(self) -> None:
        for context in self._contexts:
            context.__exit__(None, None, None)  # type: ignore[attr-defined]
        for directory in self._open:
            directory.cleanup()


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> CheckpointObject:
    """The tiny model that counts and rolls dice."""
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    ingest(store, str(COUNTING), "counting")
    return store.ensure_verified("counting")


@pytest.fixture(scope="session")
def codec(counting: CheckpointObject) -> TextCodec:
    return TextCodec.load(counting.directory)


@pytest.fixture
def open_engine(counting: CheckpointObject) -> Iterator[Callable[[], Engine]]:
    """Makes engines of the counting model, and closes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engines: list[Engine] = []

    def make() -> Engine:
        made = create(prepare(counting), cache_tokens=None, max_sequences=16)
        made.attach(counting.directory)
        engines.append(made)
        return made

    yield make
    for made in engines:
        made.close()
    torch.set_num_threads(threads)


@pytest.fixture
def engine(open_engine: Callable[[], Engine]) -> Engine:
    return open_engine()
