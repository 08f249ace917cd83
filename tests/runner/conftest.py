from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.harness import Runner, start


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="sllm-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def instances() -> Iterator[dict[str, Runner]]:
    """Instances that many tests share, started when first asked for."""
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
