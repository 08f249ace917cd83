"""Room on the disk for an ingest: what is worth least leaves, when there is too little.

    with Room(store, "chat", limit=bytes, evicted=tell) as room:
        room.make(total, folder)      promised until the end, or StorageFull; again when more is known

Only what can be had again leaves: an object whose every recorded source is a URL, a repo, or a directory that has not
changed. It stays while it is pinned, while any process uses it (`CheckpointStore.use`), or uses an adapter of it. What
a broken fetch left goes before any object. One ingest at a time makes room, in whatever process; what it is promised
counts until it ends, however that is. Invariants: nothing leaves when all that may leave would not be enough; an object
is removed as `CheckpointStore.remove` does it, whole at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from sllm_faas.errors import Conflict, SllmError, StorageFull
from sllm_invoker.checkpoints import usage
from sllm_invoker.checkpoints.eviction import OnDisk, leaving, shortage
from sllm_invoker.checkpoints.object import LAYOUT_VERSION, Manifest
from sllm_invoker.checkpoints.source import is_fetched, layout_key, resolve, stat_key
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.checkpoints.usage import Asked, Record

RESERVE_SHARE, RESERVE = 0.01, 1 << 30
"""Of the file system stays free: that share, and never more than so many bytes."""
NAMED = 4
"""As many of those that stay are named in an error."""
IN_USE = "in use"


@dataclass(frozen=True, slots=True)
class Evicted:
    digest: str
    bytes: int
    why: str


class Room:
    """The room of one ingest, of what is called `name`. `limit`: bytes for all checkpoints, 0: what the file system
    has; `evicted` is told of each object that left. `free_only`: nothing leaves for it."""

    def __init__(
        self,
        store: CheckpointStore,
        name: str,
        *,
        limit: int = 0,
        evicted: Callable[[Evicted], None] | None = None,
        free_only: bool = False,
    ) -> None:
        self._store = store
        self._name = name
        self._limit = limit
        self._evicted = evicted or (lambda _: None)
        self._free_only = free_only
        self._path = store.root / "rooms" / uuid.uuid4().hex
        self._fd = -1
        self.promised = 0

    def __enter__(self) -> Room:
        with self._store.only_one("room"):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def make(self, total: int, folder: Path | None = None) -> None:
        """Have room for `total` bytes, those included that are in `folder` of the downloads already.

        Raises StorageFull: what stays, and why."""
        store, own = self._store, folder.name if folder is not None else ""
        store.sweep()
        with store.only_one("room"):
            others = list(self._others())
            in_use: set[str] = set()
            while True:
                downloads = {path.name: path for path in _listed(store.root / "downloads")}
                sizes = {
                    name: _bytes(path)
                    for name, path in downloads.items()
                    if name not in {own, *(folder for _, folder in others)}
                }
                sizes |= {digest: _bytes(store.path(digest)) for digest in store.digests()}
                free = _free(store.root)
                short = shortage(
                    sizes.values(),
                    total=total,
                    there=_bytes(downloads[own]) if own in downloads else 0,
                    free=free,
                    limit=self._limit,
                    promised=sum(amount for amount, _ in others),
                )
                if short <= 0:
                    break
                if self._free_only:
                    raise self._full(total, free, {})
                book = usage.read(store)
                kept = {**_stays(store, book.records), **dict.fromkeys(in_use, IN_USE)}
                objects = {name: OnDisk(size, kept.get(name, "")) for name, size in sizes.items()}
                chosen = leaving(book.policy(), objects, short)
                if chosen is None:
                    raise self._full(total, free, objects)
                why = f"room for {self._name}: {total} bytes needed, {short} were missing"
                in_use |= {name for name in chosen if not self._leave(name, sizes[name], why, downloads)}
            self.promised = total
            os.pwrite(self._fd, f"{total:020} {own}\n".encode(), 0)
            os.ftruncate(self._fd, 22 + len(own))

    def _leave(self, name: str, size: int, why: str, downloads: Mapping[str, Path]) -> bool:
        """False when somebody uses it meanwhile."""
        if name in downloads:
            shutil.rmtree(downloads[name], ignore_errors=True)
            return True
        try:
            self._store.remove(name)
        except Conflict:
            return False
        usage.evicted(self._store, name)
        self._evicted(Evicted(name, size, why))
        return True

    def _others(self) -> Iterator[tuple[int, str]]:
        """(bytes, name of the download) of what other ingests were promised; what dead ones were is removed."""
        for path in _listed(self._path.parent):
            if path == self._path:
                continue
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
                except BlockingIOError:
                    amount, _, folder = os.read(handle, 4096).decode(errors="replace").strip().partition(" ")
                    if amount.isdigit():
                        yield int(amount), folder
                finally:
                    os.close(handle)

    def _full(self, total: int, free: int, objects: Mapping[str, OnDisk]) -> StorageFull:
        limited = f", and checkpoints may take {self._limit}" if self._limit else ""
        kept = {name: each.kept for name, each in objects.items() if each.kept}
        named = [f"{name[:12]} ({why})" for name, why in sorted(kept.items())[:NAMED]]
        more = [f"{len(kept) - NAMED} more"] if len(kept) > NAMED else []
        stay = f" What stays: {', '.join(named + more)}." if kept else ""
        return StorageFull(
            f"no space left under {self._store.root} for {self._name}: it takes {total} bytes, {free} are free"
            f"{limited}.{stay}",
            hint="Unpin or remove checkpoints (`sllm checkpoint list` says why one stays), or give disk_mb or the disk "
            "more.",
        )


def stays(store: CheckpointStore) -> dict[str, str]:
    """Why each object that may not leave the disk stays, by digest."""
    with store.only_one("room"):  # who looks whether one is in use seems to use it
        return _stays(store, usage.read(store).records)


def _stays(store: CheckpointStore, records: Mapping[str, Record]) -> dict[str, str]:
    manifests = store.manifests()
    in_use = {digest for digest in manifests if store.in_use(digest)}
    bases = {manifest.base for digest in in_use if (manifest := manifests[digest]) is not None}
    found = {}
    for digest, manifest in manifests.items():
        if store.is_pinned(digest):
            found[digest] = "pinned"
        elif digest in in_use:
            found[digest] = IN_USE
        elif digest in bases:
            found[digest] = "the base of an adapter in use"
        elif manifest is None:
            found[digest] = "its manifest cannot be read"
        elif why := _lost(store, manifest, records.get(digest)):
            found[digest] = why
    return found


def _lost(store: CheckpointStore, manifest: Manifest, record: Record | None) -> str:
    """Why it could not be had again; empty: it could."""
    if record is None or not record.asked:
        return "its source is not recorded"
    if manifest.layout.version != LAYOUT_VERSION or manifest.layout.transformers != version("transformers"):
        return f"made with transformers {manifest.layout.transformers}, which is not here any more"
    return next((why for asked in record.asked if (why := _changed(store, manifest.digest, asked))), "")


def _changed(store: CheckpointStore, digest: str, asked: Asked) -> str:
    if is_fetched(asked.source):
        return ""
    if not Path(asked.source).expanduser().is_dir():
        return f"its source {asked.source} is not there any more"
    try:
        origin = resolve(asked.source, asked.revision, store.root / "downloads")
        layout = layout_key(asked.dtype, asked.base, asked.tensor_parallel)
        known = (store.root / "sources" / stat_key(origin, layout)).read_text()
    except (SllmError, OSError):
        known = ""
    return "" if known == digest else f"its source {asked.source} has changed"


def _free(root: Path) -> int:
    disk = shutil.disk_usage(root)
    return max(0, disk.free - min(int(disk.total * RESERVE_SHARE), RESERVE))


def _bytes(directory: Path) -> int:
    """What its files take; 0 where it has gone meanwhile."""
    total = 0
    for path in _listed(directory):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _listed(directory: Path) -> Iterable[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
