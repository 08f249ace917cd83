"""Deadlines of many things, one timer for all: a wheel of coarse buckets. Pure: the clock is an argument.

Almost no deadline is ever reached, so putting and removing must cost nothing: both are O(1) dictionary work (a
bucket's number enters a heap once, when the bucket is created). An item is due up to `resolution` late, never
early. It is not a calendar: an item has at most one deadline, and `put` again moves it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Wheel(Generic[T]):
    __slots__ = ("_bucket_of", "_buckets", "_heap", "_resolution")

    def __init__(self, resolution: float = 0.02) -> None:
        self._resolution = resolution
        self._buckets: dict[int, dict[T, None]] = {}
        self._bucket_of: dict[T, int] = {}
        self._heap: list[int] = []

    def __len__(self) -> int:
        return len(self._bucket_of)

    def put(self, item: T, when: float) -> None:
        """Make `item` due at `when` (seconds), and at no other time."""
        number = math.ceil(when / self._resolution)
        old = self._bucket_of.get(item)
        if old == number:
            return
        if old is not None:
            del self._buckets[old][item]
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._heap, number)
        bucket[item] = None
        self._bucket_of[item] = number

    def remove(self, item: T) -> None:
        """Forget `item`; nothing happens when it has no deadline."""
        number = self._bucket_of.pop(item, None)
        if number is not None:
            del self._buckets[number][item]

    def due(self, now: float) -> list[T]:
        """What is due at `now`, in order of deadline; it is forgotten."""
        out: list[T] = []
        while self._heap and self._heap[0] * self._resolution <= now:
            bucket = self._buckets.pop(heapq.heappop(self._heap))
            for item in bucket:
                del self._bucket_of[item]
                out.append(item)
        return out

    def next(self) -> float | None:
        """When something is due next, or None. Empty buckets in front are dropped."""
        while self._heap and not self._buckets[self._heap[0]]:
            del self._buckets[heapq.heappop(self._heap)]
        return self._heap[0] * self._resolution if self._heap else None

    def validate(self) -> None:
        assert sorted(self._heap) == sorted(self._buckets), "heap and buckets disagree"
        assert sum(map(len, self._buckets.values())) == len(self._bucket_of), "an item is in no or two buckets"
        for item, number in self._bucket_of.items():
            assert item in self._buckets[number], f"{item!r} is not in its bucket"
