"""The invoker as a process, between a controller and a gateway that are this test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sllm_invoker.containers import tree

from sllm_faas import bundle
from sllm_faas.config import Config
from sllm_faas.spec import AppSpec, CheckpointSpec, FunctionSpec, MethodSpec, Target
from sllm_faas.wire.bus import Dealer, Parts, Router
from sllm_faas.wire.codec import Frame, decode, encode, pack, unpack_as
from sllm_faas.wire.header import NO_INVOCATION, NO_LIMIT, Header, Type
from sllm_faas.wire.messages import (
    BundlePart,
    Check,
    Hello,
    Ingest,
    InstanceReport,
    Invoke,
    Request,
    Start,
    Stop,
    Want,
    Welcome,
    ingest_id,
)
from tests.checkpoints.model_server import serving

pytestmark = pytest.mark.e2e

SOURCE = """
import os, sys, time
import sllm

app = sllm.App("app")

@app.function
def echo(x=0):
    print("seen", x)
    return x

@app.function
def pid():
    return os.getpid()

@app.function
def forever():
    import ctypes, sys
    libc = ctypes.PyDLL(None)  # whose calls do not let go of the interpreter
    sys.setswitchinterval(3600)
    libc.write(1, b"begun\\n", 6)
    libc.sleep(3600)

@app.function
async def blocked():
    os.write(1, b"begun\\n")
    time.sleep(3600)  # its loop takes in no frame meanwhile

@app.function
async def wait():
    import asyncio
    await asyncio.Event().wait()

@app.function
def leave():
    os._exit(7)

@app.function
def family():
    first = os.fork()
    if not first:
        os.setsid()
        second = os.fork()
        if second:
            os._exit(0)
        while True:
            time.sleep(3600)
    os.waitpid(first, 0)
    return os.getpid()

@app.function
def count(n):
    for i in range(n):
        yield i
"""


def function(name: str, **fields: Any) -> FunctionSpec:
    method = MethodSpec(name, stream=name == "count", is_async=name in ("wait", "blocked"))
    return FunctionSpec(name, module="user_app", qualname=name, methods=(method,), **fields)


class Node:
    """An invoker's process and both of its neighbours."""

    def __init__(self, directory: Path) -> None:
        self.config = Config(state_dir=directory, shutdown_grace=5.0, orphan_grace=5.0)
        self.config.prepare()
        source = directory / "code"
        source.mkdir()
        (source / "user_app.py").write_text(SOURCE)
        (source / "broken.py").write_text("import no_such_module_at_all\n")
        self.bundle = bundle.pack(source)
        self.frames: list[tuple[str, Frame]] = []
        self._changed = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.peer = b""
        self.controller = Router(self.config.controller_endpoint, self._from_invoker)
        self.gateway: Dealer | None = None

    def launch(self) -> None:
        path = self.config.run_dir / "config.json"
        self.config.write(path)
        command = [sys.executable, "-P", "-m", "sllm_invoker", "--config", str(path), "--name", "node-0"]
        with (self.config.state_dir / "invoker.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    # -- controller ------------------------------------------------------------------------------------------

    def _from_invoker(self, peer: bytes, parts: Parts) -> None:
        frame = decode(parts)
        if frame.header.type is Type.HELLO:
            self.peer = peer
            self.controller.send(peer, encode(Header(Type.WELCOME), Welcome("controller", "life")))
        if frame.header.type is Type.BUNDLE_GET:
            data = self.bundle.data[frame.body.offset : frame.body.offset + 1000]
            part = BundlePart(frame.body.digest, frame.body.offset, len(self.bundle.data))
            self.controller.send(peer, encode(Header(Type.BUNDLE_PART), part, data))
        self._note("invoker", frame)

    def command(self, kind: Type, body: Any, identity: bytes = NO_INVOCATION) -> None:
        self.controller.send(self.peer, encode(Header(kind, identity), body))

    # -- gateway ---------------------------------------------------------------------------------------------

    def connect(self, name: str = "gateway-0:x") -> None:
        self.gateway = Dealer(self.config.node_endpoint("node-0"), name.encode(), self._from_node)
        self.gateway.send(encode(Header(Type.HELLO), Hello("gateway", "gateway-0", "x")))

    def _from_node(self, parts: Parts) -> None:
        frame = decode(parts)
        assert self.gateway is not None
        self.gateway.send([Header(Type.HEARTBEAT).pack()])
        if frame.header.type is Type.GRANT:
            self.gateway.send(encode(Header(Type.WANT, route=frame.header.route, seq=frame.header.seq), Want(0)))
        self._note("node", frame)

    def invoke(self, number: int, route: int, payload: bytes = b"{}", stream: bool = False) -> bytes:
        identity = number.to_bytes(16, "big")
        header = Header(Type.INVOKE, identity, 1, route, credit=1000 if stream else NO_LIMIT)
        self.say(header, Invoke("", "json", stream, payload))
        return identity

    def say(self, header: Header, body: Any = None) -> None:
        assert self.gateway is not None
        self.gateway.send(encode(header, body))

    # -- wait ------------------------------------------------------------------------------------------------

    def _note(self, who: str, frame: Frame) -> None:
        if frame.header.type is not Type.HEARTBEAT:
            self.frames.append((who, frame))
            self._changed.set()

    async def frame(self, kind: Type, matches: Callable[[Frame], bool] = lambda _: True) -> Frame:
        """The first frame of a kind that matches, past or to come; it is taken away."""
        async with asyncio.timeout(30):
            while True:
                for each in self.frames:
                    if each[1].header.type is kind and matches(each[1]):
                        self.frames.remove(each)
                        return each[1]
                self._changed.clear()
                await self._changed.wait()

    async def state(self, instance: str, state: str) -> InstanceReport:
        frame = await self.frame(Type.INSTANCE, lambda f: f.body.instance == instance and f.body.state == state)
        report: InstanceReport = frame.body
        return report

    async def terminal(self, identity: bytes) -> Frame:
        async with asyncio.timeout(30):
            while True:
                for who, each in list(self.frames):
                    ends = (Type.DONE, Type.FAILED, Type.CANCELLED, Type.REFUSED)
                    if each.header.id == identity and each.header.type in ends:
                        self.frames.remove((who, each))
                        return each
                self._changed.clear()
                await self._changed.wait()

    async def start(self, name: str, **fields: Any) -> InstanceReport:
        spec = function(name, **fields)
        instance = f"ins-{name}"
        self.command(Type.START, Start(instance, Target("app", name, 1), spec, self.bundle.digest))
        report = await self.state(instance, "ready")
        await self.frame(Type.GRANT, lambda f: f.body.instance == instance and f.body.limit > 0)
        return report

    async def logged(self, text: str) -> dict[str, Any]:
        """The first record with that text, past or to come."""
        identity = os.urandom(16)
        self.say(Header(Type.REQUEST, identity), Request("logs.read", pack({"app": "app", "follow": True})))
        while True:
            reply = await self.frame(Type.REPLY, lambda f: f.header.id == identity)
            assert reply.body.error is None
            for record in unpack_as(dict[str, list[dict[str, Any]]], reply.body.body)["records"]:
                if record["text"] == text:
                    return record

    async def exit(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 20)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.gateway is not None:
            self.gateway.close()
        self.controller.close()
        tree.reap(self.config.node_dir("node-0"))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path / "s")
    try:
        made.launch()
        await made.frame(Type.HELLO)
        made.connect()
        await made.frame(Type.WELCOME)
        yield made
    finally:
        made.close()


async def test_a_cold_start_an_answer_and_a_stop(node: Node) -> None:
    report = await node.start("echo")
    assert {span.name for span in report.timeline.spans} >= {"bundle", "fork", "import"}
    assert report.warmth == "base"
    done = await node.terminal(node.invoke(1, report.number, b'{"x": 41}'))
    assert (done.header.type, done.body.payload) == (Type.DONE, b"41")
    node.command(Type.STOP, Stop("ins-echo"))
    await node.state("ins-echo", "draining")
    await node.state("ins-echo", "stopped")
    assert not tree.alive(report.pid)


async def test_outputs_of_a_stream_come_in_order(node: Node) -> None:
    report = await node.start("count")
    identity = node.invoke(1, report.number, b'{"n": 50}', stream=True)
    assert (await node.terminal(identity)).header.type is Type.DONE
    outputs = [frame for _, frame in node.frames if frame.header.type is Type.OUTPUT]
    assert [item for frame in outputs for item in frame.body] == [str(i).encode() for i in range(50)]


async def test_prints_are_in_the_log_with_their_invocation(node: Node) -> None:
    report = await node.start("echo")
    identity = node.invoke(1, report.number, b'{"x": 7}')
    await node.terminal(identity)
    found = await node.logged("seen 7")
    assert found["invocation"] == identity.hex()
    assert (found["function"], found["instance"], found["node"]) == ("echo", "ins-echo", "node-0")


async def test_a_killed_container_ends_its_invocations_and_leaves_no_grandchild(node: Node) -> None:
    report = await node.start("family", concurrency=2)
    await node.terminal(node.invoke(1, report.number))
    family = tree.descendants(report.pid)
    assert [pid for pid in family if tree.alive(pid)]
    other = await node.start("wait")
    waiting = node.invoke(2, other.number)
    await node.terminal(node.invoke(3, report.number))
    os.kill(other.pid, signal.SIGKILL)
    failed = await node.terminal(waiting)
    assert failed.header.type is Type.FAILED and failed.body.error.code == "worker_lost"
    assert "SIGKILL" in failed.body.error.message
    assert (await node.state("ins-wait", "failed")).error is not None
    os.kill(report.pid, signal.SIGKILL)
    await node.state("ins-family", "failed")
    assert not [pid for pid in family if tree.alive(pid)]


async def test_code_that_exits_the_process_is_a_lost_worker(node: Node) -> None:
    report = await node.start("leave")
    failed = await node.terminal(node.invoke(1, report.number))
    assert failed.body.error.code == "worker_lost" and "exit status 7" in failed.body.error.message


@pytest.mark.parametrize("name", ["forever", "blocked"])
async def test_code_that_ignores_its_cancellation_is_killed_after_the_grace(node: Node, name: str) -> None:
    report = await node.start(name, cancel_grace=0.3)
    identity = node.invoke(1, report.number)
    await node.logged("begun")
    node.say(Header(Type.CANCEL, identity, 1))
    assert (await node.terminal(identity)).header.type is Type.CANCELLED
    assert not tree.alive(report.pid)


@pytest.mark.parametrize("name", ["forever", "blocked"])
async def test_a_stop_does_not_wait_for_code_that_never_ends(node: Node, name: str) -> None:
    report = await node.start(name, cancel_grace=0.1)
    identity = node.invoke(1, report.number)
    await node.logged("begun")
    node.command(Type.STOP, Stop(f"ins-{name}", drain=0.1))
    assert (await node.terminal(identity)).header.type is Type.CANCELLED
    await node.state(f"ins-{name}", "stopped")
    assert not tree.alive(report.pid)


async def test_what_an_earlier_life_measured_is_told_at_once(tmp_path: Path) -> None:
    made = Node(tmp_path / "s")
    try:
        state = made.config.node_dir("node-0")
        state.mkdir(parents=True)
        kept = {"at": time.time(), "device": state.stat().st_dev, "bandwidth": {"disk": 2e9, "dram": 9e9}}
        (state / "bandwidth.json").write_text(json.dumps(kept))
        made.launch()
        hello = (await made.frame(Type.HELLO)).body
        assert hello.node.bandwidth == {"disk": 2e9, "dram": 9e9}
    finally:
        made.close()


async def test_a_module_that_does_not_import_fails_its_check_with_the_traceback(node: Node) -> None:
    broken = FunctionSpec("f", module="broken", qualname="f", methods=(MethodSpec("f"),))
    node.command(Type.CHECK, Check(AppSpec("app", (broken,), node.bundle.digest), 1))
    checked = (await node.frame(Type.CHECKED)).body
    assert checked.error.code == "import_failed"
    assert "no_such_module_at_all" in checked.error.message + checked.error.traceback
    node.command(Type.CHECK, Check(AppSpec("app", (function("echo"),), node.bundle.digest), 2))
    assert (await node.frame(Type.CHECKED)).body.error is None


async def test_a_missing_secret_fails_the_start_by_name(node: Node) -> None:
    spec = function("echo", secrets=("NO_SUCH_SECRET",))
    node.command(Type.START, Start("ins-s", Target("app", "echo", 1), spec, node.bundle.digest))
    error = (await node.state("ins-s", "failed")).error
    assert error is not None and error.code == "not_found" and "NO_SUCH_SECRET" in error.message


async def test_bad_frames_disturb_nothing(node: Node) -> None:
    report = await node.start("echo")
    assert node.gateway is not None
    for parts in ([b""], [b"short"], [bytes(36)], [b"\1\xff" + bytes(34)], [Header(Type.WANT).pack() + b"\xc1"]):
        node.gateway.send(parts)
    node.gateway.send([Header(Type.INVOKE, bytes(16), 1, report.number).pack() + b"\xc1junk"])
    assert (await node.terminal(bytes(16))).header.type is Type.FAILED
    done = await node.terminal(node.invoke(1, report.number, b'{"x": 1}'))
    assert done.header.type is Type.DONE


async def test_a_restarted_controller_is_told_everything_and_running_work_goes_on(node: Node) -> None:
    report = await node.start("wait")
    identity = node.invoke(1, report.number)
    node.controller.send(node.peer, [Header(Type.BYE).pack()])
    hello = (await node.frame(Type.HELLO)).body
    assert [each.instance for each in hello.instances] == ["ins-wait"]
    assert hello.instances[0].state == "ready" and hello.node.name == "node-0"
    node.say(Header(Type.CANCEL, identity, 1))
    assert (await node.terminal(identity)).header.type is Type.CANCELLED


async def test_sigterm_ends_everything_in_order(node: Node) -> None:
    report = await node.start("echo")
    assert node.process is not None
    node.process.terminate()
    await node.frame(Type.LEAVING)
    node.command(Type.STOP, Stop("ins-echo"))
    await node.state("ins-echo", "stopped")
    assert await node.exit() == 0
    assert not tree.alive(report.pid)
    assert not tree._leftovers(node.config.node_dir("node-0"))


async def test_a_node_that_leaves_serves_on_until_its_work_is_taken_away_and_loses_no_frame(node: Node) -> None:
    echo, wait = await node.start("echo"), await node.start("wait")
    waiting = node.invoke(1, wait.number)
    identity = os.urandom(16)
    node.say(Header(Type.REQUEST, identity), Request("node.leave"))
    assert (await node.frame(Type.REPLY, lambda f: f.header.id == identity)).body.error is None
    await node.frame(Type.LEAVING)
    assert (await node.terminal(node.invoke(2, echo.number, b'{"x": 5}'))).body.payload == b"5"
    for name in ("echo", "wait"):
        node.command(Type.STOP, Stop(f"ins-{name}"))
    await node.state("ins-echo", "stopped")
    late = node.invoke(3, echo.number)
    assert (await node.terminal(late)).header.type is Type.REFUSED
    node.say(Header(Type.CANCEL, waiting, 1))
    assert (await node.terminal(waiting)).header.type is Type.CANCELLED
    await node.frame(Type.BYE)
    assert await node.exit() == 0


async def test_a_controller_that_comes_back_is_told_of_the_notice_again(node: Node) -> None:
    await node.start("echo")
    assert node.process is not None
    node.process.terminate()
    await node.frame(Type.LEAVING)
    node.controller.send(node.peer, [Header(Type.BYE).pack()])
    await node.frame(Type.LEAVING)
    node.command(Type.STOP, Stop("ins-echo"))
    assert await node.exit() == 0


async def test_a_killed_invoker_takes_its_containers_along_and_the_next_life_reaps_the_rest(node: Node) -> None:
    report = await node.start("family")
    await node.terminal(node.invoke(1, report.number))
    escaped = [pid for pid in tree.descendants(report.pid) if tree.alive(pid)]
    assert escaped and node.process is not None
    pidfd = os.pidfd_open(report.pid)
    node.process.kill()
    await node.exit()
    async with asyncio.timeout(10):
        await tree.gone(pidfd)
    os.close(pidfd)
    assert tree.alive(escaped[0])
    node.launch()
    assert (await node.frame(Type.HELLO, lambda f: f.body.instances == ())).body.life
    assert not tree.alive(escaped[0])


async def test_the_invoker_imports_no_torch(node: Node) -> None:
    assert node.process is not None
    await node.start("echo")
    maps = Path(f"/proc/{node.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    log = (node.config.state_dir / "invoker.log").read_text()
    assert json.loads(log.splitlines()[-1])


async def test_what_runs_is_reported_now_and_then(node: Node) -> None:
    report = await node.start("wait")
    node.invoke(1, report.number)
    await node.frame(Type.INSTANCE, lambda f: f.body.instance == "ins-wait" and f.body.running == 1)


async def test_requests_are_answered_and_bad_ones_refused_by_name(node: Node) -> None:
    async def ask(op: str, body: bytes) -> Any:
        identity = os.urandom(16)
        node.say(Header(Type.REQUEST, identity), Request(op, body))
        return (await node.frame(Type.REPLY, lambda f: f.header.id == identity)).body

    assert unpack_as(dict[str, list[Any]], (await ask("checkpoint.list", pack({}))).body) == {"checkpoints": []}
    assert (await ask("checkpoint.pin", pack({"ref": "nothing"}))).error.code == "checkpoint_unavailable"
    assert (await ask("checkpoint.pin", pack({"ref": 5}))).error.code == "bad_request"
    assert (await ask("logs.read", b"\xc1")).error.code == "bad_request"
    assert (await ask("format.disk", pack({}))).error.code == "not_found"


@pytest.mark.parametrize("asked", ["start", "ingest"])
async def test_what_is_called_off_takes_the_pull_along_that_only_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("SLLM_TRUSTED_SOURCES", "127.0.0.1")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100_000))
    node = Node(tmp_path / "s")
    with serving(model) as server:
        server.hold = 50_000
        try:
            node.launch()
            await node.frame(Type.HELLO)
            if asked == "start":
                spec = FunctionSpec("far", kind="llm", checkpoint=CheckpointSpec(server.url))
                node.command(Type.START, Start("ins-far", Target("app", "far", 1), spec))
            else:
                for _ in range(2):  # it is one, however often it is asked for
                    node.command(Type.INGEST, Ingest("copy-1", CheckpointSpec(server.url), ahead=True))
            assert await asyncio.to_thread(server.held.wait, 30)
            if asked == "start":
                node.command(Type.STOP, Stop("ins-far", 0.0, "nobody waits for it any more"))
                await node.state("ins-far", "stopped")
            else:
                node.command(Type.CANCEL, None, ingest_id("copy-1"))
            assert await asyncio.to_thread(server.left.wait, 30)
        finally:
            node.close()


async def test_a_checkpoint_that_is_none_fails_its_ingest_with_the_reason(node: Node) -> None:
    node.command(Type.INGEST, Ingest("req-1", CheckpointSpec(str(node.config.state_dir / "nowhere")), "nothing"))
    ingested = (await node.frame(Type.INGESTED)).body
    assert ingested.request == "req-1" and not ingested.digest
    assert ingested.error.code in ("checkpoint_unavailable", "invalid_spec")
