"""The directory of checkpoint objects on one node, as a façade.

    <root>/objects/<digest>/    immutable objects (files 0444)
    <root>/refs/<name>          a name for a digest ("/" in a name is kept as a folder)
    <root>/pins/<digest>        present: not to be removed or evicted
    <root>/sources/             what was ingested before, so that the same source is recognised
    <root>/verified/<digest>    present: every byte was written or checked here; the files' stat at that time
    <root>/tmp/                 ingests under way; each holds a lock on its directory
    <root>/rooms/               bytes that were promised to ingests under way; each holds a lock on its file
    <root>/usage.json           how often each object was used, and what its source is (`usage`)
    <root>/locks/               files to lock: one ingest per content, and objects that are in use

It imports no torch: the agent uses it. It does not write objects (`ingest` does). Invariant: a directory under
objects/ is whole — it is renamed there when complete and renamed away before it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_faas.errors import BadSpec, CheckpointError, CheckpointUnavailable, Conflict, StorageFull
from sllm_invoker.checkpoints.object import (
    CheckpointObject,
    Manifest,
    Progress,
    is_digest,
    open_object,
    read_manifest,
    verify_object,
    write_manifest,
)

_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One line of a listing."""

    manifest: Manifest
    refs: tuple[str, ...]
    pinned: bool

    @property
    def digest(self) -> str:
        return self.manifest.digest


class Lease:
    """The hold of this process on an object: it is not removed before `close`, or before the process has ended."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CheckpointStore:
    """All that is kept under one root. Safe to use from several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("objects", "refs", "pins", "sources", "verified", "locks", "rooms", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"<checkpoint store {self.root}>"

    # -- read ------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def resolve(self, ref: str) -> str:
        """The digest a ref, a digest or an unambiguous digest prefix (8 and more) names.

        Raises CheckpointUnavailable."""
        if _REF.fullmatch(ref):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return (self.root / "refs" / ref).read_text().strip()
        if len(ref) >= 8 and is_digest(ref.ljust(64, "0")):
            found = [name for name in self.digests() if name.startswith(ref)]
            if len(found) == 1:
                return found[0]
        known = ", ".join(sorted(self._refs())) or "none"
        raise CheckpointUnavailable(
            f"there is no checkpoint {ref!r}; known names: {known}.", hint="`sllm checkpoint pull` brings one here."
        )

    def get(self, ref: str) -> CheckpointObject:
        """The object, structurally checked. Raises CheckpointUnavailable, CheckpointCorrupt."""
        return open_object(self.path(self.resolve(ref)))

    def list(self) -> tuple[StoreEntry, ...]:
        """Every object whose manifest can be read, by source name. Corrupt ones are left to `get` and `verify`."""
        refs: dict[str, list[str]] = {}
        for name, digest in self._refs().items():
            refs.setdefault(digest, []).append(name)
        entries = []
        for digest, manifest in self.manifests().items():
            if manifest is not None:
                names = tuple(sorted(refs.get(digest, ())))
                entries.append(StoreEntry(manifest=manifest, refs=names, pinned=self.is_pinned(digest)))
        return tuple(sorted(entries, key=lambda entry: (entry.manifest.source.name, entry.digest)))

    def digests(self) -> tuple[str, ...]:
        """Every object's, readable or not."""
        return tuple(sorted(path.name for path in (self.root / "objects").iterdir() if is_digest(path.name)))

    def manifests(self) -> dict[str, Manifest | None]:
        """Every object's, by digest. None: it cannot be read."""
        found: dict[str, Manifest | None] = {}
        for digest in self.digests():
            found[digest] = None
            with contextlib.suppress(CheckpointError, BadSpec):
                found[digest] = read_manifest(self.path(digest))
        return found

    # -- name, pin, use, remove -----------------------------------------------------------------------------------

    def set_ref(self, name: str, digest: str) -> None:
        """Point a name at a digest, replacing what it pointed at. Raises BadSpec for a bad name."""
        check_name(name)
        path = self.root / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest + "\n")

    def remove_ref(self, name: str) -> None:
        (self.root / "refs" / name).unlink(missing_ok=True)

    def pin(self, ref: str) -> None:
        write_atomically(self.root / "pins" / self.resolve(ref), "")

    def unpin(self, ref: str) -> None:
        (self.root / "pins" / self.resolve(ref)).unlink(missing_ok=True)

    def is_pinned(self, digest: str) -> bool:
        return (self.root / "pins" / digest).exists()

    def use(self, digest: str) -> Lease:
        """Have the object stay, here already or brought later, until the lease is closed."""
        return Lease(self._users(digest))

    def in_use(self, digest: str) -> bool:
        """Whether any process has a lease on it."""
        try:
            with self._alone(digest):
                return False
        except Conflict:
            return True

    def remove(self, ref: str) -> None:
        """Remove an object and every name it has. Processes that have it mapped keep their bytes.

        Raises CheckpointUnavailable, and Conflict while it is pinned or in use."""
        digest = self.resolve(ref)
        doomed = self.root / "tmp" / f"removed-{uuid.uuid4().hex}"
        with self._alone(digest):
            if self.is_pinned(digest):
                raise Conflict(f"checkpoint {ref} is pinned.", hint="Unpin it first.")
            for name, target in self._refs().items():
                if target == digest:
                    self.remove_ref(name)
            (self.root / "verified" / digest).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.path(digest).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    @contextlib.contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Nobody has a lease on it, nor gets one meanwhile. Raises Conflict."""
        handle = os.open(self._users(digest), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Conflict(
                f"checkpoint {digest[:12]} is in use.", hint="Stop its instances, or delete its app first."
            ) from None
        finally:
            os.close(handle)

    def _users(self, digest: str) -> Path:
        return self.root / "locks" / f"{digest}.use"

    # -- verify ----------------------------------------------------------------------------------------------

    def verify(self, ref: str, progress: Progress | None = None) -> CheckpointObject:
        """Read and check every byte. Raises CheckpointCorrupt; remembers success for `ensure_verified`."""
        with contextlib.closing(self.use(self.resolve(ref))):
            checkpoint = self.get(ref)
            (self.root / "verified" / checkpoint.digest).unlink(missing_ok=True)
            before = _stat_line(checkpoint)
            verify_object(checkpoint, progress)
            self._mark(checkpoint.digest, before)
        return checkpoint

    def ensure_verified(self, ref: str, progress: Progress | None = None) -> CheckpointObject:
        """`verify` unless these very files were verified here before; call it before the first attach."""
        checkpoint = self.get(ref)
        return checkpoint if self.is_verified(checkpoint) else self.verify(checkpoint.digest, progress)

    def is_verified(self, checkpoint: CheckpointObject) -> bool:
        """Whether these very files were verified here before. A few system calls: the manifest is not read again."""
        try:
            return (self.root / "verified" / checkpoint.digest).read_text() == _stat_line(checkpoint)
        except FileNotFoundError:
            return False

    def _mark(self, digest: str, stat: str) -> None:
        write_atomically(self.root / "verified" / digest, stat)

    # -- for ingest ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private directory under tmp/, removed at the end; those of dead processes are removed first."""
        name = self.root / "tmp" / uuid.uuid4().hex
        with self._lock("tmp.lock"):
            self._sweep()
            name.mkdir()
            handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield name
        finally:
            shutil.rmtree(name, ignore_errors=True)
            os.close(handle)

    def finish(self, directory: Path, manifest: Manifest) -> bool:
        """Make an object of a workspace with all its files in it: write its manifest, have the disk keep everything,
        rename it to objects/<digest>. It counts as verified: its sums are those of the bytes as they were written.
        False when somebody was first."""
        write_manifest(directory, manifest)
        for path in directory.iterdir():
            _sync_and_seal(path)
        sync_directory(directory)
        if not self._adopt(directory, manifest.digest):
            return False
        self._mark(manifest.digest, _stat_line(CheckpointObject(self.path(manifest.digest), manifest)))
        return True

    def _adopt(self, directory: Path, digest: str) -> bool:
        try:
            directory.rename(self.path(digest))
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        sync_directory(self.root / "objects")
        return True

    def known(self, key: str) -> CheckpointObject | None:
        """The object that an earlier ingest with this key made, if it is still there and sound in structure."""
        with contextlib.suppress(FileNotFoundError, CheckpointUnavailable):
            return open_object(self.path((self.root / "sources" / key).read_text().strip()))
        return None

    def remember(self, key: str, digest: str) -> None:
        write_atomically(self.root / "sources" / key, digest)

    def only_one(self, key: str) -> contextlib.AbstractContextManager[None]:
        """One process at a time does what `key` names."""
        return self._lock(f"{key}.lock")

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        handle = os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def sweep(self) -> None:
        """Remove what dead processes left in tmp/: whoever is alive holds a lock on its directory."""
        with self._lock("tmp.lock"):
            self._sweep()

    def _sweep(self) -> None:
        for path in (self.root / "tmp").iterdir():
            if not path.is_dir():
                path.unlink(missing_ok=True)
                continue
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # who was removing it has done so
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(handle)

    def _refs(self) -> dict[str, str]:
        refs = self.root / "refs"
        files = (path for path in refs.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {str(path.relative_to(refs)): path.read_text().strip() for path in files}


def check_name(name: str) -> None:
    """Raises BadSpec when `name` cannot name a checkpoint."""
    if not _REF.fullmatch(name):
        raise BadSpec(
            f"{name!r} is not a checkpoint name; allowed: letters, digits, '.', '_', '-', one '/' inside.",
            param="name",
        )


def sync_directory(path: Path) -> None:
    """Make a rename or creation in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_and_seal(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.fchmod(handle, 0o444)
    finally:
        os.close(handle)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """A full disk or quota as StorageFull."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFull(
                f"no space left under {root}.", hint="`sllm checkpoint rm` removes checkpoints that nothing needs."
            ) from error
        raise


def _stat_line(checkpoint: CheckpointObject) -> str:
    lines = []
    for name in [*(file.name for file in checkpoint.manifest.files), *(p.name for p in checkpoint.manifest.parts)]:
        stat = (checkpoint.directory / name).stat()
        lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\n")
    return "".join(lines)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with storage_errors(path.parent):
        try:
            temporary.write_text(text)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
