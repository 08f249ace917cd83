"""Thousands of lives of a small platform, each in another order, with another choice of mishaps."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.controller.fakes import app, function
from tests.histories.parties import Link
from tests.histories.platform import Platform

HISTORIES = 10_000
BLOCKS = 10
STEPS = 36

NODES = {"n0": 1000, "n1": 800}
GATEWAYS = 2
SPECS = (
    app(
        function("f", concurrency=2, memory_mb=400, scaledown_window=5.0, max_containers=3),
        function("g", memory_mb=700, gpus=1, scaledown_window=0.0),
    ),
    app(
        function("f", concurrency=1, memory_mb=300, scaledown_window=1.0),
        function("g", memory_mb=300, gpus=1, scaledown_window=5.0, min_containers=1),
    ),
)

Verb = Callable[[Platform, Callable[[int], int]], object]
Pick = Callable[[int], int]


def _link(world: Platform, pick: Pick) -> Link:
    return world.links[pick(len(world.links))]


def deliver(world: Platform, pick: Pick) -> None:
    """The first message of some queue arrives."""
    queues = [(link, up) for link in world.links for up in (True, False) if (link.up if up else link.down)]
    if queues:
        world.deliver(*queues[pick(len(queues))])


def work(world: Platform, pick: Pick) -> None:
    busy = [node for node in world.nodes.values() if node.moves]
    if busy:
        world.work(busy[pick(len(busy))], pick(8), well=True)


def submit(world: Platform, pick: Pick) -> None:
    world.submit(f"g{pick(GATEWAYS)}", "ffg"[pick(3)], stream=pick(3) == 0, retries=pick(2))


def read(world: Platform, pick: Pick) -> None:
    for request in world.requests.values():
        request.read()


def wait(world: Platform, pick: Pick) -> None:
    world.wait((0.05, 0.2, 1.0, 7.0, 70.0)[pick(5)])


def stored(world: Platform, pick: Pick) -> None:
    world.stored()


def cancel(world: Platform, pick: Pick) -> None:
    alive = [r for r in world.requests.values() if r.gateway is world.gateways.get(r.gateway.name)]
    if alive:
        alive[pick(len(alive))].handle.cancel()


def fail(world: Platform, pick: Pick) -> None:
    """A start fails, a function raises."""
    busy = [node for node in world.nodes.values() if node.moves]
    if busy:
        world.work(busy[pick(len(busy))], pick(8), well=False)


def crash(world: Platform, pick: Pick) -> None:
    """A container dies."""
    entries = [(node, entry) for node in world.nodes.values() for entry in node.entries.values()]
    if entries:
        node, entry = entries[pick(len(entries))]
        node.end(entry, "failed")


def cut(world: Platform, pick: Pick) -> None:
    _link(world, pick).cut()


def deaf(world: Platform, pick: Pick) -> None:
    """The server of a link takes its client for lost."""
    world.lose_client(_link(world, pick))


def doubt(world: Platform, pick: Pick) -> None:
    """The client of a link takes its server for lost."""
    link = _link(world, pick)
    if not link.closed:
        link.lose()
        link.hello()


def _controls(world: Platform, pick: Pick) -> tuple[Link, bool] | None:
    """A queue between the controller and somebody, in which more than HELLO waits."""
    links = [(link, up) for link in world.links if not link.server for up in (True, False)]
    links = [(link, up) for link, up in links if len(link.up if up else link.down) > 0]
    return links[pick(len(links))] if links else None


def reorder(world: Platform, pick: Pick) -> None:
    found = _controls(world, pick)
    if found is not None:
        link, up = found
        link.torn = True
        world.deliver(link, up, pick(len(link.up if up else link.down)))


def double(world: Platform, pick: Pick) -> None:
    found = _controls(world, pick)
    if found is not None:
        link, up = found
        queue = link.up if up else link.down
        link.torn = True
        queue.append(queue[pick(len(queue))])


def drop(world: Platform, pick: Pick) -> None:
    found = _controls(world, pick)
    if found is not None:
        link, up = found
        queue = link.up if up else link.down
        link.torn = True
        del queue[pick(len(queue))]


def kill_node(world: Platform, pick: Pick) -> None:
    world.kill_node(f"n{pick(len(NODES))}")


def revive(world: Platform, pick: Pick) -> None:
    world.revive_node(f"n{pick(len(NODES))}")
    world.revive_gateway(f"g{pick(GATEWAYS)}")


def kill_gateway(world: Platform, pick: Pick) -> None:
    world.kill_gateway(f"g{pick(GATEWAYS)}")


def restart_controller(world: Platform, pick: Pick) -> None:
    world.restart_controller()


def deploy(world: Platform, pick: Pick) -> None:
    world.deploy(SPECS[pick(len(SPECS))])


ALWAYS: tuple[Verb, ...] = (deliver,) * 10 + (work,) * 4 + (submit,) * 2 + (read, wait, stored)
MISHAPS: tuple[Verb, ...] = (
    cancel, fail, crash, cut, deaf, doubt, reorder, double, drop, kill_node, kill_gateway, revive, restart_controller,
    deploy,
)  # fmt: skip


def meet(world: Platform) -> None:
    """The parts find each other."""
    for _ in range(4):
        for link in list(world.links):
            while world.deliver(link, upwards=True) or world.deliver(link, upwards=False):
                world.loop.settle()


def end(world: Platform, *, replay: bool) -> None:
    """It comes to rest; then whoever is there serves, as if nothing had been."""
    if replay:
        world.check_replay()
    for name in NODES:
        world.revive_node(name)
    for number in range(GATEWAYS):
        world.revive_gateway(f"g{number}")
    world.rest()
    world.check()
    for number in range(GATEWAYS):
        assert world.submit(f"g{number}", "f"), "the routes are lost"
    world.rest()
    world.check()
    last = [request.handle.ended for request in list(world.requests.values())[-GATEWAYS:]]
    assert all(ended is not None and ended.error is None for ended in last), f"not served: {last}"
    if replay:
        world.check_replay()


def history(seed: int) -> None:
    rng = Random(seed)
    mishaps = rng.sample(MISHAPS, rng.randrange(5))  # few at a time get further
    verbs = (*ALWAYS, *mishaps, *mishaps)
    world = Platform(SPECS[0], NODES, GATEWAYS)

    def pick(count: int) -> int:
        return int(rng.random() * count)

    with world.loop.running():
        if seed % 8:
            meet(world)
        for _ in range(STEPS):
            verbs[pick(len(verbs))](world, pick)
            world.settle()
        end(world, replay=seed % 10 == 0)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_in_any_order_nobody_is_lost_or_served_twice_and_what_is_desired_comes_to_be(block):
    for seed in range(block, HISTORIES, BLOCKS):
        try:
            history(seed)
        except Exception as error:
            raise AssertionError(f"history {seed}: {error}") from error


class Histories(RuleBasedStateMachine):
    """The same, by Hypothesis: fewer, but what fails is made small."""

    @initialize(met=st.booleans())
    def begin(self, met):
        self.world = Platform(SPECS[0], NODES, GATEWAYS)
        if met:
            with self.world.loop.running():
                meet(self.world)

    @rule(verb=st.sampled_from((*ALWAYS, *MISHAPS)), choices=st.lists(st.integers(0, 7), max_size=4))
    def happens(self, verb, choices):
        left = iter(choices)
        with self.world.loop.running():
            verb(self.world, lambda count: next(left, 0) % count)
            self.world.settle()

    def teardown(self):
        if hasattr(self, "world"):
            with self.world.loop.running():
                end(self.world, replay=True)


Histories.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestHistories = Histories.TestCase
