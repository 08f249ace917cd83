"""The controller over real ipc sockets, with fake gateways and invokers."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest

from sllm_faas.config import Config
from sllm_faas.controller import events as ev
from sllm_faas.controller import rpc
from sllm_faas.controller.service import Controller
from sllm_faas.controller.state import Machine
from sllm_faas.errors import (
    BadRequest,
    BadSpec,
    CallerError,
    Conflict,
    ErrorInfo,
    ImportFailed,
    NotFound,
    StorageFull,
    Unavailable,
)
from sllm_faas.spec import Target
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import (
    BundleGet,
    Checked,
    Hello,
    Ingested,
    InstanceReport,
    Migrated,
    MoveResult,
    NodeStats,
    Progress,
    Reply,
    ingest_id,
)
from tests.controller.fakes import ARCHIVE, BUNDLE, Gateway, Invoker, app, function, llm

F = Target("app", "f", 1)


async def deploy(gateway: Gateway, invoker: Invoker, spec=None, **answer):
    done = asyncio.create_task(gateway.deploy(spec or app()))
    await invoker.check(**answer)
    return await done


@contextlib.asynccontextmanager
async def peer(kind, controller, name, life="life-1"):
    made = kind(controller.endpoints[0], kind.__name__.lower(), name, life)
    try:
        yield made
    finally:
        made.close()


# -- deployments -------------------------------------------------------------------------------------------------


async def test_a_deployed_app_is_checked_stored_and_routed(controller, gateway, invoker):
    done = await deploy(gateway, invoker)
    assert (done["app"], done["version"], done["unchanged"]) == ("app", 1, False)
    assert done["seconds"] >= 0
    assert [stage["stage"] for stage in gateway.progress] == ["register", "check", "switch"]
    async with peer(Gateway, controller, "gateway-1") as other:
        routes = await other.hello()
    assert [(route.app, route.version, route.spec.name) for route in routes.functions] == [("app", 1, "f")]
    assert [node.name for node in routes.nodes] == ["node-0"]
    assert [version.active for version in controller.store.versions()] == [True]


async def test_gateways_learn_a_new_route_by_the_next_delta(controller, gateway, invoker):
    node = (await gateway.expect(Type.ROUTES_DELTA)).body
    await deploy(gateway, invoker)
    async with peer(Gateway, controller, "gateway-1") as other:
        whole = await other.hello()
    assert node.nodes[0].name == "node-0"
    assert whole.seq == node.seq + 1


async def test_an_unchanged_app_makes_no_new_version(controller, gateway, invoker):
    await deploy(gateway, invoker)
    again = await gateway.deploy(app())
    assert (again["version"], again["unchanged"]) == (1, True)
    assert len(controller.store.versions()) == 1


async def test_a_failed_deployment_answers_with_the_users_traceback_and_the_old_version_serves(
    controller, gateway, invoker
):
    await deploy(gateway, invoker)
    error = ErrorInfo("import_failed", "No module named 'numpyy'", "Add it.", status=503, traceback="Traceback: line 3")
    with pytest.raises(ImportFailed, match="numpyy") as caught:
        await deploy(gateway, invoker, app(function(concurrency=2)), error=error)
    assert caught.value.traceback == "Traceback: line 3"
    found = await gateway.call("app.get", app="app")
    assert found["version"] == 1
    assert [(v["version"], v["state"], v["active"]) for v in found["versions"]] == [
        (2, "failed", False),
        (1, "ready", True),
    ]
    assert found["versions"][0]["error"]["traceback"] == "Traceback: line 3"


async def test_a_rollback_serves_the_version_before(controller, gateway, invoker):
    await deploy(gateway, invoker)
    await deploy(gateway, invoker, app(function(concurrency=2)))
    assert await gateway.call("app.rollback", app="app", version=None) == {"app": "app", "version": 1, "from": 2}
    assert (await gateway.call("app.get", app="app"))["version"] == 1
    assert (await gateway.call("app.rollback", app="app", version=2))["from"] == 1
    with pytest.raises(NotFound, match="no ready version 9; ready: 1, 2"):
        await gateway.call("app.rollback", app="app", version=9)


async def test_there_is_nothing_to_roll_back_to_before_the_second_version(controller, gateway, invoker):
    await deploy(gateway, invoker)
    with pytest.raises(Conflict, match="no earlier version"):
        await gateway.call("app.rollback", app="app")


async def test_min_containers_are_started_before_the_switch(controller, gateway, invoker):
    done = asyncio.create_task(gateway.deploy(app(function(min_containers=1))))
    await invoker.check()
    assert not done.done()
    await invoker.start()
    assert (await done)["version"] == 1


async def test_a_bundle_is_verified_and_handed_out_in_parts(controller, gateway, invoker):
    with pytest.raises(CallerError, match="digest is"):
        await gateway.call("bundle.put", b"other bytes", digest=BUNDLE)
    assert (await gateway.call("bundle.has", digest=BUNDLE))["present"] is False
    with pytest.raises(NotFound, match="was not uploaded"):
        await gateway.call("app.deploy", spec=app())
    assert await gateway.call("bundle.put", ARCHIVE, digest=BUNDLE) == {"digest": BUNDLE, "size": len(ARCHIVE)}
    assert await gateway.call("bundle.has", digest=BUNDLE) == {"digest": BUNDLE, "present": True, "size": len(ARCHIVE)}
    invoker.send(Type.BUNDLE_GET, BundleGet(BUNDLE, 3))
    part = await invoker.expect(Type.BUNDLE_PART)
    assert (part.body.total, part.body.offset, part.buffers) == (len(ARCHIVE), 3, (ARCHIVE[3:],))
    invoker.send(Type.BUNDLE_GET, BundleGet("../../etc/passwd"))
    assert (await invoker.expect(Type.BUNDLE_PART)).body.total == 0


async def test_progress_of_a_check_reaches_who_deploys(controller, gateway, invoker):
    done = asyncio.create_task(gateway.deploy(app(llm(), bundle="")))
    await invoker.expect(Type.CHECK)
    invoker.send(Type.PROGRESS, Progress("app@1", "download", 5, 10))
    invoker.send(Type.CHECKED, Checked("app", 1, checkpoints={"chat": "d" * 64}))
    await done
    assert {"stage": "download", "done": 5, "total": 10, "text": ""} in gateway.progress


async def test_deleting_an_app_drains_it(controller, gateway, invoker):
    await deploy(gateway, invoker)
    gateway.demand(F, 1, 0)
    start = await invoker.start()
    assert (await gateway.call("app.delete", app="app"))["deleted"]
    assert (await invoker.expect(Type.STOP)).body.instance == start.instance
    assert (await gateway.expect(Type.TARGET_FAILED)).body.error.code == "not_found"
    with pytest.raises(NotFound, match="'app' does not exist"):
        await gateway.call("app.delete", app="app")
    assert controller.store.versions() == ()


# -- running -----------------------------------------------------------------------------------------------------


async def test_demand_starts_an_instance_and_idleness_stops_it(controller, gateway, invoker):
    await deploy(gateway, invoker, app(function(scaledown_window=0.0)))
    gateway.demand(F, 1, 0)
    start = await invoker.start()
    assert (start.target, start.bundle) == (F, BUNDLE)
    assert start.why.startswith("node-0: ")
    gateway.demand(F, 0, 1)
    gateway.demand(F, 0, 0)
    stop = (await invoker.expect(Type.STOP)).body
    assert (stop.instance, stop.drain) == (start.instance, None)
    invoker.report(start, "stopped")
    assert (await gateway.call("instance.list", app=None))["instances"] == []


async def test_a_start_that_fails_is_told_to_the_gateway_that_waits(controller, gateway, invoker):
    await deploy(gateway, invoker)
    gateway.demand(F, 1, 0)
    start = (await invoker.expect(Type.START)).body
    invoker.report(start, "failed", error=ErrorInfo("start_failed", "enter raised", status=503, traceback="tb"))
    failed = (await gateway.expect(Type.TARGET_FAILED)).body
    assert (failed.target, failed.error.traceback) == (F, "tb")
    assert 0 < failed.error.retry_after <= 1.0


async def test_a_node_that_leaves_has_its_work_started_elsewhere(controller, gateway, invoker):
    await deploy(gateway, invoker)
    async with peer(Invoker, controller, "node-1") as other:
        await other.hello()
        gateway.demand(F, 0, 1)
        await invoker.start()
        invoker.send(Type.BYE)
        assert (await other.expect(Type.START)).body.target == F


async def test_a_silent_node_is_lost_and_one_that_speaks_is_not(controller, gateway, invoker, monkeypatch):
    """Its heartbeats are not answered any more; the clock is moved, not waited for."""
    await deploy(gateway, invoker)
    gateway.demand(F, 0, 1)
    await invoker.start()
    await gateway.call("status")
    real, later = controller.now, [0.0]
    monkeypatch.setattr(controller, "now", lambda: real() + later[0])
    for step in (1.0, 2.0, 3.0, 4.0):
        later[0] = step
        gateway.send(Type.HEARTBEAT)
        await gateway.call("status")
        for lost in controller.peers.expire(controller.now()):
            controller._gone(lost, orderly=False)
    status = await gateway.call("status")
    assert [(node["name"], node["state"]) for node in status["nodes"]] == [("node-0", "lost")]
    assert status["counts"]["instances"]["ready"] == 0
    invoker.send(Type.HEARTBEAT)
    await invoker.expect(Type.BYE)


async def test_a_gateway_that_leaves_takes_its_demand_along(controller, gateway, invoker):
    await deploy(gateway, invoker, app(function(scaledown_window=0.0)))
    async with peer(Gateway, controller, "gateway-1") as other:
        await other.hello()
        other.demand(F, 1, 0)
        start = await invoker.start()
        other.send(Type.BYE)
        assert (await invoker.expect(Type.STOP)).body.instance == start.instance


async def test_a_stranger_is_told_to_say_hello(controller, invoker):
    async with peer(Gateway, controller, "gateway-9") as stranger:
        stranger.send(Type.HEARTBEAT)
        await stranger.expect(Type.BYE)
        await stranger.hello()
        assert (await stranger.call("status"))["counts"]["gateways"] == 1


# -- restart -----------------------------------------------------------------------------------------------------


async def test_a_restarted_controller_adopts_what_runs_and_stops_what_should_not(config: Config):
    """Nothing is started anew, gateways keep their routes and nodes, an unknown version's instance is stopped."""
    first = Controller(config)
    await first.start()
    async with peer(Gateway, first, "gateway-0") as gateway, peer(Invoker, first, "node-0") as invoker:
        await gateway.hello()
        await invoker.hello()
        await deploy(gateway, invoker)
        gateway.demand(F, 0, 1)
        start = await invoker.start()
        await gateway.call("status")
        # As if killed: the node did not leave in order.
        for router in first._routers:
            router.close()
        first._routers.clear()
        await first.stop()
        second = Controller(config)
        await second.start()
        try:
            gateway.send(Type.HEARTBEAT)
            await gateway.expect(Type.BYE)
            routes = await gateway.hello()
            assert [route.version for route in routes.functions] == [1]
            assert [node.name for node in routes.nodes] == ["node-0"], "known before it reports, so links stay"
            gateway.demand(F, 0, 1)
            stray = InstanceReport("ins-stray", 2, Target("gone", "f", 7), "ready")
            await invoker.hello(InstanceReport(start.instance, 1, F, "ready"), stray)
            assert (await invoker.expect(Type.STOP)).body.instance == "ins-stray"
            instances = (await gateway.call("instance.list"))["instances"]
            assert {i["instance"]: i["state"] for i in instances} == {start.instance: "ready", "ins-stray": "draining"}
            assert Type.START not in invoker.seen[invoker.seen.index(Type.STOP) :]
        finally:
            await second.stop()


async def test_the_written_event_log_replays_to_the_same_state(controller, gateway, invoker):
    await deploy(gateway, invoker, app(function(scaledown_window=0.0)))
    gateway.demand(F, 1, 0)
    start = await invoker.start()
    invoker.report(start, "failed", error=ErrorInfo("x", "y", args=b"\0bytes"))
    await gateway.call("status")
    await controller._flush_log()
    other = Machine(controller.life)
    for at, kind, data in controller.store.events(controller.life):
        other.handle(ev.decode_event(kind, data), at)
    assert other.snapshot() == controller.machine.snapshot()


# -- operations --------------------------------------------------------------------------------------------------


async def test_status_and_describe_show_demand_estimates_and_starts(controller, gateway, invoker):
    await deploy(gateway, invoker)
    gateway.demand(F, 1, 0)
    start = await invoker.start()
    invoker.send(Type.NODE, NodeStats(100, 200, 1))
    status = await gateway.call("status")
    assert status["counts"]["instances"] == {"requested": 0, "starting": 0, "ready": 1, "draining": 0}
    assert status["counts"]["waiting"] == 1
    assert status["storage"] == {"ok": True, "error": ""}
    described = await gateway.call("describe.function", app="app", function="f")
    assert described["desired"] == 1
    (target,) = described["targets"]
    assert target["placement"].startswith("node-0: ")
    (started,) = described["starts"]
    assert (started["instance"], started["state"]) == (start.instance, "ready")
    assert started["predicted"] > 0
    assert started["actual"] >= 0
    node = await gateway.call("describe.node", node="node-0")
    assert node["disk_free_mb"] == 200
    assert [instance["instance"] for instance in node["instances_list"]] == [start.instance]
    assert "container|node-0|cold" in node["estimates"] or node["estimates"]
    for shape in (status, described, node):
        msgspec.json.encode(shape)


async def test_names_that_are_nearly_right_are_suggested(controller, gateway, invoker):
    await deploy(gateway, invoker)
    with pytest.raises(NotFound) as caught:
        await gateway.call("describe.function", app="apq", function="f")
    assert caught.value.hint == "Did you mean 'app'?"


async def test_nodes_are_cordoned_and_stay_so_when_they_return(controller, gateway, invoker):
    assert (await gateway.call("node.cordon", node="node-0"))["cordoned"] is True
    invoker.send(Type.BYE)
    await invoker.hello()
    (node,) = (await gateway.call("node.list"))["nodes"]
    assert (node["name"], node["cordoned"]) == ("node-0", True)
    assert (await gateway.call("node.uncordon", node="node-0"))["cordoned"] is False
    with pytest.raises(NotFound, match="'node-7'"):
        await gateway.call("node.cordon", node="node-7")


async def test_an_instance_is_stopped_by_hand(controller, gateway, invoker):
    await deploy(gateway, invoker)
    gateway.demand(F, 1, 0)
    start = await invoker.start()
    await gateway.call("instance.stop", instance=start.instance, drain=2.0)
    stop = (await invoker.expect(Type.STOP)).body
    assert (stop.instance, stop.drain, stop.reason) == (start.instance, 2.0, "asked for")
    with pytest.raises(NotFound, match="'ins-none' does not exist"):
        await gateway.call("instance.stop", instance="ins-none")


async def test_tokens_are_published_by_hash_and_their_text_is_shown_once(controller, gateway, config):
    made = await gateway.call("token.create", name="ci", scopes=["deploy"], apps=["app"], expires_in=60)
    assert made["token"].startswith("sllm_")
    assert len(made["token"]) == 48
    delta = (await gateway.expect(Type.ROUTES_DELTA)).body
    (entry,) = delta.tokens
    assert (entry.name, entry.scopes, entry.apps) == ("ci", ("deploy",), ("app",))
    listed = await gateway.call("token.list")
    assert made["token"] not in str(listed)
    assert made["token"].encode() not in config.db_path.read_bytes()
    with pytest.raises(Conflict):
        await gateway.call("token.create", name="ci", scopes=["deploy"])
    with pytest.raises(CallerError, match="scopes are"):
        await gateway.call("token.create", name="x", scopes=["root"])
    await gateway.call("token.delete", name="ci")
    assert (await gateway.expect(Type.ROUTES_DELTA)).body.tokens_gone == ("ci",)


async def test_the_admin_token_is_a_private_file_and_a_published_hash(controller, gateway, config):
    assert config.admin_token_path.stat().st_mode & 0o777 == 0o600
    async with peer(Gateway, controller, "gateway-1") as other:
        (entry,) = (await other.hello()).tokens
    assert (entry.name, entry.scopes) == ("admin", ("admin",))
    with pytest.raises(Conflict, match="platform's own"):
        await gateway.call("token.delete", name="admin")


async def test_a_pull_is_followed_to_its_end(controller, gateway, invoker):
    done = asyncio.create_task(gateway.call("checkpoint.pull", source="org/model", name="m", tensor_parallel=2))
    ingest = (await invoker.expect(Type.INGEST)).body
    assert (ingest.checkpoint.source, ingest.checkpoint.tensor_parallel, ingest.name) == ("org/model", 2, "m")
    invoker.send(Type.PROGRESS, Progress(ingest.request, "download", 1, 2))
    invoker.send(Type.INGESTED, Ingested(ingest.request, "d" * 64, 99))
    assert await done == {"name": "m", "digest": "d" * 64, "bytes": 99, "node": "node-0"}
    assert [stage["stage"] for stage in gateway.progress] == ["pull", "download"]
    (node,) = (await gateway.call("node.list"))["nodes"]
    assert node["checkpoints"] == ["d" * 64]


async def test_a_pull_for_no_number_of_ranks_is_refused(controller, gateway):
    with pytest.raises(BadRequest, match="tensor_parallel is 0; allowed: an integer, 1 to 1024"):
        await gateway.call("checkpoint.pull", source="org/model", tensor_parallel=0)


async def test_a_pull_ends_with_its_node(controller, gateway, invoker):
    done = asyncio.create_task(gateway.call("checkpoint.pull", source="org/model"))
    await invoker.expect(Type.INGEST)
    invoker.send(Type.BYE)
    with pytest.raises(Unavailable, match="node-0 went away"):
        await done


async def test_a_deployed_checkpoint_is_brought_to_a_second_node_and_called_off_with_its_app(
    controller, gateway, invoker
):
    async with peer(Invoker, controller, "far") as far:
        await far.hello(joined=True)
        await gateway.call("node.cordon", node="far")
        far.send(Type.NODE, NodeStats(0, 9000, 0))
        await deploy(gateway, invoker, app(llm("chat")), checkpoints={"chat": "d" * 64}, sizes={"d" * 64: 99})
        await gateway.call("node.uncordon", node="far")
        ingest = (await far.expect(Type.INGEST)).body
        assert (ingest.checkpoint.digest, ingest.ahead) == ("d" * 64, True)
        shown = await gateway.call("describe.function", app="app", function="chat")
        assert [(copy["nodes"], copy["coming"]) for copy in shown["copies"]] == [(["node-0"], "far")]
        await gateway.call("app.delete", app="app")
        assert (await far.expect(Type.CANCEL)).header.id == ingest_id(ingest.request)
        far.send(Type.INGESTED, Ingested(ingest.request, error=ErrorInfo("x", "too late")))
        assert not (await gateway.call("app.list"))["apps"]


async def test_invocations_are_asked_of_every_gateway_and_merged(controller, gateway):
    async with peer(Gateway, controller, "gateway-1") as other:
        await other.hello()
        done = asyncio.create_task(gateway.call("invocation.list", limit=2))
        for who, began in ((other, (5.0, 1.0)), (gateway, (3.0,))):
            asked = await who.expect(Type.REQUEST)
            assert asked.body.op == "invocation.list"
            records = [{"id": f"{who.name}-{at}", "began": at} for at in began]
            who.send(Type.REPLY, Reply(codec.pack({"invocations": records})), identity=asked.header.id)
        assert [record["began"] for record in (await done)["invocations"]] == [5.0, 3.0]


@pytest.mark.parametrize("op", ["invocation.get", "invocation.cancel"])
async def test_a_gateway_that_goes_away_is_left_out_of_the_answer(controller, gateway, op):
    async with peer(Gateway, controller, "gateway-1") as other:
        await other.hello()
        done = asyncio.create_task(gateway.call(op, id="inv-1"))
        await other.expect(Type.REQUEST)
        other.send(Type.BYE)
        asked = await gateway.expect(Type.REQUEST)
        reply = Reply(codec.pack({"invocation": {"id": "inv-1"}}))
        gateway.send(Type.REPLY, reply, identity=asked.header.id)
        assert await done == {"invocation": {"id": "inv-1"}}


# -- moves -------------------------------------------------------------------------------------------------------

CHAT = Target("app", "chat", 1)


async def running(gateway: Gateway, invoker: Invoker) -> str:
    """An instance of a language model on node-0 that runs something; its id."""
    await deploy(gateway, invoker, app(llm(), bundle=""), checkpoints={"chat": "d" * 64}, sizes={"d" * 64: 2**20})
    gateway.demand(CHAT, 1, 0)
    start = await invoker.start()
    gateway.demand(CHAT, 0, 1)
    invoker.report(start, "ready", running=1, tokens=100)
    return start.instance


async def answer_get(gateway: Gateway, **record) -> None:
    asked = await gateway.expect(Type.REQUEST)
    assert asked.body.op == "invocation.get"
    gateway.send(Type.REPLY, Reply(codec.pack({"invocation": record})), identity=asked.header.id)


async def test_a_person_moves_an_invocation_and_hears_how_it_went(controller, gateway, invoker):
    instance = await running(gateway, invoker)
    async with peer(Invoker, controller, "node-1") as other:
        await other.hello()
        done = asyncio.create_task(gateway.call("invocation.migrate", id="inv-" + "ab" * 16, node="node-1"))
        await answer_get(gateway, instance=instance, node="node-0", state="streaming")
        heir = await other.start()
        body = (await invoker.expect(Type.MIGRATE)).body
        assert (body.instance, body.to, body.node) == (instance, heir.instance, "node-1")
        assert body.invocations == ("ab" * 16,)
        result = MoveResult("ab" * 16, "moved", total=0.5, paused=0.02, rounds=2, tokens=300)
        invoker.send(Type.MIGRATED, Migrated(body.migration, instance, (result,)))
        moved = await done
        assert (moved["from"], moved["to"], moved["instance"]) == ("node-0", "node-1", heir.instance)
        assert (moved["seconds"], moved["rounds"]) == (0.5, 2)
        assert (await gateway.call("describe.node", node="node-1"))["moves"][0]["tokens"] == 300
        described = await gateway.call("describe.function", app="app", function="chat")
        assert described["moves"][0]["outcome"] == "moved"


async def test_what_cannot_move_is_refused_with_the_reason(controller, gateway, invoker):
    instance = await running(gateway, invoker)
    for record, reason in (
        ({"instance": instance, "node": "node-0", "state": "done"}, "it is done"),
        ({"instance": instance, "node": "node-0", "state": "streaming"}, "runs on node-0 already"),
        ({"instance": "ins-x", "node": "node-0", "state": "streaming"}, "not there any more"),
    ):
        done = asyncio.create_task(gateway.call("invocation.migrate", id="inv-1", node="node-0"))
        await answer_get(gateway, **record)
        with pytest.raises(Conflict, match=reason):
            await done
    done = asyncio.create_task(gateway.call("invocation.migrate", id="inv-1", node="node-0"))
    asked = await gateway.expect(Type.REQUEST)
    gateway.send(Type.REPLY, Reply(codec.pack({"invocation": None})), identity=asked.header.id)
    with pytest.raises(NotFound, match="inv-1"):
        await done


async def test_a_node_that_was_given_notice_is_emptied(controller, gateway, invoker):
    instance = await running(gateway, invoker)
    async with peer(Invoker, controller, "node-1") as other:
        await other.hello()
        invoker.send(Type.LEAVING)
        await other.start()
        assert (await invoker.expect(Type.STOP)).body.instance == instance
        body = (await invoker.expect(Type.MIGRATE)).body
        assert (body.instance, body.invocations) == (instance, ())


# -- bad input ---------------------------------------------------------------------------------------------------


async def test_every_operation_has_somebody_who_does_it(controller):
    verbs = {"_op_" + op.replace(".", "_") for op in rpc.BODIES}
    found = {name for owner in (controller.admin, controller.admin.access) for name in dir(owner)}
    assert {name for name in found if name.startswith("_op_")} == verbs


async def test_bad_operations_are_refused_by_name(controller, gateway):
    with pytest.raises(CallerError, match=r"unknown operation 'app.explode'"):
        await gateway.call("app.explode")
    with pytest.raises(CallerError, match="missing required field `app`"):
        await gateway.call("app.get")
    with pytest.raises(BadSpec, match="concurrency is 0"):
        plain = msgspec.to_builtins(app())
        plain["functions"][0]["concurrency"] = 0
        await gateway.call("app.deploy", spec=plain)


async def test_bad_frames_are_counted_by_type_and_dropped(controller, gateway, invoker):
    gateway.dealer.send([b"short"])
    gateway.dealer.send([Header(Type.DEMAND).pack() + b"\xc1"])
    gateway.send(Type.INSTANCE, InstanceReport("i", 1, F, "ready"))
    invoker.send(Type.INSTANCE, InstanceReport("i", 1, F, "stopped"))
    await invoker.hello()
    dropped = (await gateway.call("status"))["dropped"]
    assert dropped == {"bad": 1, "DEMAND": 1, "INSTANCE": 1}


async def test_a_hello_that_cannot_be_is_refused(controller, gateway):
    async with peer(Invoker, controller, "node-5") as odd:
        odd.send(Type.HELLO, Hello("invoker", "node-5", "1"))
        odd.send(Type.HELLO, Hello("container", "node-5", "1"))
        odd.send(Type.HEARTBEAT)
        await odd.expect(Type.BYE)
    assert (await gateway.call("status"))["dropped"] == {"HELLO": 2}


async def test_a_full_disk_fails_what_writes_and_reading_goes_on(controller, gateway, invoker):
    await deploy(gateway, invoker)
    with controller.store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        # In the writer's thread it is the same pooled connection.
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    spec = app(*(function(f"f{k}") for k in range(200)))
    with pytest.raises(StorageFull, match="is full"):
        await gateway.deploy(spec)
    status = await gateway.call("status")
    assert status["storage"]["ok"] is False
    assert (await gateway.call("app.get", app="app"))["version"] == 1
    gateway.demand(F, 1, 0)
    assert (await invoker.start()).target == F
