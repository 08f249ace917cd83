"""A machine and its world at the beginning of a story, and what carries it on."""

from __future__ import annotations

from sllm_faas.controller import events as ev
from sllm_faas.spec import AppSpec, Target
from tests.controller.world import ModelNode, World

F = Target("app", "f", 1)


def world(*nodes: tuple[str, int]) -> World:
    """With nodes of that memory (MiB) up, and a gateway."""
    made = World()
    made.feed(ev.Restored())
    made.feed(ev.GatewayUp("g", "1"))
    for name, memory in nodes or (("node-0", 1000),):
        made.nodes[name] = ModelNode(name, memory)
        made.hello(name)
    return made


def deploy(made: World, spec: AppSpec, number: int = 1) -> None:
    made.feed(ev.VersionAdded(spec.name, number, spec))
    settle(made)


def settle(made: World) -> None:
    """All that was sent arrives; starts succeed and drains end at once; no time passes."""
    while made.to_nodes or made.to_machine or made._move_one():
        if made.to_nodes:
            made.obey()
        elif made.to_machine:
            made.feed(made.to_machine.pop(0))


def deliver(made: World) -> None:
    """All that was sent arrives; instances do nothing by themselves."""
    while made.to_nodes or made.to_machine:
        if made.to_nodes:
            made.obey()
        else:
            made.feed(made.to_machine.pop(0))


def running(made: World) -> list[str]:
    return [name for node in made.nodes.values() for name in node.reports]


def fail_start(made: World) -> None:
    deliver(made)
    (pair,) = [(n.name, r.instance) for n in made.nodes.values() for r in n.reports.values() if r.state == "starting"]
    made.progress(*pair, "failed")
    deliver(made)
