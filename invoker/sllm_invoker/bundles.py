"""Source bundles on this node: fetched from the controller in parts, checked, unpacked once.

    get(digest) ──► nodes/NAME/src/DIGEST/     (whole or absent; immutable; the newest KEEP are kept)

Single flight per digest. It does not talk to a socket: `ask` sends a BUNDLE_GET and the answer comes back
through `part`. Asking again after a silence makes a controller's restart invisible.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from sllm_faas import bundle
from sllm_faas.errors import BadSpec, NotFound, TooLarge, Unavailable
from sllm_faas.wire.messages import BundleGet, BundlePart

SILENCE = 2.0
"""Seconds after which a part is asked for again."""
PATIENCE = 60.0
KEEP = 64


class Bundles:
    def __init__(self, directory: Path, ask: Callable[[BundleGet], bool]) -> None:
        self._directory = directory
        self._ask = ask
        self._running: dict[str, asyncio.Task[Path]] = {}
        self._parts: dict[str, asyncio.Queue[tuple[BundlePart, bytes]]] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def part(self, part: BundlePart, data: bytes) -> None:
        """An answer of the controller; one that nobody waits for is ignored."""
        waiting = self._parts.get(part.digest)
        if waiting is not None:
            waiting.put_nowait((part, data))

    async def get(self, digest: str, in_use: set[str] | None = None) -> Path:
        """The directory with the source. `in_use` digests are not removed to make room.

        Raises NotFound, Unavailable (no controller), BadSpec (damaged), TooLarge, StorageFull."""
        path = self._directory / digest
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.touch()
            return path
        task = self._running.get(digest)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(digest, path))
            self._running[digest] = task
            task.add_done_callback(lambda _: self._running.pop(digest, None))
        found = await asyncio.shield(task)
        await asyncio.to_thread(self._tidy, (in_use or set()) | {digest} | set(self._running))
        return found

    async def _fetch(self, digest: str, path: Path) -> Path:
        answers = self._parts[digest] = asyncio.Queue()
        data = bytearray()
        try:
            total = 1
            while len(data) < total:
                part, content = await self._next(digest, len(data), answers)
                total = part.total
                if not total:
                    raise NotFound(f"the controller has no bundle {digest[:12]}.", hint="Deploy the app again.")
                if total > bundle.MAX_PACKED:
                    raise TooLarge(f"bundle {digest[:12]} has {total} bytes; allowed: {bundle.MAX_PACKED}.")
                if not content or len(data) + len(content) > total:
                    raise BadSpec(f"bundle {digest[:12]} came damaged: {len(content)} bytes at {len(data)} of {total}.")
                data += content
        finally:
            del self._parts[digest]
        await asyncio.to_thread(bundle.unpack, bytes(data), path, digest)
        return path

    async def _next(
        self, digest: str, offset: int, answers: asyncio.Queue[tuple[BundlePart, bytes]]
    ) -> tuple[BundlePart, bytes]:
        for _ in range(int(PATIENCE / SILENCE)):
            self._ask(BundleGet(digest, offset))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SILENCE):
                    while True:
                        part, content = await answers.get()
                        if part.offset == offset or not part.total:
                            return part, content
        raise Unavailable(f"the controller did not send bundle {digest[:12]} within {PATIENCE:g} s.")

    def _tidy(self, keep: set[str]) -> None:
        with contextlib.suppress(OSError):
            found = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in found[: max(0, len(found) - KEEP)]:
                if path.name not in keep and not path.name.startswith("."):
                    shutil.rmtree(path, ignore_errors=True)
