"""Secrets by name: from the invoker's environment (`SLLM_SECRET_NAME`), or a 0600 file of the state directory.

A secret NAME reaches the container as its environment variable NAME. Values are never logged, and an error never
holds one. Not covered: functions run as one user, so one that wants to can read another's files.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from sllm_faas.errors import Forbidden, NotFound

MAX_BYTES = 64 * 1024


def resolve(names: Iterable[str], directory: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the secrets. Raises NotFound, Forbidden (a file others can read, or too long)."""
    return {name: _one(name, directory, env) for name in names}


def _one(name: str, directory: Path, env: Mapping[str, str]) -> str:
    for variable in (f"SLLM_SECRET_{name}", name):
        if variable in env:
            return env[variable]
    path = directory / name
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFound(
            f"there is no secret {name!r}.",
            hint=f"Set SLLM_SECRET_{name} in the server's environment, or write it to {path} with mode 0600.",
        ) from None
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise Forbidden(
            f"secret {name!r} is in a file of mode {stat.S_IMODE(found.st_mode):o}; allowed: 600.",
            hint=f"Run: chmod 600 {path}",
        )
    if found.st_size > MAX_BYTES:
        raise Forbidden(f"secret {name!r} has {found.st_size} bytes; allowed: {MAX_BYTES}.")
    return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n")
