"""Starts ahead of need: which ones they are, and when their nodes are told that somebody waits by now."""

from __future__ import annotations

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.wire.messages import Hasten
from tests.controller.fakes import app, function
from tests.controller.story import F, deliver, deploy, settle, world
from tests.controller.world import World


def starts(made: World) -> list[bool]:
    return [start.body.ahead for start in made.sent(cmd.SendStart)]


def test_a_start_for_a_request_that_waits_is_not_ahead_and_one_beyond_those_is():
    made = world()
    deploy(made, app(function(buffer_containers=1)))
    made.demand("g", F, waiting=2)
    assert starts(made) == [False, False, True]
    assert not made.sent(cmd.SendHasten)


def test_a_start_for_the_least_number_is_ahead_until_somebody_waits_for_it():
    made = world()
    made.feed(ev.VersionAdded("app", 1, app(function(min_containers=2))))
    deliver(made)
    assert starts(made) == [True, True]
    made.progress("node-0", "ins-abc-1", "ready")
    deliver(made)
    made.demand("g", F, waiting=0, running=1)
    assert not made.sent(cmd.SendHasten)
    made.demand("g", F, waiting=1, running=1)
    assert made.sent(cmd.SendHasten) == [cmd.SendHasten("node-0", Hasten("ins-abc-2"))]
    made.demand("g", F, waiting=1, running=1)
    made.demand("g", F, waiting=2, running=1)
    assert len(made.sent(cmd.SendHasten)) == 1, "once"
    assert starts(made) == [True, True, False], "the second who waits has one of its own"


def test_nothing_that_is_ready_is_hastened():
    made = world()
    deploy(made, app(function(min_containers=1)))
    settle(made)
    made.demand("g", F, waiting=1)
    assert not made.sent(cmd.SendHasten)
