"""Which few of very many nodes are worth a close look. Pure; knows numbers and names, decides nothing.

    group (speed, free GPUs, class of free memory)  ->  nodes in it, those that start soonest first

A node's row says how fast it reads (in classes of 25 %), what it has free, and when the reads promised to it end.
`walk` goes through the groups that can have room, fastest first, within a speed the emptiest first, and within a
group in order of those reads: the first it yields are the best there are as far as these three numbers tell.
Cost of a change: two binary searches. Invariant (`validate`): every node is in exactly the group of its row.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Container, Iterator
from functools import lru_cache

import msgspec

UNLIMITED = 1 << 40
"""MiB of a node whose memory is not known."""
_SPEED = math.log(1.25)

Group = tuple[int, int, int]


class Row(msgspec.Struct, frozen=True):
    """`bandwidth`: bytes per second from disk; `busy_until`: end of the reads promised; `gpus` and `mb` are free
    there, `mb` below 0 where adopted instances take more than there is."""

    bandwidth: float
    gpus: int
    mb: int
    busy_until: float
    freeing_gpus: int = 0
    freeing_mb: int = 0
    """What will be free when those that end have ended."""


class NodeIndex:
    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._groups: dict[Group, list[tuple[float, str]]] = {}
        self._group_of: dict[str, Group] = {}
        self._order: list[Group] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, name: str, row: Row) -> None:
        """Add the node, or what it is now."""
        before = self.rows.get(name)
        if before == row:
            return
        group = (_speed_class(row.bandwidth), row.gpus, _memory_class(row.mb))
        if before is not None:
            if row.busy_until == before.busy_until and group == self._group_of[name]:
                self.rows[name] = row
                return
            self.drop(name)
        self.rows[name] = row
        self._group_of[name] = group
        members = self._groups.get(group)
        if members is None:
            members = self._groups[group] = []
            self._order = None
        insort(members, (row.busy_until, name))

    def drop(self, name: str) -> None:
        """Nothing happens when it is not there."""
        row = self.rows.pop(name, None)
        if row is None:
            return
        group = self._group_of.pop(name)
        members = self._groups[group]
        del members[bisect_left(members, (row.busy_until, name))]
        if not members:
            del self._groups[group]
            self._order = None

    def fits(self, name: str, gpus: int, mb: int) -> bool:
        row = self.rows.get(name)
        return row is not None and row.gpus >= gpus and row.mb >= mb

    def walk(self, gpus: int, mb: int, among: Container[str] | None = None, steps: int = 256) -> Iterator[str]:
        """Nodes with that much free, of those in `among`; gives up after looking at so many."""
        if self._order is None:
            self._order = sorted(self._groups, reverse=True)
        least = _memory_class(mb)
        rows = self.rows
        for group in self._order:
            if group[1] < gpus or group[2] < least:
                continue
            for _, name in self._groups[group]:
                steps -= 1
                if steps < 0:
                    return
                if rows[name].mb >= mb and (among is None or name in among):
                    yield name

    def validate(self) -> None:
        listed = {name: group for group, members in self._groups.items() for _, name in members}
        assert listed == self._group_of == {name: _group(row) for name, row in self.rows.items()}
        assert all(members == sorted(members) and members for members in self._groups.values())


@lru_cache(maxsize=4096)
def _memory_class(mb: int) -> int:
    """Two per doubling."""
    return int(2 * math.log2(mb)) if mb > 0 else -1


@lru_cache(maxsize=4096)
def _speed_class(bandwidth: float) -> int:
    return round(math.log(max(bandwidth, 1.0)) / _SPEED)


def _group(row: Row) -> Group:
    return (_speed_class(row.bandwidth), row.gpus, _memory_class(row.mb))
