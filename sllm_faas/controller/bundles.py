"""Source archives by digest, on disk. Not what is in them: packing and unpacking are `sllm_faas.bundle`'s.

Invariant: a file named DIGEST.tar.gz has that digest; it is verified before it gets the name, and immutable after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from sllm_faas.errors import BadRequest, StorageFull, TooLarge, Unavailable
from sllm_faas.spec import MAX_PAYLOAD, digest

PART = 4 * 1024 * 1024
"""Bytes of one BUNDLE_PART."""
KEEP_UNUSED = 3600.0
"""Seconds an archive that no version refers to is kept: its deployment may be about to come."""


class Bundles:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Raises BadRequest for what is no digest, so that no name leads out of the folder."""
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            raise BadRequest(f"bundle {name[:80]!r} is not a digest; allowed: 64 hex digits", param="digest")
        return self.folder / f"{name}.tar.gz"

    def size(self, name: str) -> int | None:
        """Bytes, or None when there is none."""
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> int:
        """Keep an archive; its size. Raises BadRequest when it is another one, TooLarge, StorageFull."""
        path = self.path(name)
        if len(data) > MAX_PAYLOAD:
            raise TooLarge(
                f"bundle of {len(data)} bytes; allowed: {MAX_PAYLOAD}", hint="Add large files to .sllmignore."
            )
        if (found := digest(data)) != name:
            raise BadRequest(f"the bundle's digest is {found}, not {name}", hint="Upload it again.", param="digest")
        if self.size(name) == len(data):
            return len(data)
        partial = self.folder / f".{name[:16]}-{secrets.token_hex(4)}"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space for a bundle of {len(data)} bytes in {self.folder}") from None
            raise Unavailable(f"the bundle cannot be written to {self.folder}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return len(data)

    def part(self, name: str, offset: int) -> tuple[int, bytes]:
        """(size of the whole, up to PART bytes from `offset`); (0, b"") when there is none."""
        try:
            with self.path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return size, os.pread(file.fileno(), PART, offset)
        except (FileNotFoundError, BadRequest):
            return 0, b""

    def collect(self, used: Collection[str], now: float) -> list[str]:
        """Delete what no version refers to and has been here for a while; their digests. `now`: Unix seconds."""
        gone = []
        for path in self.folder.glob("*.tar.gz"):
            name = path.name.removesuffix(".tar.gz")
            if name not in used and path.stat().st_mtime + KEEP_UNUSED < now:
                path.unlink(missing_ok=True)
                gone.append(name)
        return gone
