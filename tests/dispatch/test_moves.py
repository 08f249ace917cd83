"""The machines of a move: what their tables say, whatever comes in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch import moves
from sllm_faas.dispatch.moves import (
    DESTINATION,
    MAX_ROUNDS,
    OFFER_AGAIN,
    OFFER_LIMIT,
    SOURCE,
    Arrival,
    Continue,
    Departure,
    Destination,
    Hold,
    Offer,
    Over,
    Pause,
    Release,
    Snapshot,
    Source,
    Stop,
    table,
)
from sllm_faas.errors import IllegalTransition


def test_the_tables_are_those_of_the_documentation() -> None:
    assert moves.__doc__ is not None
    assert table(SOURCE) in moves.__doc__
    assert table(DESTINATION) in moves.__doc__


def told(move: Departure, seq: int, now: float, *, paused: bool = False, possible: bool = True) -> list[Any]:
    return move.state(seq, b"state", 100 + seq, possible=possible, paused=paused, now=now)


def offered(now: float = 0.0) -> Departure:
    move = Departure(now)
    told(move, 5, now)
    assert move.held(5, 5, now) == [Pause()]
    assert told(move, 6, now, paused=True) == [Offer(6)]
    return move


def test_rounds_go_on_while_the_recompute_of_the_gap_is_worth_it() -> None:
    """A token is recomputed in 5 ms, a step takes 167 ms: a gap of two is little, one of three is not."""
    move = Departure(0.0)
    assert move.begin() == [Snapshot()]
    assert told(move, 0, 0.0) == [Hold(0, b"state")]
    assert move.held(0, 3, 0.5) == [Snapshot()]
    assert told(move, 3, 0.5) == [Hold(3, b"state")]
    assert move.held(3, 5, 0.83) == [Pause()]
    assert (move.rounds, move.phase) == (2, Source.PAUSING)


def test_a_gap_of_one_is_as_short_as_they_get() -> None:
    """A token is recomputed in 50 ms, a step takes 100 ms: a gap of two is worth a round, one of one is not."""
    move = Departure(0.0)
    told(move, 0, 0.0)
    assert move.held(0, 50, 5.0) == [Snapshot()]
    told(move, 50, 5.0)
    assert move.held(50, 52, 5.2) == [Snapshot()]
    told(move, 52, 5.2)
    assert move.held(52, 53, 5.3) == [Pause()]


def test_rounds_that_get_no_shorter_end() -> None:
    """A destination slower than the source never catches up."""
    move, seq, now = Departure(0.0), 0, 0.0
    told(move, 0, 0.0)
    while (steps := move.held(seq, seq + 10, now := now + 5.0)) == [Snapshot()]:
        seq += 10
        told(move, seq, now)
    assert steps == [Pause()]
    assert move.rounds == 2


def test_the_commit_ends_it_here_and_hands_over() -> None:
    move = offered()
    assert move.committed(0.5) == [Stop(), Over()]
    assert (move.phase, move.over, move.paused) == (Source.MOVED, True, 0.5)
    assert move.committed(0.6) == []


def test_a_refusal_lets_the_container_go_on_and_the_destination_forget() -> None:
    move = offered()
    assert move.kept(0.1) == [Continue(), Release(), Over()]
    assert move.why == "the gateway kept it"
    early = Departure(0.0)
    assert told(early, 0, 0.0, possible=False) == [Release(), Over()]


def test_an_offer_is_repeated_and_not_for_ever() -> None:
    move = offered()
    assert move.tick(OFFER_AGAIN / 2) == []
    assert move.tick(OFFER_AGAIN) == [Offer(6)]
    assert move.tick(OFFER_LIMIT) == [Continue(), Release(), Over()]
    assert "OFFERED" in move.why


def test_a_commit_that_comes_late_still_ends_what_was_kept() -> None:
    move = offered()
    move.failed("the destination was lost", 1.0)
    assert move.committed(2.0) == [Stop()]
    assert move.phase is Source.MOVED
    again = Departure(3.0)
    assert again.committed(3.1) == [Release(), Stop(), Over()]


def test_what_cannot_be_is_an_illegal_transition() -> None:
    move = offered()
    with pytest.raises(IllegalTransition):
        told(move, 7, 0.1)
    with pytest.raises(IllegalTransition):
        Arrival().on("HELD")


EVENTS = st.sampled_from(
    ["state", "paused", "impossible", "held", "late", "committed", "kept", "failed", "ended", "tick"]
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 30.0)), max_size=40))
def test_whatever_is_lost_late_or_twice_a_move_ends_once_and_leaves_nothing(script: list[tuple[str, float]]) -> None:
    """Every pause is followed by a CONTINUE or the commit, every HOLD by a release or the commit."""
    move, now, seq = Departure(0.0), 0.0, 0
    steps: list[Any] = list(move.begin())
    for event, pause in script:
        now, seq = now + pause, seq + 1
        try:
            match event:
                case "state" | "paused" | "impossible":
                    steps += told(move, seq, now, paused=event == "paused", possible=event != "impossible")
                case "held":
                    steps += move.held(seq, seq + 3, now)
                case "late":
                    steps += move.held(0, seq, now)
                case "committed":
                    steps += move.committed(now)
                case "kept":
                    steps += move.kept(now)
                case "failed":
                    steps += move.failed("x", now)
                case "ended":
                    steps += move.ended(now)
                case "tick":
                    steps += move.tick(now)
        except IllegalTransition:
            pass  # counted and dropped by the relay
        move.validate()
        assert steps.count(Over()) == int(move.over or Over() in steps) <= 1
    assert move.rounds <= MAX_ROUNDS
    if move.over:
        assert move.phase in (Source.MOVED, Source.KEPT, Source.ENDED)
        if any(isinstance(step, Hold) for step in steps):
            assert Release() in steps or Stop() in steps
        if Pause() in steps and move.phase is Source.KEPT:
            assert Continue() in steps


@given(st.lists(st.sampled_from(["HOLD", "HELD", "ACTIVATE", "CANCEL", "GONE"]), max_size=30))
def test_an_arrival_runs_only_when_it_was_activated_while_held(script: list[str]) -> None:
    arrival, before = Arrival(), Destination.ABSENT
    for event in script:
        before = arrival.phase
        try:
            arrival.on(event)
        except IllegalTransition:
            continue
        if arrival.phase is Destination.RUNNING and before is not Destination.RUNNING:
            assert event == "ACTIVATE" and before in (Destination.FILLING, Destination.HELD)
        if before is Destination.LEAVING:
            assert arrival.phase in (Destination.LEAVING, Destination.ABSENT)
