"""Tables of the controller's database, and the migrations that lead to them. No queries.

`MIGRATIONS[k]` brings version k to k + 1; a fresh database runs them all, so there is one way to any schema and it is
tried by every test. Never edit one that was released: add another.
"""

from __future__ import annotations

import sqlalchemy as sa

meta = sa.MetaData()

apps = sa.Table(
    "apps",
    meta,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("active", sa.Integer, nullable=False, server_default="0"),
    sa.Column("last", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created", sa.Float, nullable=False),
)
"""`last`: the highest version number ever given, so that a number never means two things."""

versions = sa.Table(
    "versions",
    meta,
    sa.Column("app", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("bundle", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("error", sa.LargeBinary),
    sa.Column("digests", sa.LargeBinary),
    sa.Column("created", sa.Float, nullable=False),
)

activations = sa.Table(
    "activations",
    meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("app", sa.String, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
"""Which version was switched to when: what a rollback goes back along."""

checkpoints = sa.Table(
    "checkpoints",
    meta,
    sa.Column("digest", sa.String, primary_key=True),
    sa.Column("bytes", sa.Integer, nullable=False),
)

tokens = sa.Table(
    "tokens",
    meta,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("sha256", sa.String, nullable=False, unique=True),
    sa.Column("scopes", sa.String, nullable=False),
    sa.Column("apps", sa.String, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float),
)

nodes = sa.Table(
    "nodes",
    meta,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("cordoned", sa.Boolean, nullable=False),
    sa.Column("info", sa.LargeBinary),
)

join_tokens = sa.Table(
    "join_tokens",
    meta,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
    sa.Column("revoked", sa.Boolean, nullable=False),
)
"""`key`: the CURVE public key it admits; the secret key is never stored."""

events = sa.Table(
    "events",
    meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("life", sa.String, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

calibration = sa.Table(
    "calibration",
    meta,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
)

schema = sa.Table("schema_version", meta, sa.Column("version", sa.Integer, nullable=False))


def _initial(connection: sa.Connection) -> None:
    meta.create_all(connection)


MIGRATIONS = (_initial,)
VERSION = len(MIGRATIONS)
