"""The life of an instance's process, from the fork to its exit.

    become → connect, HELLO → import → attach → enter → READY → serve until drained → exit hooks → BYE
                                └──────────┴────────┴── failed: START_FAILED with the user's traceback

`enter` is called in a freshly forked child of a zygote, `run` by `python -m sllm_invoker.runner.main CONFIG.json` in
a process of its own that inherits the link (a cold start, debugging). It owns the process and never returns:
threads that user code left do not keep it alive. Mode "check" ends after the import.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from sllm_faas.errors import WireError
from sllm_faas.spec import Span, Timeline
from sllm_faas.wire.codec import encode
from sllm_faas.wire.header import Header, Type, unpack
from sllm_faas.wire.messages import Hello, Ready, StartFailed
from sllm_invoker.runner import loading
from sllm_invoker.runner.call import Call, Parts
from sllm_invoker.runner.config import InstanceConfig, loads
from sllm_invoker.runner.executors import Executors, LoopHost
from sllm_invoker.runner.instance import Executor, Instance
from sllm_invoker.runner.link import StreamLink
from sllm_invoker.runner.output import Capture

EXIT_OK = 0
EXIT_START_FAILED = 1
EXIT_INTERNAL = 70
SWITCH_INTERVAL = 0.001
"""Seconds after which computing user code must hand the interpreter to the link's thread (Python's own: 5 ms)."""


def enter(config: bytes, descriptors: Mapping[str, int], confined: Callable[[], None]) -> NoReturn:
    """`run`, with what a zygote hands over: the config's fields that are descriptors are given beside it."""
    fields: dict[str, Any] = dict(descriptors)
    run(replace(loads(config), **fields), confined)


def run(config: InstanceConfig, confined: Callable[[], None] = lambda: None) -> NoReturn:
    """Serve (or check) and end the process: status 0 after an orderly end, 1 when the start failed. `confined` returns
    when the limits on this process are in force: no user code runs before. A language model has none, and starts."""
    status = EXIT_INTERNAL
    try:
        _become(config)
        status = _Process(config, confined).live()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        os._exit(status)


def _become(config: InstanceConfig) -> None:
    """Turn a copy of a zygote into a process of its own: randomness, threads, environment, place."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the supervisor's to handle
    sys.setswitchinterval(SWITCH_INTERVAL)
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    os.environ.update(config.env)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(random.getrandbits(63))
    if config.scratch:
        os.environ["TMPDIR"] = tempfile.tempdir = config.scratch
    if config.source_dir:
        sys.path.insert(0, config.source_dir)
        os.chdir(config.source_dir)


class _Clock:
    """The timeline of a start."""

    def __init__(self) -> None:
        self.began = time.time()
        self._zero = time.perf_counter()
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str, detail: list[str] | None = None) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._spans.append(Span(name, start - self._zero, seconds, " ".join(detail or [])))

    def timeline(self) -> Timeline:
        return Timeline(self.began, tuple(self._spans))


class _Process:
    """The parts of the process and the order in which they come and go."""

    def __init__(self, config: InstanceConfig, confined: Callable[[], None]) -> None:
        self._config = config
        self._confined = confined
        self._clock = _Clock()
        self._link = StreamLink(socket.socket(fileno=config.link), _before_ready)
        self._capture = Capture(self._link.log)
        self._drained = threading.Event()
        self._host: LoopHost | None = None

    def live(self) -> int:
        config, link = self._config, self._link
        link.start()
        life = uuid.uuid4().hex
        link.send(encode(Header(Type.HELLO), Hello("container", config.instance, life, os.getpid())))
        try:
            if config.mode == "check":
                self._check()
            else:
                self._serve()
        except BaseException as error:
            info = loading.start_error(error, config.source_dir)
            self._leave(encode(Header(Type.START_FAILED), StartFailed(info, self._clock.timeline())))
            return EXIT_START_FAILED
        self._leave(encode(Header(Type.BYE)))
        return EXIT_OK

    def _leave(self, last: Parts) -> None:
        self._capture.release()
        self._link.send(last)
        self._link.close()

    def _check(self) -> None:
        self._confined()
        with self._clock.span("import"):
            for spec in self._config.specs:
                if spec.kind != "llm":
                    loading.load(spec, self._config.source_dir)
        self._ready()

    def _ready(self) -> None:
        self._link.send(encode(Header(Type.READY), Ready(self._clock.timeline())))

    def _serve(self) -> None:
        if self._config.spec.kind == "llm":
            self._serve_llm()
        else:
            self._serve_code()

    def _serve_llm(self) -> None:
        config = self._config
        with self._clock.span("import"):
            from sllm_invoker.runner import llm, template
        if not (config.spec.gpus or template.prepared()):
            with self._clock.span("template", ["made"]):  # as a zygote would have: a layer that was missing
                template.build(config.spec, config.object_dir)
        detail: list[str] = []
        with self._clock.span("attach", detail):
            model = llm.open_model(config.spec, config.object_dir, config.weights, config.kept)
            detail.append(model.attached)
        host = self._host = LoopHost(threaded=False)
        executors = llm.executors(model, host.loop, config.spec.concurrency)
        try:
            self._receive(executors)
            with self._link.on(host.loop):
                host.loop.call_soon(llm.Contexts(model, self._link.send, host.loop).tell)
                host.run()
        finally:
            model.close()

    def _serve_code(self) -> None:
        config = self._config
        self._confined()
        with self._clock.span("import"):
            code = loading.load(config.spec, config.source_dir)
        with self._clock.span("enter"):
            user = loading.build(code, config.spec, config.target, config.source_dir, config.instance, config.node)
            executors = Executors(config.spec, user.methods, own_process=True)
            if user.uses_loop:
                # A worker that can be interrupted needs the main thread; the loop can live in any.
                self._host = LoopHost(threaded=executors.main is not None)
            for hook in user.enter:
                self._hook(hook)
        host = self._host
        executors.start(host.loop if host is not None else None)
        self._receive(executors.by_method, executors)
        if executors.main is not None:
            executors.main.run_here()
        elif host is not None and executors.threads:
            host.run()
        elif host is not None:
            with self._link.on(host.loop):
                host.run()
        else:
            self._drained.wait()
        for hook in user.exit:
            try:
                self._hook(hook)
            except Exception:
                traceback.print_exc()

    def _hook(self, hook: Any) -> None:
        result = hook()
        if self._host is not None and hasattr(result, "__await__"):
            self._host.complete(_awaited(result))

    def _receive(self, by_method: Mapping[str, Executor], executors: Executors | None = None) -> None:
        """From here on the link's messages go to an Instance; READY says so."""

        def drained() -> None:
            self._drained.set()
            if executors is not None:
                executors.close()
            if self._host is not None and not self._host.threaded:
                self._host.stop()  # one in a thread goes on: exit hooks may need it

        def ended(call: Call) -> None:
            self._capture.end(call.id.hex())

        instance = Instance(self._config.spec, by_method, self._link, on_end=ended, on_drained=drained)
        self._link.receiver = instance.receive
        self._ready()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _before_ready(parts: Parts) -> None:
    """Nothing runs yet: SHUTDOWN ends the process, and there is nothing else to be said to it."""
    with suppress(WireError):
        if unpack(parts[0]).type is Type.SHUTDOWN:
            os._exit(EXIT_OK)


if __name__ == "__main__":
    run(loads(Path(sys.argv[1]).read_bytes()))
