"""Transition tables of versions, instances and nodes, as data that can be printed and tested.

`(state, event) -> state`. What is not in a table is illegal. A pair that maps a state to itself is a fact that
may come late or twice and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from sllm_faas.errors import IllegalTransition

Table = Mapping[tuple[str, str], str]

VERSION: Table = {
    ("absent", "added"): "checking",
    ("checking", "passed"): "warming",
    ("checking", "failed"): "failed",
    ("checking", "superseded"): "failed",
    ("checking", "unchanged"): "absent",
    ("warming", "activated"): "ready",
    ("warming", "failed"): "failed",
    ("warming", "superseded"): "failed",
    ("ready", "activated"): "ready",
}

INSTANCE: Table = {
    ("absent", "placed"): "requested",
    ("absent", "starting"): "starting",
    ("absent", "ready"): "ready",
    ("absent", "draining"): "draining",
    ("requested", "starting"): "starting",
    ("requested", "ready"): "ready",
    ("requested", "draining"): "draining",
    ("requested", "stop"): "draining",
    ("requested", "stopped"): "stopped",
    ("requested", "failed"): "failed",
    ("requested", "lost"): "lost",
    ("starting", "starting"): "starting",
    ("starting", "ready"): "ready",
    ("starting", "draining"): "draining",
    ("starting", "stop"): "draining",
    ("starting", "stopped"): "stopped",
    ("starting", "failed"): "failed",
    ("starting", "lost"): "lost",
    ("ready", "starting"): "ready",
    ("ready", "ready"): "ready",
    ("ready", "draining"): "draining",
    ("ready", "stop"): "draining",
    ("ready", "stopped"): "stopped",
    ("ready", "failed"): "failed",
    ("ready", "lost"): "lost",
    ("draining", "starting"): "draining",
    ("draining", "ready"): "draining",
    ("draining", "draining"): "draining",
    ("draining", "stop"): "draining",
    ("draining", "stopped"): "stopped",
    ("draining", "failed"): "failed",
    ("draining", "lost"): "lost",
}

NODE: Table = {
    ("absent", "restored"): "lost",
    ("absent", "hello"): "up",
    ("up", "hello"): "up",
    ("up", "silent"): "lost",
    ("up", "bye"): "absent",
    ("lost", "hello"): "up",
    ("lost", "bye"): "absent",
    ("lost", "expire"): "absent",
}

MOVE: Table = {
    ("absent", "asked"): "waiting",
    ("waiting", "asked"): "waiting",
    ("waiting", "sent"): "moving",
    ("waiting", "over"): "absent",
    ("moving", "asked"): "moving",
    ("moving", "late"): "resting",
    ("moving", "kept"): "resting",
    ("moving", "over"): "absent",
    ("resting", "asked"): "resting",
    ("resting", "sent"): "moving",
    ("resting", "over"): "absent",
}

COPY: Table = {
    ("absent", "short"): "waiting",
    ("waiting", "sent"): "coming",
    ("waiting", "deferred"): "resting",
    ("waiting", "over"): "absent",
    ("coming", "brought"): "waiting",
    ("coming", "failed"): "resting",
    ("coming", "over"): "absent",
    ("resting", "deferred"): "resting",
    ("resting", "again"): "waiting",
    ("resting", "over"): "absent",
}

LIVE = ("requested", "starting", "ready")
"""Instance states that count as capacity, now or soon."""


def move(table: Table, what: str, state: str, event: str) -> str:
    """The state after `event`. Raises IllegalTransition naming both."""
    try:
        return table[state, event]
    except KeyError:
        allowed = sorted(name for (before, name) in table if before == state)
        raise IllegalTransition(
            f"{what} is {state}: event {event!r} is not possible; possible: {', '.join(allowed) or 'none'}"
        ) from None


def render(table: Table) -> str:
    """The table as text, a row per state: `event->state`, just `event` when the state is called like it, and
    `(event)` when nothing changes."""
    rows: dict[str, list[str]] = {}
    for (state, event), after in table.items():
        cell = f"({event})" if after == state else event if after == event else f"{event}->{after}"
        rows.setdefault(state, []).append(cell)
    width = max(map(len, rows))
    return "\n".join(f"{state:<{width}} | {'  '.join(cells)}" for state, cells in rows.items())
