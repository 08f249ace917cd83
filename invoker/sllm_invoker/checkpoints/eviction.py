"""Which checkpoints leave memory, or a disk, first. Pure: no clock, no bytes, only what it was told.

`CostAware` is Greedy-Dual-Size-Frequency (Cherkasova, 1998): the worth of a checkpoint is

    age + frequency × seconds to reload ÷ bytes

and `age` rises to the worth of whatever was evicted last, so that what was popular once does not stay for ever.
How often something was used is remembered, halved, after it was evicted: a popular checkpoint that was pushed out
does not start from nothing. `Lru` is the baseline that benchmarks compare with.

Leases and pins are not known here: only what may leave is offered as a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

REMEMBERED = 4096
"""Checkpoints whose frequency is kept, those of long ago are forgotten first."""


class Policy(Protocol):
    def used(self, digest: str, size: int, seconds: float) -> None:
        """It was asked for. `seconds`: what reading it again would take."""

    def evicted(self, digest: str) -> None: ...
    def order(self, candidates: Iterable[str]) -> list[str]:
        """The candidates, the one to evict first in front. Ties by digest: the answer is deterministic."""


@dataclass(slots=True)
class _Record:
    frequency: float
    worth: float


class CostAware:
    def __init__(self) -> None:
        self._age = 0.0
        self._records: dict[str, _Record] = {}  # the least recently used first

    def used(self, digest: str, size: int, seconds: float) -> None:
        record = self._records.pop(digest, None) or _Record(0.0, 0.0)
        record.frequency += 1.0
        record.worth = self._age + record.frequency * seconds / max(1, size)
        self._records[digest] = record
        if len(self._records) > REMEMBERED:
            del self._records[next(iter(self._records))]

    def evicted(self, digest: str) -> None:
        record = self._records.get(digest)
        if record is not None:
            self._age = max(self._age, record.worth)
            record.frequency /= 2

    def order(self, candidates: Iterable[str]) -> list[str]:
        return sorted(candidates, key=lambda digest: (self._worth(digest), digest))

    def state(self) -> tuple[float, dict[str, tuple[float, float]]]:
        """(age, digest → (frequency, worth)), the least recently used first: what `resume` goes on from."""
        return self._age, {digest: (each.frequency, each.worth) for digest, each in self._records.items()}

    @classmethod
    def resume(cls, age: float, records: Mapping[str, tuple[float, float]]) -> CostAware:
        policy = cls()
        policy._age = age
        policy._records = {digest: _Record(*each) for digest, each in records.items()}
        return policy

    def _worth(self, digest: str) -> float:
        record = self._records.get(digest)
        return record.worth if record is not None else 0.0


class Lru:
    def __init__(self) -> None:
        self._turn = 0
        self._last: dict[str, int] = {}

    def used(self, digest: str, size: int, seconds: float) -> None:  # noqa: ARG002 - a policy's signature
        self._turn += 1
        self._last[digest] = self._turn

    def evicted(self, digest: str) -> None:
        self._last.pop(digest, None)

    def order(self, candidates: Iterable[str]) -> list[str]:
        return sorted(candidates, key=lambda digest: (self._last.get(digest, 0), digest))


def may_promote(needed: int, free: int, growth: int) -> bool:
    """Whether a checkpoint of `needed` slabs may come into memory before anybody asks for it: `free` ones are nobody's,
    `growth` more may be made. It costs no other its place: what was asked for is worth more than what may be."""
    return 0 < needed <= free + growth


def choose(policy: Policy, candidates: dict[str, int], needed: int) -> list[str] | None:
    """The checkpoints to evict so that `needed` slabs, or bytes, come free; `candidates` maps each to its. None when
    all of them together are too few: then nothing is evicted. One that the rest makes needless stays."""
    if needed <= 0:
        return []
    chosen: list[str] = []
    got = 0
    for digest in policy.order(candidates):
        if got >= needed:
            break
        chosen.append(digest)
        got += candidates[digest]
    if got < needed:
        return None
    for digest in list(chosen):
        if got - candidates[digest] >= needed:
            chosen.remove(digest)
            got -= candidates[digest]
    return chosen


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Something on the disk. `kept`: why it may not leave; empty: it may."""

    bytes: int
    kept: str = ""


def shortage(sizes: Iterable[int], *, total: int, there: int, free: int, limit: int = 0, promised: int = 0) -> int:
    """Bytes by which a disk is too full for `total` new ones, of which `there` are on it already. It holds `sizes`, has
    `free` bytes left, and may hold `limit` (0: what fits), of which others were `promised` some."""
    short = total - there - free
    return max(short, sum(sizes) + promised + total - limit) if limit else short


def leaving(policy: Policy, objects: Mapping[str, OnDisk], short: int) -> list[str] | None:
    """What leaves the disk so that `short` bytes come free; None when all that may leave is too little."""
    return choose(policy, {name: each.bytes for name, each in objects.items() if not each.kept}, short)
