"""How often each checkpoint on the disk was used, and where it can be had again: one file, kept over restarts.

Written by whoever starts or ingests one, in any process, under a lock. It is a memory aid: one that is lost, broken or
cannot be written makes the next eviction worse and nothing else. Invariant: an object whose source is not in it stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sllm_faas.errors import StorageFull
from sllm_invoker.checkpoints.eviction import CostAware
from sllm_invoker.checkpoints.store import CheckpointStore, write_atomically

UNKNOWN_SPEED = 200e6
"""Bytes per second at which one comes back whose ingest was not timed."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an object was asked for by; `base` is the digest of what an adapter adapts."""

    source: str
    revision: str = ""
    dtype: str = "auto"
    base: str = ""
    tensor_parallel: int = 1


@dataclass(slots=True)
class Record:
    """`seconds`: what bringing it took; 0: it was not timed."""

    frequency: float = 0.0
    worth: float = 0.0
    seconds: float = 0.0
    asked: list[Asked] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """By digest, the least recently used first."""

    age: float = 0.0
    records: dict[str, Record] = field(default_factory=dict)

    def policy(self) -> CostAware:
        return CostAware.resume(self.age, {digest: (r.frequency, r.worth) for digest, r in self.records.items()})

    def take(self, policy: CostAware) -> None:
        """What the policy knows by now, in its order; those that it forgot are forgotten."""
        self.age, known = policy.state()
        before, self.records = self.records, {}
        for digest, (frequency, worth) in known.items():
            record = self.records[digest] = before.get(digest) or Record()
            record.frequency, record.worth = frequency, worth


def read(store: CheckpointStore) -> Usage:
    """Empty where there is none that can be read."""
    try:
        return msgspec.json.decode(_path(store).read_bytes(), type=Usage)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return Usage()


def used(store: CheckpointStore, digest: str, size: int, asked: Asked, seconds: float = 0.0) -> None:
    """It was used, or brought in so many seconds, by what `asked` says."""

    def change(usage: Usage) -> None:
        known = usage.records.get(digest)
        took = seconds or (known.seconds if known else 0.0)
        policy = usage.policy()
        policy.used(digest, size, took or size / UNKNOWN_SPEED)
        usage.take(policy)
        record = usage.records[digest]
        record.seconds = took
        if asked not in record.asked:
            record.asked.append(asked)

    _change(store, change)


def evicted(store: CheckpointStore, digest: str) -> None:
    """It has left the disk. Who asks for it again says by what."""

    def change(usage: Usage) -> None:
        policy = usage.policy()
        policy.evicted(digest)
        usage.take(policy)
        if digest in usage.records:
            usage.records[digest].asked.clear()

    _change(store, change)


def _change(store: CheckpointStore, change: Callable[[Usage], None]) -> None:
    with contextlib.suppress(OSError, StorageFull), store.only_one("usage"):
        usage = read(store)
        change(usage)
        write_atomically(_path(store), msgspec.json.encode(usage).decode())


def _path(store: CheckpointStore) -> Path:
    return store.root / "usage.json"
