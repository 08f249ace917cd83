"""A controller in a state directory of its own, and peers that have said HELLO."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sllm_faas.config import Config
from sllm_faas.controller.service import Controller
from tests.controller.fakes import Gateway, Invoker


@pytest.fixture
def state_dir() -> Iterator[Path]:
    # Not tmp_path: a socket's path must stay under 100 bytes.
    path = Path(tempfile.mkdtemp(prefix="sllm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def config(state_dir: Path) -> Config:
    config = Config(state_dir=state_dir)
    config.prepare()
    return config


@pytest.fixture
async def controller(config: Config) -> AsyncIterator[Controller]:
    controller = Controller(config)
    await controller.start()
    yield controller
    await controller.stop()


@pytest.fixture
async def gateway(controller: Controller) -> AsyncIterator[Gateway]:
    peer = Gateway(controller.endpoints[0], "gateway", "gateway-0")
    await peer.hello()
    yield peer
    peer.close()


@pytest.fixture
async def invoker(controller: Controller) -> AsyncIterator[Invoker]:
    peer = Invoker(controller.endpoints[0], "invoker", "node-0")
    await peer.hello()
    yield peer
    peer.close()
