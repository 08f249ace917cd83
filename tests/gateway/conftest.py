"""One served gateway per module between scripted peers, over real sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.gateway.fakes import Rig, rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Rig]:
    directory = Path(tempfile.mkdtemp(prefix="gw"))  # sockets need a short path
    try:
        async with rig(directory) as made:
            yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)
