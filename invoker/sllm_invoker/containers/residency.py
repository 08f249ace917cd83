"""Which layer groups of which checkpoints stay on one GPU between instances. Pure.

    open ──► lease ── whole(group) … ──► end          one at a time, as the device is held by one instance
               └── make_room, clear                   what they return is to be let go of, at once

A group is bytes `start` to `end` of a checkpoint's part file. It is kept from the moment its instance says that it is
whole; one that is not never leaves its instance and ends with it. Room is made from checkpoints without a lease, the
one least recently used first, and within a checkpoint from the last layers to the first: what is left of one is its
beginning, which computes while the rest is copied. Invariants: `used` is at most `budget`; a group under a lease stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sllm_faas.errors import IllegalTransition

GRAIN = 2 * 1024 * 1024
"""Bytes of which device memory is a multiple."""

Range = tuple[int, int]
Group = tuple[str, Range]
"""Checkpoint and range."""


def grains(group: Range) -> int:
    """Bytes that it takes on a device."""
    return -(-(group[1] - group[0]) // GRAIN) * GRAIN


@dataclass(slots=True)
class Residency:
    """`budget`: bytes that may be kept. Every method returns the groups to be let go of, which it has forgotten."""

    budget: int
    used: int = 0
    leased: str | None = None
    _kept: dict[str, list[Range]] = field(default_factory=dict)
    """In order of their use, the last one last; ranges are in order."""
    _ranges: dict[str, tuple[Range, ...]] = field(default_factory=dict)
    """What each consists of."""

    def kept(self, checkpoint: str) -> tuple[Range, ...]:
        return tuple(self._kept.get(checkpoint, ()))

    def held(self, checkpoint: str) -> int:
        """Bytes of it that are kept."""
        return sum(map(grains, self._kept.get(checkpoint, ())))

    def whole_checkpoints(self) -> tuple[str, ...]:
        """Those of which everything is kept."""
        return tuple(name for name, groups in self._kept.items() if tuple(groups) == self._ranges[name])

    def open(self, checkpoint: str, ranges: Iterable[Range]) -> list[Group]:
        """A lease on a checkpoint that is cut into `ranges`. Raises IllegalTransition where there is one already, and
        for ranges that are empty or not in order."""
        wanted = tuple(ranges)
        if self.leased is not None:
            raise IllegalTransition(f"checkpoint {self.leased} has the lease: {checkpoint} cannot have one beside it.")
        edges = [0, *(edge for each in wanted for edge in each)]
        if edges != sorted(edges) or any(start == end for start, end in wanted):
            raise IllegalTransition(f"the ranges of checkpoint {checkpoint} are not in order.")
        self.leased = checkpoint
        others = [(checkpoint, each) for each in self.kept(checkpoint) if each not in wanted]  # cut in another way
        self._forget(others)
        if checkpoint in self._kept:
            self._kept[checkpoint] = self._kept.pop(checkpoint)
        self._ranges[checkpoint] = wanted
        return others

    def whole(self, group: Range) -> list[Group]:
        """Every byte of a group of the lease is in place. It is kept, unless it is among what is returned; one that was
        kept before has been made again. Raises IllegalTransition for one that is none of the lease's."""
        checkpoint = self.leased
        if checkpoint is None or group not in self._ranges[checkpoint]:
            raise IllegalTransition(f"group {group} is not one that {checkpoint or 'nobody'} may report whole.")
        if group in self._kept.get(checkpoint, ()):
            return []
        dropped = self.make_room(self.used + grains(group) - self.budget)
        if self.used + grains(group) > self.budget:
            return [*dropped, (checkpoint, group)]
        self._kept[checkpoint] = sorted([*self._kept.pop(checkpoint, ()), group])
        self.used += grains(group)
        return dropped

    def end(self) -> None:
        """Whoever had the lease is dead."""
        if self.leased is not None and self.leased not in self._kept:
            del self._ranges[self.leased]
        self.leased = None

    def make_room(self, wanted: int) -> list[Group]:
        """Let go of at least so many bytes, or of all that may be."""
        found: list[Group] = []
        for checkpoint, groups in self._kept.items():
            for group in () if checkpoint == self.leased else reversed(groups):
                if wanted <= 0:
                    break
                found.append((checkpoint, group))
                wanted -= grains(group)
        self._forget(found)
        return found

    def clear(self) -> list[Group]:
        """Let go of everything, under a lease or not."""
        found = [(checkpoint, group) for checkpoint, groups in self._kept.items() for group in groups]
        self._forget(found)
        return found

    def _forget(self, found: list[Group]) -> None:
        for checkpoint, group in found:
            groups = self._kept[checkpoint]
            groups.remove(group)
            self.used -= grains(group)
            if not groups:
                del self._kept[checkpoint]
                if checkpoint != self.leased:
                    del self._ranges[checkpoint]
