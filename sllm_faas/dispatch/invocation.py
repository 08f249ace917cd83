"""The state of one invocation at its gateway, and when it is due to be given up. Pure: the clock is an argument.

    state \\ event   DISPATCH    REFUSE   OUTPUT      FINISH  RETRY    WAKE    RESUME  MOVE        CANCEL
    QUEUED          DISPATCHED  -        -           ENDED   -        -       -       -           ENDED
    BACKOFF         -           -        -           ENDED   -        QUEUED  -       -           ENDED
    DISPATCHED      -           QUEUED   STREAMING   ENDED   BACKOFF  -       QUEUED  DISPATCHED  CANCELLING
    STREAMING       -           -        STREAMING   ENDED   -        -       QUEUED  DISPATCHED  CANCELLING
    CANCELLING      -           ENDED    CANCELLING  ENDED   -        -       -       -           CANCELLING
    ENDED           -           -        -           -       -        -       -       -           -

FINISH is a terminal frame, a loss, or (while it waits) a failure to start. CANCEL is the caller's, a passed deadline's
or a broken stream's: the caller is answered at once, but the slot stays taken until a terminal frame (CANCELLING).
RETRY, RESUME and MOVE raise the fence, so nothing the earlier attempt still says is believed (`fences`). RETRY begins
anew after a delay; RESUME goes on from the outputs that were believed, on any instance, as soon as there is a slot,
at most `MAX_RESUMES` times without one more output; MOVE goes on from them where it is held already (`moves`).

Five deadlines, of which at most three run at a time:

    waiting, a ready instance exists         queue         seconds waited under that condition
    waiting, none is ready                   startup       seconds waited under that condition
    dispatched, no output ever               first_output  since the last dispatch
    there were outputs, caller has credit    idle          since the last output, dispatch, or credit given again
    dispatched once                          execution     since the first dispatch; a RETRY begins it anew

A `TargetClock` per target counts how long the target had a ready instance and how long it had none; an invocation
notes both readings when it begins to wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Literal, NamedTuple

from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import Encoding, Phase, RetryPolicy, Target, Timeouts
from sllm_faas.wire.header import NO_LIMIT

CANCEL_INTERVAL = 1.0
"""Seconds after which an unanswered CANCEL is said again."""
MAX_RESUMES = 3
"""Resumes in a row without one more output: what it does may be what kills its instances."""


class State(Enum):
    QUEUED = "queued"
    BACKOFF = "backoff"
    DISPATCHED = "dispatched"
    STREAMING = "streaming"
    CANCELLING = "cancelling"
    ENDED = "ended"


class Event(Enum):
    DISPATCH = "dispatch"
    REFUSE = "refuse"
    OUTPUT = "output"
    FINISH = "finish"
    RETRY = "retry"
    WAKE = "wake"
    RESUME = "resume"
    MOVE = "move"
    CANCEL = "cancel"


TABLE: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.QUEUED: {
            Event.DISPATCH: State.DISPATCHED,
            Event.FINISH: State.ENDED,
            Event.CANCEL: State.ENDED,
        },
        State.BACKOFF: {Event.FINISH: State.ENDED, Event.WAKE: State.QUEUED, Event.CANCEL: State.ENDED},
        State.DISPATCHED: {
            Event.REFUSE: State.QUEUED,
            Event.OUTPUT: State.STREAMING,
            Event.FINISH: State.ENDED,
            Event.RETRY: State.BACKOFF,
            Event.RESUME: State.QUEUED,
            Event.MOVE: State.DISPATCHED,
            Event.CANCEL: State.CANCELLING,
        },
        State.STREAMING: {
            Event.OUTPUT: State.STREAMING,
            Event.FINISH: State.ENDED,
            Event.RESUME: State.QUEUED,
            Event.MOVE: State.DISPATCHED,
            Event.CANCEL: State.CANCELLING,
        },
        State.CANCELLING: {
            Event.REFUSE: State.ENDED,
            Event.OUTPUT: State.CANCELLING,
            Event.FINISH: State.ENDED,
            Event.CANCEL: State.CANCELLING,
        },
        State.ENDED: {},
    }
)


def table() -> str:
    """The state table as text, one row per state."""
    rows = [["state \\ event", *(event.name for event in Event)]]
    for state, moves in TABLE.items():
        rows.append([state.name, *(moves[event].name if event in moves else "-" for event in Event)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


class Due(NamedTuple):
    """At `when` (seconds), `what` happens unless the invocation moves on."""

    when: float
    what: Phase | Literal["retry", "cancel"]


@dataclass(slots=True)
class TargetClock:
    """Seconds a target had a ready instance, and seconds it had none."""

    since: float
    ready: bool = False
    _totals: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def set_ready(self, ready: bool, now: float) -> bool:
        """Whether that changed anything."""
        if ready == self.ready:
            return False
        self._totals[self.ready] += now - self.since
        self.since, self.ready = now, ready
        return True

    def seconds(self, ready: bool, now: float) -> float:
        return self._totals[ready] + (now - self.since if ready == self.ready else 0.0)


@dataclass(slots=True, eq=False)
class Invocation:
    """One call. Hashed by identity. Times are of the gateway's monotonic clock, in seconds."""

    id: bytes
    target: Target
    submitted: float
    method: str = ""
    stream: bool = False
    encoding: Encoding = "msgpack"
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    fence: int = 1
    state: State = State.QUEUED
    attempt: int = 0
    """Attempts that failed."""
    tokens: int = 0
    """Of its prompt, about."""
    wanted: int = 0
    """Ordinal of the next output to be believed; so many were received."""
    consumed: int = 0
    """Outputs the caller has taken."""
    credit: int = NO_LIMIT
    """Ordinal up to which the container may send."""
    resume: bytes = b""
    """What the instance it is sent to next needs to go on, opaque here."""
    resumes: int = 0
    """RESUMEs of this attempt."""
    dispatched: float = 0.0
    """When this attempt was dispatched first."""
    first_output: float = 0.0
    active: float = 0.0
    """When its last output came, or it was dispatched or given credit after that."""
    vain: int = 0
    """RESUMEs since its last output."""
    partly: bool = False
    """Of this attempt, not all the time in a slot was seen from here, or it was not in one all the time."""
    ended: float = 0.0
    _wake: float = 0.0
    _cancelled: float = 0.0
    _waited: tuple[float, float] = (0.0, 0.0)
    _marks: tuple[float, float] = (0.0, 0.0)

    def step(self, event: Event) -> None:
        """Move. Raises IllegalTransition, and moves nothing, when the table has no such entry."""
        to = TABLE[self.state].get(event)
        if to is None:
            raise IllegalTransition(f"invocation {self.id.hex()} is {self.state.name}; it cannot {event.name}")
        self.state = to

    # -- waiting ---------------------------------------------------------------------------------------------

    def wait(self, now: float, clock: TargetClock) -> None:
        """Begin (again) to count the time it waits."""
        self._marks = (clock.seconds(True, now), clock.seconds(False, now))

    def dispatch(self, now: float, clock: TargetClock | None = None) -> None:
        """A slot was found. `clock` when it had waited."""
        self.step(Event.DISPATCH)
        if clock is not None:
            self._waited = (self._used(True, now, clock), self._used(False, now, clock))
        self.active = now
        if not self.resumes:
            self.dispatched = now

    def refuse(self, now: float, clock: TargetClock) -> None:
        """It never ran there. Queued again, unless it was being cancelled: then it has ended."""
        self.step(Event.REFUSE)
        if self.state is State.ENDED:
            self.ended = now
        else:
            self.wait(now, clock)

    def retry(self, now: float) -> None:
        """The attempt failed before its first output; another one may begin after the policy's delay."""
        self.step(Event.RETRY)
        self.attempt += 1
        self.fence += 1
        self.resumes = self.vain = 0
        self.partly = False
        self._wake = now + self.retries.delay(self.attempt)

    def wake(self, now: float, clock: TargetClock) -> None:
        self.step(Event.WAKE)
        self._waited = (0.0, 0.0)
        self.wait(now, clock)

    @property
    def may_retry(self) -> bool:
        return self.state is State.DISPATCHED and not self.wanted and self.attempt < self.retries.max_retries

    # -- going on elsewhere ----------------------------------------------------------------------------------

    @property
    def may_resume(self) -> bool:
        """Whether the table and its luck so far allow it; whether its code can is not known here."""
        return Event.RESUME in TABLE[self.state] and self.vain < MAX_RESUMES

    def go_on(self, now: float, clock: TargetClock, resume: bytes) -> None:
        """RESUME: its instance is lost; wait for another one, and go on there from `resume`."""
        self.step(Event.RESUME)
        self.fence += 1
        self.resumes += 1
        self.vain += 1
        self.partly = True
        self.resume = resume
        self._waited = (0.0, 0.0)
        self.wait(now, clock)

    def move(self, now: float) -> None:
        """MOVE: the commit. Who held it silently may speak, and nobody else."""
        self.step(Event.MOVE)
        self.fence += 1
        self.active = now

    # -- running ---------------------------------------------------------------------------------------------

    def output(self, now: float, items: int) -> None:
        """`items` outputs were received and believed."""
        self.step(Event.OUTPUT)
        if not self.wanted:
            self.first_output = now
        self.wanted += items
        self.active = now
        self.vain = 0

    def give_credit(self, now: float, window: int) -> bool:
        """Let the sender go `window` outputs beyond what was consumed, once half of that is used up.

        Returns whether credit was given; the time it had none does not count as idle.
        """
        to = self.consumed + window
        if self.credit == NO_LIMIT or to - self.credit < max(1, window // 2):
            return False
        if self.blocked:
            self.active = now
        self.credit = min(to, NO_LIMIT - 1)
        return True

    @property
    def blocked(self) -> bool:
        """Its caller does not keep up: the sender has used all credit."""
        return self.credit != NO_LIMIT and self.wanted >= self.credit

    def cancel(self, now: float) -> None:
        """It is wanted no more. ENDED at once when it was not running."""
        self.step(Event.CANCEL)
        self._cancelled = now
        if self.state is State.ENDED:
            self.ended = now

    def finish(self, now: float) -> None:
        self.step(Event.FINISH)
        self.ended = now

    def adopt(self, now: float) -> None:
        """Speak for one that runs already: its clocks begin now."""
        self.dispatched = self.active = now
        self.partly = True

    @property
    def service(self) -> float | None:
        """Seconds it was in a slot, of one that has ended there; None: it has not, or that is not known."""
        return self.ended - self.dispatched if self.state is State.ENDED and not self.partly else None

    # -- deadlines -------------------------------------------------------------------------------------------

    def due(self, now: float, clock: TargetClock) -> Due | None:
        """What happens next by time alone, and when; None when nothing does."""
        match self.state:
            case State.QUEUED:
                due = self._execution_due() if self.resumes else None
                limit = self.timeouts.queue if clock.ready else self.timeouts.startup
                if limit is None:
                    return due
                when = now + limit - self._used(clock.ready, now, clock)
                return _earlier(due, Due(when, "queue" if clock.ready else "startup"))
            case State.BACKOFF:
                return Due(self._wake, "retry")
            case State.CANCELLING:
                return Due(self._cancelled + CANCEL_INTERVAL, "cancel")
            case State.ENDED:
                return None
        return self.running_due()

    def running_due(self) -> Due | None:
        """`due` of one that runs: it needs no clock."""
        timeouts = self.timeouts
        due = self._execution_due()
        if not self.wanted:
            if timeouts.first_output is not None:
                due = _earlier(due, Due(self.active + timeouts.first_output, "first_output"))
        elif timeouts.idle is not None and not self.blocked:
            due = _earlier(due, Due(self.active + timeouts.idle, "idle"))
        return due

    def _execution_due(self) -> Due | None:
        limit = self.timeouts.execution
        return None if limit is None else Due(self.dispatched + limit, "execution")

    def _used(self, ready: bool, now: float, clock: TargetClock) -> float:
        index = 0 if ready else 1
        return self._waited[index] + clock.seconds(ready, now) - self._marks[index]

    def validate(self) -> None:
        assert 0 <= self.consumed <= self.wanted, f"{self.consumed} consumed of {self.wanted}"
        assert self.fence >= 1, "a fence is at least 1"
        assert self.state is not State.STREAMING or self.wanted, "streaming without an output"
        assert (self.state is State.ENDED) == (self.ended > 0.0) or not self.submitted, "ended has a time, only it"


def _earlier(a: Due | None, b: Due) -> Due:
    return b if a is None or b.when < a.when else a
