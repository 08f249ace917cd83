"""The invoker's end of an instance's link, for tests: a real ROUTER on ipc and a runner in a real process.

    with runner(tmp_path, source, "app:echo") as r:
        r.ready()
        call = r.invoke({"args": [1], "kwargs": {}})
        assert r.end(call).type is Type.DONE

Waiting is always for a frame, with a time limit that only a failing test reaches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import zmq
from sllm._app import App
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.codec import Frame, decode, encode
from sllm_faas.wire.header import NO_LIMIT, Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Invoke, LogRecord, Shutdown
from sllm_faas.wire.payload import decode_result, encode_call
from sllm_invoker.runner.config import InstanceConfig, dumps

LIMIT = 20.0
TERMINAL = (Type.DONE, Type.FAILED, Type.CANCELLED)
SPECS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import app, msgspec
print(msgspec.json.encode(list(app.app.functions)).decode())
"""


@dataclass
class Runner:
    socket: zmq.SyncSocket
    process: subprocess.Popen[bytes]
    identity: bytes = b"i-1"
    frames: dict[bytes, list[Frame]] = field(default_factory=lambda: defaultdict(list))
    logs: list[LogRecord] = field(default_factory=list)
    control: list[Frame] = field(default_factory=list)
    calls: int = 0

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, header: Header, body: Any = None, *buffers: bytes) -> None:
        self.socket.send_multipart([self.identity, *encode(header, body, *buffers)])

    def invoke(
        self, *args: Any, method: str = "", credit: int = NO_LIMIT, json_body: Any = None, **kwargs: Any
    ) -> bytes:
        payload = json.dumps(json_body).encode() if json_body is not None else encode_call(args, kwargs)
        return self.invoke_raw(payload, method=method, credit=credit, encoding="json" if json_body is not None else "")

    def invoke_raw(self, payload: bytes, *, method: str = "", credit: int = NO_LIMIT, encoding: str = "") -> bytes:
        self.calls += 1
        call = self.calls.to_bytes(16, "big")
        inline = len(payload) <= INLINE_LIMIT
        body = Invoke(method, "json" if encoding == "json" else "msgpack", payload=payload if inline else b"")
        self.send(Header(Type.INVOKE, call, fence=1, credit=credit), body, *(() if inline else (payload,)))
        return call

    def cancel(self, call: bytes) -> None:
        self.send(Header(Type.CANCEL, call, fence=1))

    def credit(self, call: bytes, credit: int) -> None:
        self.send(Header(Type.CREDIT, call, fence=1, credit=credit))

    def shutdown(self, drain: float | None = None) -> None:
        self.send(Header(Type.SHUTDOWN), Shutdown(drain))

    # -- receiving ---------------------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], Any]) -> Any:
        while not (value := condition()):
            if not self.socket.poll(int(LIMIT * 1000)):
                raise AssertionError(f"nothing came for {LIMIT} s; frames: {dict(self.frames)} {self.control}")
            self.take(self.socket.recv_multipart()[1:])
        return value

    def take(self, parts: list[bytes]) -> None:
        frame = decode(parts)
        if frame.header.type is Type.LOG:
            self.logs.extend(frame.body.records)
        elif frame.header.id == bytes(16):
            self.control.append(frame)
        else:
            self.frames[frame.header.id].append(frame)

    def expect(self, kind: Type) -> Frame:
        return self.wait(lambda: next((frame for frame in self.control if frame.header.type is kind), None))

    def ready(self) -> Frame:
        first = (Type.READY, Type.START_FAILED)
        frame = self.wait(lambda: next((frame for frame in self.control if frame.header.type in first), None))
        assert frame.header.type is Type.READY, frame.body
        return frame

    def end(self, call: bytes) -> Frame:
        """The terminal frame of a call."""
        return self.wait(lambda: next((f for f in self.frames[call] if f.header.type in TERMINAL), None))

    def outputs(self, call: bytes) -> list[Any]:
        """Outputs so far, checked to be gap-free."""
        values: list[Any] = []
        for frame in self.frames[call]:
            if frame.header.type is Type.OUTPUT:
                assert frame.header.seq == len(values)
                assert frame.header.items == len(frame.body)
                buffers = iter(frame.buffers)
                values += [decode_result("msgpack", item or next(buffers)) for item in frame.body]
        return values

    def wait_outputs(self, call: bytes, count: int) -> list[Any]:
        return self.wait(lambda: values if len(values := self.outputs(call)) >= count else None)

    def result(self, call: bytes, encoding: str = "msgpack") -> Any:
        frame = self.end(call)
        assert frame.header.type is Type.DONE, frame.body
        payload = frame.body.payload or frame.buffers[0]
        return decode_result("json" if encoding == "json" else "msgpack", payload)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.invoke(*args, **kwargs))

    def error(self, call: bytes) -> Any:
        frame = self.end(call)
        assert frame.header.type is Type.FAILED, frame
        return frame.body.error

    def wait_log(self, text: str) -> LogRecord:
        return self.wait(lambda: next((record for record in self.logs if text in record.text), None))

    def exit_status(self) -> int:
        return self.process.wait(LIMIT)


def registered(directory: Path) -> list[FunctionSpec]:
    """The specs of `app.py` in `directory`, read in a process of its own as a deployment does."""
    done = subprocess.run([sys.executable, "-c", SPECS, str(directory)], capture_output=True, check=True, timeout=60)
    return msgspec.json.decode(done.stdout, type=list[FunctionSpec])


def write_app(directory: Path, source: str) -> None:
    head = "import asyncio, sys, time\nimport sllm\napp = sllm.App('test')\n"
    (directory / "app.py").write_text(head + textwrap.dedent(source))


def one_function(name: str, **fields: Any) -> FunctionSpec:
    """A spec written by hand, for apps that do not import."""
    from sllm_faas.spec import MethodSpec

    return FunctionSpec(name, "function", "app", name, methods=(MethodSpec(name),), **fields)


@contextmanager
def started(config: InstanceConfig, directory: Path, lifeline: int = -1) -> Iterator[Runner]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.router_mandatory = True
    socket.bind(config.endpoint)
    path = directory / "instance.json"
    path.write_bytes(dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "sllm_invoker.runner.main", str(path)],
        env=dict(os.environ),
        pass_fds=() if lifeline < 0 else (lifeline,),
    )
    try:
        yield Runner(socket, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        socket.close(linger=0)
        context.term()


@contextmanager
def runner(
    directory: Path,
    source: str,
    name: str,
    *,
    parameters: str = "",
    spec: FunctionSpec | None = None,
    lifeline: int = -1,
    **config: Any,
) -> Iterator[Runner]:
    """An instance of the function `name` of an app with this source (after `import sllm` and `app = …`)."""
    write_app(directory, source)
    if spec is None:
        spec = next(spec for spec in registered(directory) if spec.name == name)
    value = InstanceConfig(
        instance="i-1",
        endpoint=f"ipc://{directory}/c.sock",
        target=Target("test", name, 1, parameters),
        specs=(spec,),
        source_dir=str(directory),
        lifeline=lifeline,
    )
    with started(replace(value, **config), directory, lifeline) as started_runner:
        yield started_runner


__all__ = ["App", "Runner", "one_function", "registered", "runner", "started", "write_app"]
