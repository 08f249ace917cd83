"""How long slots are kept: learned from what gateways served, and waited for where a start would harm others."""

from __future__ import annotations

import json
import math
import random

import pytest

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller import service_times
from sllm_faas.controller.model import TargetState, key_of
from sllm_faas.controller.service_times import ServiceTime, learn, service_time, slot_wait
from sllm_faas.controller.state import Machine
from sllm_faas.controller.views import Views
from sllm_faas.spec import Target
from sllm_faas.wire.messages import TargetDemand
from tests.controller.fakes import app, function
from tests.controller.story import deliver, deploy, world
from tests.controller.test_residency import START, pass_time
from tests.controller.world import World

F, G = Target("app", "f", 1), Target("app", "g", 1)


# -- learning ------------------------------------------------------------------------------------------------


def test_the_first_ones_count_alike_and_nothing_is_known_before():
    book: dict[str, float] = {}
    assert service_time(book, "a/f") is None
    for served, each in ((3, 0.1), (1, 0.5)):
        learn(book, "a/f", served, served * each)
    found = service_time(book, "a/f")
    assert found is not None
    assert found.seconds == pytest.approx(0.2)
    assert found.seen == 4
    assert service_time(book, "a/g") is None


@pytest.mark.parametrize("served", [1, 20])
def test_mean_and_deviation_of_one_are_found_however_many_are_told_at_once(served: int):
    rng, book = random.Random(7), {}
    for _ in range(4000 // served):
        learn(book, "a/f", served, sum(rng.expovariate(1.0) for _ in range(served)))
    found = service_time(book, "a/f")
    assert found is not None
    assert found.deviation is not None
    assert found.seconds == pytest.approx(1.0, rel=0.35)
    assert found.deviation == pytest.approx(2 / math.e, rel=0.5)  # the mean deviation of an exponential time


def test_what_changes_is_followed_as_fast_by_one_large_report_as_by_many_small_ones():
    one, many = ({}, {})
    for book in (one, many):
        learn(book, "a/f", 1000, 100.0)
    learn(one, "a/f", 50, 50.0)
    for _ in range(50):
        learn(many, "a/f", 1, 1.0)
    assert one["slot|a/f"] == pytest.approx(many["slot|a/f"])
    assert one["slot|a/f"] > 0.9


@pytest.mark.parametrize(("served", "seconds"), [(0, 1.0), (-1, 1.0), (1, -1.0), (1, math.inf), (1, math.nan)])
def test_nonsense_teaches_nothing(served: int, seconds: float):
    book: dict[str, float] = {}
    learn(book, "a/f", served, seconds)
    assert book == {}


def test_the_last_of_k_waits_for_k_of_m_slots_that_free_evenly():
    each = ServiceTime(2.0, None, 10)
    wait = slot_wait(each, 3, 4, 0.5)
    assert wait is not None
    assert wait.seconds == pytest.approx(2.0 * 3 / 4)
    assert str(wait) == "about 1.50 s; 3 wait for 4 slots, kept for 2.00 s (mean of 10)"
    assert slot_wait(each, 0, 4, 0.0) is None, "nobody waits"
    assert slot_wait(each, 3, 0, 0.0) is None, "no slot is there"
    young = ServiceTime(0.1, None, service_times.KNOWN - 1)
    assert slot_wait(young, 3, 4, 0.0) is None, "too few to be relied on"


# -- in the machine ------------------------------------------------------------------------------------------


def served(made: World, target: Target, waiting: int, running: int, count: int = 0, each: float = 0.0) -> None:
    made.feed(ev.DemandSeen("g", (TargetDemand(target, waiting, running, served=count, busy_seconds=count * each),)))


def crowded(each: float, ready: int = 1, **more: int) -> World:
    """g is idle and may go, f runs in `ready` instances with slots kept for `each` seconds; there is no room."""
    made = world(("node-0", 300 * (ready + 1)))
    deploy(made, app(function("f", memory_mb=300, **more), function("g", memory_mb=300)))
    made.demand("g", G, 1)
    pass_time(made, START)
    made.demand("g", G, 0)
    made.demand("g", F, ready)
    pass_time(made, 2 * START)
    assert made.live(F) == ready
    if each:
        served(made, F, 0, ready, 10, each)
    return made


def evictions(made: World) -> list[str]:
    return [stop.body.reason for stop in made.sent(cmd.SendStop)]


def blocked(made: World) -> str:
    return made.machine.state.targets[key_of(F)].blocked


def test_a_slot_that_is_nearer_than_a_start_that_evicts_is_waited_for_and_the_text_compares_them():
    made = crowded(0.2)
    served(made, F, 1, 1)
    assert evictions(made) == []
    assert blocked(made).startswith(
        "waits for a slot, about 0.20 s; 1 waits for 1 slot, kept for 0.20 s (mean of 10); "
    )
    assert "; otherwise in 2." in blocked(made)
    assert "node-0: stops 1 idle to free 300 MiB" in blocked(made)
    record = made.machine.state.targets[key_of(F)]
    assert record.look_at == pytest.approx(made.now + 0.2), "then it is chosen anew"
    served(made, F, 0, 1, 1, 0.2)
    assert blocked(made) == ""
    made.tick(made.now + 5.0)
    assert evictions(made) == []


def test_a_slot_that_is_further_than_a_start_is_not_waited_for():
    made = crowded(30.0)
    served(made, F, 1, 1)
    assert evictions(made) == [f"evicted for {F}"]


def test_who_has_seen_too_little_to_tell_evicts_as_ever():
    made = crowded(0.0)
    served(made, F, 1, 1, service_times.KNOWN - 1, 0.01)
    assert evictions(made) == [f"evicted for {F}"]


def test_a_line_that_does_not_shorten_is_not_waited_in_for_longer_than_a_start_takes():
    made = crowded(0.2)
    served(made, F, 1, 1)
    began = made.now
    while not evictions(made):
        deadline = made.machine.next_deadline()
        assert deadline is not None
        assert deadline < began + START + 1.0
        made.tick(deadline)
    assert made.now > began + START / 2


def test_more_that_wait_make_it_choose_anew_at_once():
    made = crowded(0.2)
    served(made, F, 1, 1)
    assert evictions(made) == []
    served(made, F, 100, 1)
    assert evictions(made) == [f"evicted for {F}"]


def test_without_a_ready_instance_there_is_no_slot_to_wait_for():
    made = crowded(0.2, ready=0)
    served(made, F, 0, 0, 10, 0.2)
    served(made, F, 1, 0)
    assert evictions(made) == [f"evicted for {F}"]


def test_what_is_owed_whatever_the_demand_is_not_put_off():
    made = crowded(0.2, min_containers=0)
    deploy(made, app(function("f", memory_mb=300, min_containers=2), function("g", memory_mb=300)), 2)
    later = Target("app", "f", 2)
    pass_time(made, 4 * START)
    assert made.machine.ledger.live(key_of(later))
    assert not blocked_of(made, later).startswith("waits for a slot")


def blocked_of(made: World, target: Target) -> str:
    return made.machine.state.targets[key_of(target)].blocked


def test_where_there_is_room_it_starts_at_once_however_near_a_slot_is():
    made = crowded(0.01)
    made.nodes["node-1"] = type(made.nodes["node-0"])("node-1", 300)
    made.hello("node-1")
    starts = len(made.sent(cmd.SendStart))
    served(made, F, 1, 1)
    assert len(made.sent(cmd.SendStart)) == starts + 1
    assert evictions(made) == []


def test_the_state_replays_and_is_restored_byte_for_byte_and_an_older_one_can_be_read():
    made = crowded(0.2)
    served(made, F, 1, 1, 3, 0.3)
    deliver(made)
    snapshot = made.machine.snapshot()
    assert made.replayed().snapshot() == snapshot
    assert Machine.restore(snapshot).snapshot() == snapshot
    older = json.loads(snapshot)
    for record in older["targets"].values():
        assert record.pop("waits_up_to") in (0, 2)
    for gateway in older["gateways"].values():
        for item in gateway["demand"].values():
            del item["served"], item["busy_seconds"]
    machine = Machine.restore(json.dumps(older).encode())
    machine.validate()
    assert machine.state.targets[key_of(F)].waits_up_to == TargetState(F).waits_up_to == 0


def test_describe_function_shows_what_was_learned():
    made = crowded(0.25)
    shown = Views(made.machine.ledger).describe_function("app", "f", made.now)
    assert shown["service_time"] == {"seconds": 0.25, "deviation": None, "seen": 10}
    assert Views(made.machine.ledger).describe_function("app", "g", made.now)["service_time"] is None
