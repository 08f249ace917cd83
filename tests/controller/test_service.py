"""The controller over real ipc sockets, with fake gateways and invokers."""

from __future__ import annotations

import asyncio

from sllm_faas.controller.service import Controller
from sllm_faas.spec import Target
from tests.controller.fakes import Gateway, Invoker, app


async def deploy(gateway: Gateway, invoker: Invoker, spec=None, **answer):
    done = asyncio.create_task(gateway.deploy(spec or app()))
    await invoker.check(**answer)
    return await done


async def test_a_deployed_app_is_checked_then_routed(controller: Controller, gateway: Gateway, invoker: Invoker):
    """app.deploy ends after the import check, and gateways learn the route."""
    done = await deploy(gateway, invoker)
    assert (done["app"], done["version"], done["unchanged"]) == ("app", 1, False)
    assert [stage["stage"] for stage in gateway.progress][:2] == ["register", "check"]
    routes = (await gateway.call("app.get", app="app"))["functions"]
    assert routes[0]["name"] == "f"


async def test_demand_starts_an_instance(controller: Controller, gateway: Gateway, invoker: Invoker):
    await deploy(gateway, invoker)
    gateway.demand(Target("app", "f", 1), 1, 0)
    start = await invoker.start()
    assert start.target == Target("app", "f", 1)
    assert start.bundle == app().bundle
    assert "node-0" in start.why
