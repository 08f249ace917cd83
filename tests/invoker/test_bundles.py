"""Bundles are fetched once, in parts, checked, and appear whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sllm_invoker.bundles import Bundles

from sllm_faas import bundle
from sllm_faas.errors import BadSpec, NotFound, SllmError
from sllm_faas.wire.messages import BundleGet, BundlePart


class Controller:
    """Answers each BUNDLE_GET with `size` bytes of what it has."""

    def __init__(self, directory: Path, content: dict[str, bytes], size: int = 100) -> None:
        self.content = content
        self.size = size
        self.asked: list[BundleGet] = []
        self.bundles = Bundles(directory, self.ask)

    def ask(self, wanted: BundleGet) -> bool:
        self.asked.append(wanted)
        data = self.content.get(wanted.digest, b"")
        part = BundlePart(wanted.digest, wanted.offset, len(data))
        piece = data[wanted.offset : wanted.offset + self.size]
        asyncio.get_running_loop().call_soon(self.bundles.part, part, piece)
        return True


@pytest.fixture
def packed(tmp_path: Path) -> bundle.Bundle:
    source = tmp_path / "code"
    source.mkdir()
    (source / "app.py").write_text("x = 1\n" * 200)
    return bundle.pack(source)


async def test_it_comes_in_parts_and_only_once(tmp_path: Path, packed: bundle.Bundle) -> None:
    controller = Controller(tmp_path / "src", {packed.digest: packed.data})
    paths = await asyncio.gather(*(controller.bundles.get(packed.digest) for _ in range(3)))
    assert {path.name for path in paths} == {packed.digest}
    assert (paths[0] / "app.py").read_text().startswith("x = 1")
    asked = len(controller.asked)
    assert asked == -(-len(packed.data) // 100)
    await controller.bundles.get(packed.digest)
    assert len(controller.asked) == asked


async def test_one_that_the_controller_has_not_got_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await Controller(tmp_path / "src", {}).bundles.get("0" * 64)


async def test_a_damaged_one_never_appears(tmp_path: Path, packed: bundle.Bundle) -> None:
    damaged = bytes([packed.data[0], *(255 - byte for byte in packed.data[1:])])
    controller = Controller(tmp_path / "src", {packed.digest: damaged})
    with pytest.raises(BadSpec):
        await controller.bundles.get(packed.digest)
    assert list((tmp_path / "src").iterdir()) == []
    controller.content[packed.digest] = packed.data
    assert (await controller.bundles.get(packed.digest)).is_dir()


async def test_parts_that_lead_nowhere_are_an_error_not_a_loop(tmp_path: Path, packed: bundle.Bundle) -> None:
    controller = Controller(tmp_path / "src", {packed.digest: packed.data}, size=0)
    with pytest.raises(SllmError):
        await controller.bundles.get(packed.digest)
