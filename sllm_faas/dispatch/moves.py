"""Moving a running invocation from one instance to another, live: who says what, and what each party may be in. Pure.

The protocol of ServerlessLLM (Fu et al., OSDI'24, §5), with the gateway as its request router. Tokens travel, caches
are computed anew; the source answers until the gateway's fence decides. The controller chooses (MIGRATE) and is told
(MIGRATED); it is on no step between.

    source container      source invoker        destination invoker    destination container      gateway
          │◄── SNAPSHOT ──────┤                        │                       │                     │
          ├─── STATE(n) ─────►├──── HOLD(n) ──────────►├─── HOLD(n) ──────────►│ computes, silent    │
          │ speaks on …       │◄─── HELD(n) ───────────┤◄── HELD(n) ───────────┤                     │
          │                   │  again, until what was said meanwhile is little                      │
          │◄── PAUSE ─────────┤                        │                       │                     │
          ├─── STATE(m) ─────►├──── MOVED(m, where) ────────────────────────────────────────────────►│ fence + 1:
          │                   │                        │◄── ACTIVATE(m, resume) ─────────────────────┤ the commit
          │◄── CANCEL ────────┤◄─────────────────────────── COMMITTED ──────────────────────────────┤
          │                   ├─── COMMITTED ─────────►├─── ACTIVATE ─────────►│ speaks from m on    │

    The source, of one invocation (`=` changes nothing; `-` cannot be; a late answer may come in any state):

              STATE    HELD                PAUSED   COMMITTED  KEPT  FAILED  ENDED
    SNAPSHOT  HOLDING  =                   -        MOVED      =     KEPT    ENDED
    HOLDING   -        SNAPSHOT | PAUSING  -        MOVED      =     KEPT    ENDED
    PAUSING   -        =                   OFFERED  MOVED      =     KEPT    ENDED
    OFFERED   -        =                   -        MOVED      KEPT  KEPT    ENDED
    KEPT      =        =                   =        MOVED      =     =       ENDED
    MOVED     =        =                   =        =          =     =       =
    ENDED     =        =                   =        =          =     =       =

FAILED is a refusal or the loss of the destination, a call that cannot go on elsewhere, or a step that took too long;
the source then says CONTINUE to its container if it had paused it, and CANCEL to the destination. COMMITTED may come
after that was decided, or while another move is under way (it was late): then the fence is raised already, nothing
that is said under the old one is believed, and the source ends what it kept. ENDED: the invocation was over, or was
cancelled, before the commit. After the commit the source hands its replay window on to the destination (OUTPUT frames
under the old fence, the last first), so that a client may re-attach to what it missed, and says COMMITTED to it.

When to pause is learned: from the first round the seconds a token takes to be recomputed, from the outputs said
meanwhile the seconds of a step. While more than one output was said since, and their recompute costs more than a
sixteenth of a step, another round is worth it, as long as rounds get shorter.

    The destination, of one invocation:

             HOLD     HELD  ACTIVATE  COMMITTED  CANCEL   GONE
    ABSENT   FILLING  -     =         =          =        -
    FILLING  =        HELD  RUNNING   =          LEAVING  ABSENT
    HELD     FILLING  =     RUNNING   =          LEAVING  ABSENT
    LEAVING  =        =     =         =          =        ABSENT
    RUNNING  =        =     =         =          =        =

FILLING and HELD take a slot of the instance, are nobody's to adopt, and expire `HOLD_GRACE` seconds after their source
was lost or has said COMMITTED (the gateway may have died before it said ACTIVATE), or when the source has said nothing
for `HOLD_LIMIT` seconds. LEAVING waits for the container's word that it is gone. RUNNING is an ordinary flight
under the fence of ACTIVATE, owned by the gateway that said it. ACTIVATE for one that is not held is answered by
REFUSED: the gateway, whose fence is raised already, lets it go on elsewhere from the resume state, as after a crash.

    The gateway: MOVED at its own fence, with every output up to header.seq received, for an invocation that is still
    wanted, and held where an instance of its version is known: fence + 1, route replaced, ACTIVATE to the destination
    and COMMITTED to the source. In every other case KEPT, and nothing has happened. MOVED again after the commit (the
    answer was lost) carries an old fence and is answered by COMMITTED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

from sllm_faas.errors import IllegalTransition

MAX_ROUNDS: Final = 12
GAP_STEPS: Final = 0.0625
"""Of a step: what the recompute of the last outputs may cost beyond the one forward pass that it takes anyway, at the
rate of a long prefill. Few tokens cost more each: on a CPU three take a third of a step more than one."""
SNAPSHOT_LIMIT: Final = 10.0
"""Seconds for a container to tell its state: at most a step of its engine, or a long prefill."""
HOLD_LIMIT: Final = 600.0
"""Seconds for a round: the recompute of a whole context on a slow machine."""
OFFER_LIMIT: Final = 10.0
"""Seconds for the gateway's word."""
OFFER_AGAIN: Final = 1.0
HOLD_GRACE: Final = 10.0
"""Seconds a held one outlives its source's loss, or its word that it is committed: ACTIVATE may be on its way."""


class Source(StrEnum):
    """The phases of an invocation that is to leave."""

    SNAPSHOT = "SNAPSHOT"
    HOLDING = "HOLDING"
    PAUSING = "PAUSING"
    OFFERED = "OFFERED"
    MOVED = "MOVED"
    KEPT = "KEPT"
    ENDED = "ENDED"


class Destination(StrEnum):
    """The phases of an invocation that is to arrive."""

    ABSENT = "ABSENT"
    FILLING = "FILLING"
    HELD = "HELD"
    LEAVING = "LEAVING"
    RUNNING = "RUNNING"


S, D = Source, Destination
P = TypeVar("P", Source, Destination)

SOURCE: Final[Mapping[Source, Mapping[str, tuple[Source, ...]]]] = {
    S.SNAPSHOT: {
        "STATE": (S.HOLDING,), "HELD": (S.SNAPSHOT,), "PAUSED": (), "COMMITTED": (S.MOVED,), "KEPT": (S.SNAPSHOT,),
        "FAILED": (S.KEPT,), "ENDED": (S.ENDED,),
    },
    S.HOLDING: {
        "STATE": (), "HELD": (S.SNAPSHOT, S.PAUSING), "PAUSED": (), "COMMITTED": (S.MOVED,), "KEPT": (S.HOLDING,),
        "FAILED": (S.KEPT,), "ENDED": (S.ENDED,),
    },
    S.PAUSING: {
        "STATE": (), "HELD": (S.PAUSING,), "PAUSED": (S.OFFERED,), "COMMITTED": (S.MOVED,), "KEPT": (S.PAUSING,),
        "FAILED": (S.KEPT,), "ENDED": (S.ENDED,),
    },
    S.OFFERED: {
        "STATE": (), "HELD": (S.OFFERED,), "PAUSED": (), "COMMITTED": (S.MOVED,), "KEPT": (S.KEPT,),
        "FAILED": (S.KEPT,), "ENDED": (S.ENDED,),
    },
    S.KEPT: {
        "STATE": (S.KEPT,), "HELD": (S.KEPT,), "PAUSED": (S.KEPT,), "COMMITTED": (S.MOVED,), "KEPT": (S.KEPT,),
        "FAILED": (S.KEPT,), "ENDED": (S.ENDED,),
    },
    S.MOVED: dict.fromkeys(("STATE", "HELD", "PAUSED", "COMMITTED", "KEPT", "FAILED", "ENDED"), (S.MOVED,)),
    S.ENDED: dict.fromkeys(("STATE", "HELD", "PAUSED", "COMMITTED", "KEPT", "FAILED", "ENDED"), (S.ENDED,)),
}  # fmt: skip

DESTINATION: Final[Mapping[Destination, Mapping[str, tuple[Destination, ...]]]] = {
    D.ABSENT: {
        "HOLD": (D.FILLING,), "HELD": (), "ACTIVATE": (D.ABSENT,), "COMMITTED": (D.ABSENT,), "CANCEL": (D.ABSENT,),
        "GONE": (),
    },
    D.FILLING: {
        "HOLD": (D.FILLING,), "HELD": (D.HELD,), "ACTIVATE": (D.RUNNING,), "COMMITTED": (D.FILLING,),
        "CANCEL": (D.LEAVING,), "GONE": (D.ABSENT,),
    },
    D.HELD: {
        "HOLD": (D.FILLING,), "HELD": (D.HELD,), "ACTIVATE": (D.RUNNING,), "COMMITTED": (D.HELD,),
        "CANCEL": (D.LEAVING,), "GONE": (D.ABSENT,),
    },
    D.LEAVING: {
        "HOLD": (D.LEAVING,), "HELD": (D.LEAVING,), "ACTIVATE": (D.LEAVING,), "COMMITTED": (D.LEAVING,),
        "CANCEL": (D.LEAVING,), "GONE": (D.ABSENT,),
    },
    D.RUNNING: dict.fromkeys(("HOLD", "HELD", "ACTIVATE", "COMMITTED", "CANCEL", "GONE"), (D.RUNNING,)),
}  # fmt: skip


def table(rows: Mapping[P, Mapping[str, tuple[P, ...]]]) -> str:
    """A state table as text, as it stands in this module's docstring."""
    names: list[str] = list(next(iter(rows.values())))
    lines = [["", *names]]
    for state, row in rows.items():
        shown: list[str] = [
            "-" if not after else "=" if after == (state,) else " | ".join(after) for after in row.values()
        ]
        lines.append([str(state), *shown])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    text = ("    " + "".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


# -- the source ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Ask the container for its state."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Ask the container to stop at the next boundary and tell its state."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Let the container go on."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Tell the destination the state after output `seq`."""

    seq: int
    resume: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """Tell the gateway that it is held elsewhere, paused after output `seq`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Release:
    """Tell the destination that it is not coming."""


@dataclass(frozen=True, slots=True)
class Stop:
    """It is another's now: end it here, and hand the window on."""


@dataclass(frozen=True, slots=True)
class Over:
    """The move is over, as `Departure.phase` says."""


Step = Snapshot | Pause | Continue | Hold | Offer | Release | Stop | Over


class Departure:
    """The source's machine for one invocation and one destination. Every method takes the time, in seconds of any
    clock, and returns what to do. Raises IllegalTransition for what cannot be."""

    def __init__(self, now: float) -> None:
        self.phase = S.SNAPSHOT
        self.why = ""
        self.began = now
        self.rounds = 0
        self.tokens = 0
        """In its context, or outputs, when it was last told."""
        self.sent = 0
        """Bytes of resume state."""
        self.paused = 0.0
        """Seconds from PAUSE to the gateway's word."""
        self._since = now
        self._asked = now
        """When PAUSE was said."""
        self._first: tuple[float, int] | None = None
        """When the first state came, and its output."""
        self._told = 0
        self._gap: int | None = None
        self._per_token: float | None = None
        self._offered = 0.0

    def __repr__(self) -> str:
        return f"<departure {self.phase} after {self.rounds} rounds{', ' + self.why if self.why else ''}>"

    @property
    def over(self) -> bool:
        return self.phase in (S.MOVED, S.KEPT, S.ENDED)

    def begin(self) -> list[Step]:
        return [Snapshot()]

    def state(self, seq: int, resume: bytes, tokens: int, *, possible: bool, paused: bool, now: float) -> list[Step]:
        """STATE of the container."""
        if self.over:
            return [Continue()] if paused and self.phase is S.KEPT else []
        if not possible:
            return self.failed("it cannot go on elsewhere", now)
        self.tokens, self._told = tokens or seq, seq
        if paused:
            self._go(S.OFFERED, "PAUSED", now)
            self._offered = now
            return [Offer(seq)]
        self._go(S.HOLDING, "STATE", now)
        if self._first is None:
            self._first = (now, seq)
        self.rounds += 1
        self.sent += len(resume)
        return [Hold(seq, resume)]

    def held(self, seq: int, said: int, now: float) -> list[Step]:
        """HELD of the destination, `said` outputs having been said here by now."""
        if self.phase is not S.HOLDING or seq < self._told:
            return []  # late
        if self._per_token is None:
            self._per_token = (now - self._since) / max(1, self.tokens)
        gap = said - seq
        if self._worth_another_round(gap, said, now):
            self._gap = gap
            self._go(S.SNAPSHOT, "HELD", now)
            return [Snapshot()]
        self._go(S.PAUSING, "HELD", now)
        self._asked = now
        return [Pause()]

    def _worth_another_round(self, gap: int, said: int, now: float) -> bool:
        assert self._first is not None and self._per_token is not None
        began, first = self._first
        if said == first or self.rounds >= MAX_ROUNDS:
            return False
        step = (now - began) / (said - first)
        if gap <= 1 or gap * self._per_token <= step * GAP_STEPS:
            return False
        return self._gap is None or gap < self._gap

    def committed(self, now: float) -> list[Step]:
        """COMMITTED of the gateway: also late, for an earlier offer."""
        if self.phase in (S.MOVED, S.ENDED):
            return []
        offered = self.phase is S.OFFERED
        waiting = self.phase in (S.SNAPSHOT, S.HOLDING, S.PAUSING)
        was_over = self.over
        self._go(S.MOVED, "COMMITTED", now)
        self.why = "" if offered else "late"
        steps: list[Step] = [Release()] if waiting else []
        return [*steps, Stop(), *([] if was_over else [Over()])]

    def kept(self, now: float) -> list[Step]:
        """KEPT of the gateway."""
        if self.phase is not S.OFFERED:
            return []  # late
        return self._keep("KEPT", "the gateway kept it", now)

    def failed(self, why: str, now: float) -> list[Step]:
        return [] if self.over else self._keep("FAILED", why, now)

    def ended(self, now: float) -> list[Step]:
        """The invocation is over here."""
        if self.phase in (S.MOVED, S.ENDED):
            return []
        was_over = self.over
        self._go(S.ENDED, "ENDED", now)
        return [] if was_over else [Release(), Over()]

    def tick(self, now: float) -> list[Step]:
        """What time brings."""
        limits = {S.SNAPSHOT: SNAPSHOT_LIMIT, S.PAUSING: SNAPSHOT_LIMIT, S.HOLDING: HOLD_LIMIT, S.OFFERED: OFFER_LIMIT}
        limit = limits.get(self.phase)
        if limit is None:
            return []
        if now - self._since >= limit:
            return self.failed(f"{self.phase} took {limit:g} s", now)
        if self.phase is S.OFFERED and now - self._offered >= OFFER_AGAIN:
            self._offered = now
            return [Offer(self._told)]
        return []

    def _keep(self, event: str, why: str, now: float) -> list[Step]:
        resting = self.phase in (S.PAUSING, S.OFFERED)
        self._go(S.KEPT, event, now)
        self.why = why
        steps: list[Step] = [Continue()] if resting else []
        return [*steps, Release(), Over()]

    def _go(self, phase: Source, event: str, now: float) -> None:
        if phase not in SOURCE[self.phase][event]:
            raise IllegalTransition(f"{event} for a departure in {self.phase}")
        if self.phase in (S.PAUSING, S.OFFERED) and phase not in (S.PAUSING, S.OFFERED):
            self.paused = now - self._asked
        self.phase, self._since = phase, now

    def validate(self) -> None:
        """Raises AssertionError when a rule of this module does not hold."""
        assert self.phase is not S.MOVED or self._told >= 0
        assert bool(self.why) or self.phase is not S.KEPT
        assert 0 <= self.rounds <= MAX_ROUNDS
        assert (self._first is None) == (self.rounds == 0)


# -- the destination -------------------------------------------------------------------------------------------


class Arrival:
    """The destination's machine for one invocation."""

    def __init__(self) -> None:
        self.phase = D.ABSENT

    def __repr__(self) -> str:
        return f"<arrival {self.phase}>"

    def on(self, event: str) -> bool:
        """Take an event of DESTINATION. Whether it changed anything, or (HOLD) is to be passed on."""
        after = DESTINATION[self.phase][event]
        if not after:
            raise IllegalTransition(f"{event} for an arrival in {self.phase}")
        changed = after[0] is not self.phase or (event == "HOLD" and self.phase is D.FILLING)
        self.phase = after[0]
        return changed
