"""Who holds which slab: the bookkeeping of the DRAM tier. Pure; memory itself is `slabs`' business.

    free ──reserve──► filling ──filled──► full ──retire──► retiring ──last mapper gone──► free
      ▲                  └──abandon──► retiring or free ◄──┘ (free at once when nobody maps it)
      └──────────────────────────────────────────────────────────────────────────────────────

Slabs move together: a *residence* is one checkpoint's stay in memory, its slabs in file order. A holder (a process,
in the caller's words) has a *lease* while it is interested, which keeps the residence from being retired; it is a
*mapper* from the moment it is handed the slabs until it is proved gone. A lease may be released early; a mapper
cannot: its private maps still see what is written to the memory.

Invariant: a slab is free only if no process that was ever handed it may still be alive. Hence nothing a reader
sees ever changes. Slabs of an adopted residence (from an earlier life of the store, whose mappers nobody can
prove) are never free again: they are dropped, and the kernel keeps their memory while someone maps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["filling", "full", "retiring"]

TRANSITIONS: dict[str, dict[str, str]] = {
    "free": {"reserve": "filling"},
    "filling": {"filled": "full", "abandon": "retiring"},
    "full": {"retire": "retiring"},
    "retiring": {"vacate": "free"},
}
"""State → event → next state. `vacate` is the book's own event: the last mapper is gone."""


class IllegalMove(Exception):
    """An event that its state does not know: a mistake of the caller, not of a user."""


@dataclass(slots=True)
class Residence:
    """One checkpoint's stay. `slabs` in file order; `leases` and `mappers` are holders."""

    number: int
    digest: str
    bytes: int
    slabs: tuple[int, ...]
    state: State = "filling"
    reusable: bool = True
    leases: set[str] = field(default_factory=set)
    mappers: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.number:>4} {self.digest[:12]} {self.state:<8} {len(self.slabs):>4} slabs "
            f"{len(self.leases):>3} leases {len(self.mappers):>3} mappers"
        )


class SlabBook:
    def __init__(self) -> None:
        self.free: list[int] = []
        self.dropped: list[int] = []
        """Slabs that left the book: whoever owns their memory takes them from here and lets go of it."""
        self.residences: dict[int, Residence] = {}
        self.pins: set[str] = set()
        self._current: dict[str, int] = {}
        self._numbers = 0

    def __str__(self) -> str:
        lines = [f"{len(self.free)} slabs free", *(str(each) for each in self.residences.values())]
        return "\n".join(lines)

    def find(self, digest: str) -> Residence | None:
        """The residence that new users of `digest` get; None where it has none, or only retiring ones."""
        number = self._current.get(digest)
        return self.residences[number] if number is not None else None

    @property
    def held(self) -> int:
        """Slabs that are not free."""
        return sum(len(residence.slabs) for residence in self.residences.values())

    # -- slabs come and go -----------------------------------------------------------------------------------

    def add(self, slab: int) -> None:
        """A new slab, free; taken after those that are: its pages have to be made yet."""
        self.free.insert(0, slab)

    def shed(self, count: int) -> None:
        """At most `count` free slabs leave the book, those first that would be taken last."""
        self.dropped += self.free[:count]
        del self.free[:count]

    # -- residences ------------------------------------------------------------------------------------------

    def reserve(self, digest: str, size: int, count: int) -> Residence:
        """Begin a stay of `count` slabs. Raises IllegalMove when there are too few or it has one already."""
        if digest in self._current:
            raise IllegalMove(f"reserve: {digest[:12]} is {self.residences[self._current[digest]].state} already")
        if count > len(self.free):
            raise IllegalMove(f"reserve: {count} slabs asked for, {len(self.free)} free")
        slabs = tuple(self.free.pop() for _ in range(count))
        return self._begin(Residence(self._number(), digest, size, slabs))

    def adopt(self, digest: str, size: int, slabs: tuple[int, ...], holders: set[str]) -> Residence:
        """Take over a whole checkpoint that an earlier life left, mapped by `holders` and perhaps by others."""
        if digest in self._current:
            raise IllegalMove(f"adopt: {digest[:12]} is here already")
        found = Residence(self._number(), digest, size, slabs, "full", reusable=False)
        found.leases, found.mappers = set(holders), set(holders)
        return self._begin(found)

    def filled(self, number: int) -> None:
        self._move(number, "filled")

    def rename(self, number: int, digest: str) -> None:
        """It is known only now what it was filled with."""
        residence = self._get(number, "rename")
        if residence.state != "filling" or digest in self._current:
            raise IllegalMove(f"rename: {residence.digest} is {residence.state}, or {digest[:12]} is here already")
        del self._current[residence.digest]
        residence.digest = digest
        self._current[digest] = number

    def disown(self, number: int) -> None:
        """Its read is being cancelled: it is not found any more, so that the checkpoint can be read anew."""
        residence = self._get(number, "disown")
        if residence.state != "filling":
            raise IllegalMove(f"disown: {residence.digest[:12]} is {residence.state}")
        if self._current.get(residence.digest) == number:
            del self._current[residence.digest]

    def abandon(self, number: int) -> None:
        """Its read failed or was cancelled. Nothing writes to its slabs any more; some may map them."""
        self._leave(self._move(number, "abandon"))

    def retire(self, number: int) -> None:
        """Evict it. Raises IllegalMove while it is leased or pinned."""
        residence = self._get(number, "retire")
        if residence.leases or residence.digest in self.pins:
            raise IllegalMove(f"retire: {residence.digest[:12]} is {'leased' if residence.leases else 'pinned'}")
        self._leave(self._move(number, "retire"))

    def evictable(self) -> dict[str, int]:
        """What `retire` would take and whose memory would come free at once: digest → slabs."""
        return {
            residence.digest: len(residence.slabs)
            for residence in self.residences.values()
            if residence.state == "full"
            and not residence.leases
            and not residence.mappers
            and residence.digest not in self.pins
        }

    # -- holders ---------------------------------------------------------------------------------------------

    def lease(self, number: int, holder: str) -> None:
        residence = self._get(number, "lease")
        if residence.state == "retiring":
            raise IllegalMove(f"lease: {residence.digest[:12]} is retiring")
        residence.leases.add(holder)

    def map(self, number: int, holder: str) -> Residence:
        """The holder is about to be handed the slabs. It needs a lease."""
        residence = self._get(number, "map")
        if holder not in residence.leases:
            raise IllegalMove(f"map: {holder} has no lease on {residence.digest[:12]}")
        residence.mappers.add(holder)
        return residence

    def release(self, holder: str) -> None:
        """The holder is not interested any more; where it may have mapped something it stays a mapper."""
        for residence in self.residences.values():
            residence.leases.discard(holder)

    def gone(self, holder: str) -> None:
        """The holder is proved gone: it maps nothing any more."""
        for residence in list(self.residences.values()):
            residence.leases.discard(holder)
            residence.mappers.discard(holder)
            self._vacate(residence)

    # -- inside ----------------------------------------------------------------------------------------------

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _begin(self, residence: Residence) -> Residence:
        self.residences[residence.number] = residence
        self._current[residence.digest] = residence.number
        return residence

    def _get(self, number: int, event: str) -> Residence:
        found = self.residences.get(number)
        if found is None:
            raise IllegalMove(f"{event}: there is no residence {number}")
        return found

    def _move(self, number: int, event: str) -> Residence:
        residence = self._get(number, event)
        following = TRANSITIONS[residence.state].get(event)
        if following is None:
            raise IllegalMove(f"{event}: {residence.digest[:12]} is {residence.state}")
        residence.state = following  # type: ignore[assignment]
        return residence

    def _leave(self, residence: Residence) -> None:
        if self._current.get(residence.digest) == residence.number:
            del self._current[residence.digest]
        residence.leases.clear()
        self._vacate(residence)

    def _vacate(self, residence: Residence) -> None:
        if residence.state == "retiring" and not residence.mappers:
            del self.residences[residence.number]
            (self.free if residence.reusable else self.dropped).extend(reversed(residence.slabs))

    def validate(self) -> None:
        """Raises AssertionError when a slab is in two places or a residence is not what it must be."""
        slabs = [*self.free, *(slab for residence in self.residences.values() for slab in residence.slabs)]
        assert len(slabs) == len(set(slabs)), "a slab is in two places"
        for digest, number in self._current.items():
            assert self.residences[number].digest == digest
            assert self.residences[number].state in ("filling", "full")
        for residence in self.residences.values():
            assert residence.leases <= residence.mappers or residence.state != "retiring"
            assert residence.state != "retiring" or residence.mappers, "nobody maps it: it should be free"
