"""The database: what was committed is there, whatever happens after; what cannot be written says why."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from sllm_faas.controller import schema
from sllm_faas.controller import store as store_module
from sllm_faas.controller.store import JoinToken, Store, StoreBroken
from sllm_faas.errors import Conflict, ErrorInfo, NotFound, StorageFull, Unavailable
from sllm_faas.wire.messages import NodeInfo, TokenEntry
from tests.controller.fakes import BUNDLE, app, function


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "controller.db"


@pytest.fixture
def store(path: Path):
    opened = Store(path)
    yield opened
    opened.close()


def again(path: Path) -> Store:
    return Store(path)


def test_versions_are_numbered_per_app_and_survive_a_restart(store, path):
    first, second = app(), app(function(concurrency=3))
    assert [store.add_version(first, 1.0), store.add_version(second, 2.0)] == [1, 2]
    assert store.add_version(app(name="other"), 3.0) == 1
    store.activate("app", 1, 4.0, {"f": "d"}, {"d": 7})
    store.fail_version("app", 2, ErrorInfo("import_failed", "no", traceback="tb"))
    store.close()
    reopened = again(path)
    one, two, other = reopened.versions()
    assert (one.app, one.number, one.ready, one.active, one.digests, one.spec) == (
        "app",
        1,
        True,
        True,
        {"f": "d"},
        first,
    )
    assert (two.ready, two.active, two.error.traceback) == (False, False, "tb")
    assert reopened.sizes() == {"d": 7}
    assert other.error.message == "the controller stopped during this deployment"
    reopened.close()


def test_a_number_is_never_given_twice_even_after_a_deletion(store):
    store.add_version(app(), 1.0)
    store.delete_app("app")
    assert store.versions() == ()
    assert store.add_version(app(), 2.0) == 2


def test_activations_are_the_line_a_rollback_goes_back_along(store):
    for number in (1, 2, 3):
        store.add_version(app(function(concurrency=number)), float(number))
    for number in (1, 2, 1, 3):
        store.activate("app", number, 9.0)
    assert store.activations("app") == [3, 1, 2, 1]


def test_unknown_things_are_named(store):
    with pytest.raises(NotFound, match="app 'app' has no version 4"):
        store.activate("app", 4, 1.0)
    with pytest.raises(NotFound, match="'nope'"):
        store.delete_app("nope")
    with pytest.raises(NotFound, match="'nope'"):
        store.delete_token("nope")


def test_a_failed_switch_leaves_the_old_one(store, path):
    """Everything of a transaction or nothing: the sizes cannot be stored, so the switch is not."""
    store.add_version(app(), 1.0)
    store.activate("app", 1, 1.0)
    store.add_version(app(function(concurrency=2)), 2.0)
    with pytest.raises(StoreBroken):
        store.activate("app", 2, 2.0, {}, {"d": None})  # type: ignore[dict-item]
    assert [version.active for version in store.versions()] == [True, False]


def test_bundles_in_use_are_those_of_kept_versions(store):
    store.add_version(app(), 1.0)
    store.add_version(app(bundle="b" * 64), 2.0)
    assert store.bundles() == {BUNDLE, "b" * 64}
    store.forget_versions("app", [2])
    assert store.bundles() == {BUNDLE}


def test_tokens_are_kept_by_hash_and_their_names_are_unique(store, path):
    entry = TokenEntry("ci", "ab" * 32, ("deploy", "read"), ("app",), 99.0)
    store.add_token(entry, 1.0)
    with pytest.raises(Conflict, match="'ci' exists"):
        store.add_token(TokenEntry("ci", "cd" * 32, ("read",)), 2.0)
    assert store.tokens() == [(entry, 1.0)]
    store.delete_token("ci")
    assert store.tokens() == []


def test_nodes_remember_their_cordon_and_whether_they_may_still_run(store):
    info = NodeInfo("node-0", "ipc:///x", memory_mb=5, labels={"a": "b"})
    store.save_node("node-0", cordoned=False, info=info)
    store.save_node("node-1", cordoned=True, info=None)
    assert [(node.name, node.cordoned, node.info) for node in store.nodes()] == [
        ("node-0", False, info),
        ("node-1", True, None),
    ]
    store.save_node("node-0", cordoned=False, info=None)
    assert [node.name for node in store.nodes()] == ["node-1"]


def test_join_tokens_are_used_once_and_revoked(store):
    store.add_join_token(JoinToken("key", 1.0, 2.0))
    store.use_join_token("key", 1.5)
    store.revoke_join_token("key")
    assert store.join_tokens() == [JoinToken("key", 1.0, 2.0, 1.5, True)]


def test_the_event_log_is_bounded_and_calibration_replaced(store, monkeypatch):
    monkeypatch.setattr(store_module, "EVENTS_KEPT", 10)
    for start in range(0, 30, 5):
        rows = [(float(at), "Tick", b"") for at in range(start, start + 5)]
        store.append_events("life", rows, {"error": float(start)})
    assert [at for at, _, _ in store.events("life")] == [float(at) for at in range(20, 30)]
    assert store.calibration() == {"error": 25.0}
    assert store.events("another") == []


# -- durability and migrations -----------------------------------------------------------------------------------


def test_the_database_is_private_and_commits_reach_the_disk(store, path):
    assert path.stat().st_mode & 0o777 == 0o600
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_what_a_call_returned_from_survives_a_kill_of_the_process(path):
    """A process writes and is gone the moment the call returns, with no close."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from sllm_faas.controller.store import Store\n"
        "from sllm_faas.wire.messages import TokenEntry\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.add_token(TokenEntry('a', 'h', ('read',)), 1.0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, env=dict(os.environ))
    assert done.returncode == -9
    reopened = again(path)
    assert [entry.name for entry, _ in reopened.tokens()] == ["a"]
    reopened.close()


def test_migrations_run_once_each_from_where_the_file_is(store, path, monkeypatch):
    store.add_version(app(), 1.0)
    store.close()

    def add_column(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE apps ADD COLUMN note TEXT DEFAULT 'new'")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, add_column))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    for _ in range(2):
        reopened = again(path)
        with reopened._engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT note FROM apps").scalar() == "new"
            assert connection.exec_driver_sql("SELECT version FROM schema_version").scalars().all() == [schema.VERSION]
        assert len(reopened.versions()) == 1
        reopened.close()


def test_a_migration_that_fails_changes_nothing(store, path, monkeypatch):
    store.close()

    def broken(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE apps ADD COLUMN half TEXT")
        connection.exec_driver_sql("ALTER TABLE nowhere ADD COLUMN half TEXT")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(StoreBroken):
            again(path)
    reopened = again(path)
    with reopened._engine.connect() as connection:
        columns = {row[1] for row in connection.exec_driver_sql("PRAGMA table_info(apps)")}
    assert "half" not in columns
    reopened.close()


# -- bad databases -----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused_and_left_alone(path):
    path.write_bytes(b"this is not a database at all, not even nearly" * 100)
    before = path.read_bytes()
    with pytest.raises(StoreBroken, match="not usable") as caught:
        again(path)
    assert "move it away" in caught.value.hint
    assert path.read_bytes() == before


def test_a_database_of_a_newer_release_is_refused(store, path):
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    with pytest.raises(StoreBroken, match="schema 99; this release knows up to"):
        again(path)


def test_a_locked_database_is_named_as_that(store, path, monkeypatch):
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with store._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    with pytest.raises(Unavailable, match="locked by another process"):
        store.add_version(app(), 1.0)
    assert store.versions() == (), "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    assert store.add_version(app(), 1.0) == 1


def test_a_full_disk_is_named_as_that_and_loses_nothing(store):
    store.add_version(app(), 1.0)
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull, match="is full"):
        store.append_events("life", [(0.0, "Tick", b"x" * 100_000)])
    assert len(store.versions()) == 1


def test_a_row_that_cannot_be_read_is_an_error_not_a_crash(store):
    store.add_version(app(), 1.0)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE versions SET spec = x'c1'")
    with pytest.raises(StoreBroken, match="cannot be read"):
        store.versions()
