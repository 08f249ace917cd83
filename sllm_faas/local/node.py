"""The one node of a local platform: the relay core's shell, and instances in threads instead of processes.

Obeys START and STOP of the control, relays between the gateway and instances, reports every change. It decides
nothing: that is `relay_core`'s. What it cannot do is kill: an instance that ignores its cancellation is given up,
its invocations end as if it had been killed, and its thread goes on until its code ends.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm._runtime import Found
from sllm_invoker.relay_core import Action, Drain, Kill, RelayCore, Send
from sllm_invoker.relay_core import Instance as Relayed

from sllm_faas.errors import ErrorInfo
from sllm_faas.local.instance import LocalInstance
from sllm_faas.spec import Timeline
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts, PeerGone
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.memory import MemoryBus
from sllm_faas.wire.messages import InstanceReport, InstanceState, Shutdown, Start, Stop

NAME = "local"
ENDPOINT = "memory://node"
TICK = 0.05


@dataclass(frozen=True, slots=True)
class Code:
    """Where a function is found: the registered object (None for a language model), its source directory, its
    checkpoint's object directory."""

    found: Found | None
    root: str = ""
    object_dir: Path | None = None


@dataclass(slots=True)
class _Running:
    number: int
    start: Start
    instance: LocalInstance
    state: InstanceState = "starting"
    stop: Stop | None = None
    """Asked for while it was starting."""


class LocalNode:
    """`find(start)` gives the code of an instance; `report` takes every change, on the loop."""

    def __init__(
        self, bus: MemoryBus, gateway: bytes, find: Callable[[Start], Code], report: Callable[[InstanceReport], None]
    ) -> None:
        self.core = RelayCore(NAME)
        self._find = find
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._router = bus.router(ENDPOINT, self._from_gateway)
        self._running: dict[int, _Running] = {}
        self._numbers = 0
        self._settling = False
        self.empty = asyncio.Event()
        self.empty.set()
        self._perform(self.core.gateway_joined(gateway, self._loop.time()))
        self._timer = self._loop.call_later(TICK, self._tick)

    def close(self) -> None:
        self._timer.cancel()
        self._router.close()

    # -- instances -------------------------------------------------------------------------------------------

    def start(self, body: Start) -> None:
        """Start an instance; reports follow."""
        self._numbers += 1
        number, spec, code = self._numbers, body.spec, self._find(body)

        def deliver(parts: Parts) -> None:
            self._from_instance(peer, parts)

        def drained() -> None:
            self._loop.call_soon_threadsafe(self._close, number)

        peer = body.instance.encode()
        instance = LocalInstance(
            body.instance, body.target, spec, code.found, code.root, code.object_dir, NAME, self._loop, deliver, drained
        )
        running = self._running[number] = _Running(number, body, instance)
        self.empty.clear()
        limit = spec.timeouts.execution
        self.core.add(
            Relayed(number, body.instance, peer, body.target, spec.concurrency, limit, spec.cancel_grace, why=body.why)
        )
        self._tell(running)
        self._settle_soon()
        _thread(f"sllm-start-{body.instance}", lambda: self._open(running))

    def _open(self, running: _Running) -> None:
        """On a thread of the instance's own."""
        try:
            timeline = running.instance.open()
        except BaseException as error:  # user code may raise anything, SystemExit too
            info = running.instance.start_error(error)
            _quietly(running.instance.close)
            self._schedule(lambda: self._ended(running, "failed", info))
        else:
            self._schedule(lambda: self._opened(running, timeline))

    def _opened(self, running: _Running, timeline: Timeline) -> None:
        if running.stop is None:
            running.state = "ready"
            self.core.ready(running.number, timeline)
        self._tell(running, timeline)
        if running.stop is not None:
            self._shut_down(running, running.stop.drain)
        self._settle_soon()

    def stop(self, body: Stop) -> None:
        """Drain and stop an instance. Idempotent."""
        running = next((item for item in self._running.values() if item.start.instance == body.instance), None)
        if running is None or running.stop is not None:
            return
        running.stop = body
        self._perform(self.core.drain(running.number, self._loop.time()))
        if running.state == "ready":
            running.state = "draining"
            self._tell(running)
            self._shut_down(running, body.drain)
        self._settle_soon()

    def _shut_down(self, running: _Running, drain: float | None) -> None:
        running.instance.receive(codec.encode(Header(Type.SHUTDOWN), Shutdown(drain)))

    def _close(self, number: int) -> None:
        """The instance has drained: its exit hooks run, then it is gone."""
        running = self._running.get(number)
        if running is not None:
            _thread(f"sllm-stop-{running.start.instance}", lambda: self._leave(running))

    def _leave(self, running: _Running) -> None:
        _quietly(running.instance.close)
        self._schedule(lambda: self._ended(running, "stopped"))

    def _ended(self, running: _Running, state: InstanceState, error: ErrorInfo | None = None) -> None:
        if self._running.pop(running.number, None) is None:
            return  # given up earlier
        running.state = state
        self._perform(self.core.gone(running.number, state, self._loop.time()))
        self._tell(running, error=error)
        if not self._running:
            self.empty.set()
        self._settle_soon()

    def _give_up(self, number: int) -> None:
        running = self._running.get(number)
        if running is not None:
            self._ended(running, "stopped")
            _thread(f"sllm-stop-{running.start.instance}", lambda: _quietly(running.instance.close))

    def _tell(self, running: _Running, timeline: Timeline | None = None, error: ErrorInfo | None = None) -> None:
        start = running.start
        self._report(
            InstanceReport(
                start.instance,
                running.number,
                start.target,
                running.state,
                start.spec.concurrency,
                "libs",
                running=self.core.running(running.number),
                timeline=timeline or Timeline(),
                error=error,
            )
        )

    # -- frames ----------------------------------------------------------------------------------------------

    def _from_gateway(self, peer: bytes, parts: Parts) -> None:
        header = unpack(parts[0])
        if header.type is Type.WANT:
            self.core.want(peer, header, codec.decode_body(header.type, parts[0]).slots)
        else:
            self._perform(self.core.from_gateway(peer, header, parts, self._loop.time()))
        self._settle_soon()

    def _from_instance(self, peer: bytes, parts: Parts) -> None:
        header = unpack(parts[0])
        if header.type is not Type.LOG:  # prints are not captured here
            self._perform(self.core.from_container(peer, header, parts, self._loop.time()))
        self._settle_soon()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                if action.to == "gateway":
                    try:
                        self._router.send(action.peer, action.parts)
                    except PeerGone:
                        pass  # the platform is closing
                else:
                    self._instance_of(action.peer).receive(action.parts)
            elif isinstance(action, Kill):
                self._give_up(action.instance)
            elif isinstance(action, Drain):
                running = self._running.get(action.instance)
                if running is not None and running.state == "ready":
                    running.state = "draining"
                    self._tell(running)

    def _instance_of(self, peer: bytes) -> LocalInstance:
        return next(item.instance for item in self._running.values() if item.start.instance.encode() == peer)

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        self._settling = False
        self._perform(self.core.settle())

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)
        self._perform(self.core.tick(self._loop.time()))
        self._settle_soon()

    def _schedule(self, what: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told


def _thread(name: str, target: Callable[[], None]) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except BaseException:  # an exit hook's failure is its developer's to see, and nobody's to handle
        traceback.print_exc()
