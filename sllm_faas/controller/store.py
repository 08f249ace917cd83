"""What must outlive the controller, in SQL: apps, versions, tokens, nodes, join tokens, calibration, event log.

Synchronous; `service` calls it from one writer thread, so writes are in order and a call that returned is committed
(`synchronous=FULL`). SQLite by default, any SQLAlchemy URL may do. Nothing of the running state is here: instances and
demand are told anew by those who have them. No prompt, output, secret or token text is ever stored.

Errors: StorageFull when the disk is, Unavailable when another process holds the lock, StoreBroken when the file is
not, or is no longer, our database. Each leaves what was committed before as it was.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from sllm_faas.controller import schema as t
from sllm_faas.controller.events import StoredNode, StoredVersion
from sllm_faas.errors import Conflict, ErrorInfo, NotFound, PlatformError, StorageFull, Unavailable
from sllm_faas.spec import AppSpec
from sllm_faas.wire.messages import NodeInfo, TokenEntry

EVENTS_KEPT = 20_000
LOCK_WAIT = 5.0

EventRow = tuple[float, str, bytes]
"""(at, kind, data), see events.encode_event."""


class StoreBroken(PlatformError):
    """The database cannot be used: corrupt, of a newer release, or not a database."""

    code = "store_broken"


@dataclass(frozen=True, slots=True)
class JoinToken:
    key: str
    created: float
    expires: float
    used: float | None = None
    revoked: bool = False


class Store:
    """Opens the database and brings its schema up to date. Raises StoreBroken, Unavailable or StorageFull."""

    def __init__(self, path: Path) -> None:
        self.path = path
        url = sa.URL.create("sqlite", database=str(path))
        self._engine = sa.create_engine(url, connect_args={"timeout": LOCK_WAIT, "check_same_thread": False})
        sa.event.listen(self._engine, "connect", _prepare_connection)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            with self._errors():
                self._migrate()
        except BaseException:
            self._engine.dispose()
            raise
        path.chmod(0o600)

    def close(self) -> None:
        self._engine.dispose()

    # -- transactions ----------------------------------------------------------------------------------------

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DatabaseError as error:
            raise self._explain(error) from None
        except (msgspec.MsgspecError, json.JSONDecodeError) as error:
            raise StoreBroken(f"{self.path} holds a row that cannot be read: {error}") from None

    def _explain(self, error: sa.exc.DatabaseError) -> PlatformError:
        text = str(error.orig)
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StorageFull(f"the disk of {self.path} is full", hint="Free space; nothing that was stored is lost.")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Unavailable(
                f"{self.path} is locked by another process ({text})",
                hint="Is a second controller or a database tool using it?",
                retry_after=1.0,
            )
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
            return Unavailable(f"{self.path} cannot be written: {text}", hint="Check the disk and the permissions.")
        return StoreBroken(
            f"{self.path} is not usable: {text}", hint="Restore it from a copy, or move it away to start empty."
        )

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """One transaction: committed when the block ends, or nothing of it is there."""
        with self._errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._errors(), self._engine.connect() as connection:
            yield connection

    def _migrate(self) -> None:
        with self._engine.begin() as connection:
            t.schema.create(connection, checkfirst=True)
            current = connection.execute(sa.select(t.schema.c.version)).scalar() or 0
            if current > t.VERSION:
                raise StoreBroken(
                    f"{self.path} has schema {current}; this release knows up to {t.VERSION}",
                    hint="Use a newer release.",
                )
            for migration in t.MIGRATIONS[current:]:
                migration(connection)
            if current != t.VERSION:
                connection.execute(sa.delete(t.schema))
                connection.execute(sa.insert(t.schema).values(version=t.VERSION))

    # -- apps and versions -----------------------------------------------------------------------------------

    def add_version(self, spec: AppSpec, now: float) -> int:
        """Register a version being checked; its number. `now`: Unix seconds, as everywhere here."""
        with self._write() as connection:
            last = connection.execute(sa.select(t.apps.c.last).where(t.apps.c.name == spec.name)).scalar()
            if last is None:
                last = 0
                connection.execute(sa.insert(t.apps).values(name=spec.name, created=now))
            number = int(last) + 1
            connection.execute(sa.update(t.apps).where(t.apps.c.name == spec.name).values(last=number))
            connection.execute(
                sa.insert(t.versions).values(
                    app=spec.name,
                    number=number,
                    spec=_pack(spec),
                    bundle=spec.bundle,
                    state="checking",
                    created=now,
                )
            )
            return number

    def activate(
        self,
        app: str,
        number: int,
        now: float,
        digests: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Make the version ready and the app's serving one. Raises NotFound."""
        with self._write() as connection:
            values: dict[str, Any] = {"state": "ready", "error": None}
            if digests is not None:
                values["digests"] = _pack(dict(digests))
            done = connection.execute(sa.update(t.versions).where(_is(app, number)).values(values))
            if not done.rowcount:
                raise NotFound(f"app {app!r} has no version {number}")
            connection.execute(sa.update(t.apps).where(t.apps.c.name == app).values(active=number))
            connection.execute(sa.insert(t.activations).values(app=app, number=number, at=now))
            for digest, size in (sizes or {}).items():
                connection.execute(sa.delete(t.checkpoints).where(t.checkpoints.c.digest == digest))
                connection.execute(sa.insert(t.checkpoints).values(digest=digest, bytes=size))

    def fail_version(self, app: str, number: int, error: ErrorInfo) -> None:
        with self._write() as connection:
            connection.execute(sa.update(t.versions).where(_is(app, number)).values(state="failed", error=_pack(error)))

    def forget_versions(self, app: str, numbers: Sequence[int]) -> None:
        with self._write() as connection:
            connection.execute(
                sa.delete(t.versions).where(t.versions.c.app == app, t.versions.c.number.in_(list(numbers)))
            )

    def delete_app(self, app: str) -> None:
        """Raises NotFound. The numbers of its versions are not given again."""
        with self._write() as connection:
            connection.execute(sa.delete(t.versions).where(t.versions.c.app == app))
            connection.execute(sa.delete(t.activations).where(t.activations.c.app == app))
            done = connection.execute(sa.update(t.apps).where(t.apps.c.name == app).values(active=0))
            if not done.rowcount:
                raise NotFound(f"app {app!r} does not exist")

    def versions(self) -> tuple[StoredVersion, ...]:
        """All that are finished, in order. What was being checked when the controller died has failed."""
        with self._read() as connection:
            active = {row[0]: row[1] for row in connection.execute(sa.select(t.apps.c.name, t.apps.c.active))}
            rows = connection.execute(sa.select(t.versions).order_by(t.versions.c.app, t.versions.c.number)).mappings()
            return tuple(
                StoredVersion(
                    app=row["app"],
                    number=row["number"],
                    spec=msgspec.msgpack.decode(row["spec"], type=AppSpec),
                    ready=row["state"] == "ready",
                    created=row["created"],
                    active=active.get(row["app"]) == row["number"],
                    error=_error_of(row),
                    digests=msgspec.msgpack.decode(row["digests"], type=dict[str, str]) if row["digests"] else {},
                )
                for row in rows
            )

    def activations(self, app: str) -> list[int]:
        """The versions switched to, newest first."""
        with self._read() as connection:
            found = (
                sa.select(t.activations.c.number).where(t.activations.c.app == app).order_by(t.activations.c.id.desc())
            )
            return list(connection.execute(found).scalars())

    def bundles(self) -> set[str]:
        """Digests that a version of some app refers to."""
        with self._read() as connection:
            return {digest for digest in connection.execute(sa.select(t.versions.c.bundle)).scalars() if digest}

    def sizes(self) -> dict[str, int]:
        with self._read() as connection:
            return {
                row[0]: row[1] for row in connection.execute(sa.select(t.checkpoints.c.digest, t.checkpoints.c.bytes))
            }

    # -- tokens ----------------------------------------------------------------------------------------------

    def add_token(self, entry: TokenEntry, now: float) -> None:
        """Raises Conflict when the name is taken."""
        with self._write() as connection:
            if connection.execute(sa.select(t.tokens.c.name).where(t.tokens.c.name == entry.name)).first():
                raise Conflict(f"a token named {entry.name!r} exists", hint="Delete it first, or choose another name.")
            connection.execute(
                sa.insert(t.tokens).values(
                    name=entry.name,
                    sha256=entry.sha256,
                    scopes=json.dumps(entry.scopes),
                    apps=json.dumps(entry.apps),
                    created=now,
                    expires=entry.expires,
                )
            )

    def delete_token(self, name: str) -> None:
        """Raises NotFound."""
        with self._write() as connection:
            if not connection.execute(sa.delete(t.tokens).where(t.tokens.c.name == name)).rowcount:
                raise NotFound(f"there is no token named {name!r}", hint="See `sllm token list`.")

    def tokens(self) -> list[tuple[TokenEntry, float]]:
        """Each with when it was created."""
        with self._read() as connection:
            rows = connection.execute(sa.select(t.tokens).order_by(t.tokens.c.name)).mappings()
            return [
                (
                    TokenEntry(
                        row["name"],
                        row["sha256"],
                        tuple(json.loads(row["scopes"])),
                        tuple(json.loads(row["apps"])),
                        row["expires"],
                    ),
                    row["created"],
                )
                for row in rows
            ]

    # -- nodes -----------------------------------------------------------------------------------------------

    def save_node(self, name: str, *, cordoned: bool, info: NodeInfo | None) -> None:
        """`info` None: it left in order, only its cordon is remembered."""
        with self._write() as connection:
            connection.execute(sa.delete(t.nodes).where(t.nodes.c.name == name))
            if cordoned or info is not None:
                packed = _pack(info) if info is not None else None
                connection.execute(sa.insert(t.nodes).values(name=name, cordoned=cordoned, info=packed))

    def nodes(self) -> tuple[StoredNode, ...]:
        with self._read() as connection:
            rows = connection.execute(sa.select(t.nodes).order_by(t.nodes.c.name)).mappings()
            return tuple(
                StoredNode(
                    row["name"],
                    bool(row["cordoned"]),
                    msgspec.msgpack.decode(row["info"], type=NodeInfo) if row["info"] else None,
                )
                for row in rows
            )

    def add_join_token(self, token: JoinToken) -> None:
        with self._write() as connection:
            connection.execute(
                sa.insert(t.join_tokens).values(
                    key=token.key, created=token.created, expires=token.expires, used=token.used, revoked=token.revoked
                )
            )

    def use_join_token(self, key: str, now: float) -> None:
        with self._write() as connection:
            connection.execute(sa.update(t.join_tokens).where(t.join_tokens.c.key == key).values(used=now))

    def revoke_join_token(self, key: str) -> None:
        """Raises NotFound."""
        with self._write() as connection:
            done = connection.execute(sa.update(t.join_tokens).where(t.join_tokens.c.key == key).values(revoked=True))
            if not done.rowcount:
                raise NotFound(f"there is no join token with key {key!r}")

    def join_tokens(self) -> list[JoinToken]:
        with self._read() as connection:
            rows = connection.execute(sa.select(t.join_tokens).order_by(t.join_tokens.c.created)).mappings()
            return [JoinToken(r["key"], r["created"], r["expires"], r["used"], bool(r["revoked"])) for r in rows]

    # -- event log and calibration ---------------------------------------------------------------------------

    def append_events(
        self, life: str, rows: Sequence[EventRow], calibration: Mapping[str, float] | None = None
    ) -> None:
        """Bounded: the oldest beyond EVENTS_KEPT go."""
        with self._write() as connection:
            if rows:
                values = [{"life": life, "at": at, "kind": kind, "data": data} for at, kind, data in rows]
                connection.execute(sa.insert(t.events), values)
                newest = connection.execute(sa.select(sa.func.max(t.events.c.id))).scalar() or 0
                connection.execute(sa.delete(t.events).where(t.events.c.id <= newest - EVENTS_KEPT))
            if calibration is not None:
                connection.execute(sa.delete(t.calibration))
                if calibration:
                    pairs = [{"key": key, "value": value} for key, value in calibration.items()]
                    connection.execute(sa.insert(t.calibration), pairs)

    def events(self, life: str) -> list[EventRow]:
        """Those kept of one controller's life, oldest first."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(t.events).where(t.events.c.life == life).order_by(t.events.c.id)
            ).mappings()
            return [(row["at"], row["kind"], row["data"]) for row in rows]

    def calibration(self) -> dict[str, float]:
        with self._read() as connection:
            return {row[0]: row[1] for row in connection.execute(sa.select(t.calibration.c.key, t.calibration.c.value))}


def _is(app: str, number: int) -> sa.ColumnElement[bool]:
    return sa.and_(t.versions.c.app == app, t.versions.c.number == number)


def _pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def _error_of(row: sa.RowMapping) -> ErrorInfo | None:
    if row["error"]:
        return msgspec.msgpack.decode(row["error"], type=ErrorInfo)
    if row["state"] == "checking":
        return ErrorInfo("unavailable", "the controller stopped during this deployment", "Deploy again.", status=503)
    return None


def _prepare_connection(connection: Any, _record: Any) -> None:
    # Python's driver would begin a transaction only before the first INSERT, leaving migrations outside of it.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")
