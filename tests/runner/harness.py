"""The invoker's end of an instance's link, for tests: a real socket and a runner in a real process.

    with start("echo", directory) as r:
        r.ready()
        call = r.invoke(1)
        assert r.result(call) == [1, 2]

Waiting is always for a frame, with a time limit that only a failing test reaches.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from sllm_invoker.runner.config import InstanceConfig, dumps

from sllm_faas.errors import ErrorInfo
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.codec import Frame, decode, encode
from sllm_faas.wire.header import NO_LIMIT, Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Invoke, LogRecord, Shutdown
from sllm_faas.wire.payload import decode_result, encode_call
from sllm_faas.wire.stream import READ, Outgoing, Splitter

APPS = Path(__file__).parent / "apps"
LIMIT = 30.0
TERMINAL = (Type.DONE, Type.FAILED, Type.CANCELLED)
FIRST = (Type.READY, Type.START_FAILED)
_MAIN = "sllm_invoker.runner.main"
_PRINT_SPECS = """
import sys
sys.path.insert(0, sys.argv[1])
import app, msgspec
sys.stdout.buffer.write(msgspec.json.encode(list(app.app.functions)))
"""


@dataclass
class Runner:
    """One instance. Frames are kept by invocation as they come."""

    socket: socket.socket
    process: subprocess.Popen[bytes]
    splitter: Splitter = field(default_factory=Splitter)
    frames: dict[bytes, list[Frame]] = field(default_factory=lambda: defaultdict(list))
    logs: list[LogRecord] = field(default_factory=list)
    control: list[Frame] = field(default_factory=list)
    calls: int = 0

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, header: Header, body: Any = None, *buffers: bytes) -> None:
        self.send_raw(encode(header, body, *buffers))

    def send_raw(self, parts: list[bytes]) -> None:
        outgoing = Outgoing()
        outgoing.add(parts)
        assert outgoing.write(self.socket)

    def new_id(self) -> bytes:
        self.calls += 1
        return self.calls.to_bytes(16, "big")

    def invoke(self, *args: Any, method: str = "", credit: int = NO_LIMIT, **kwargs: Any) -> bytes:
        return self.invoke_raw(encode_call(args, kwargs), method=method, credit=credit)

    def invoke_json(self, body: Any, *, method: str = "") -> bytes:
        return self.invoke_raw(json.dumps(body).encode(), method=method, encoding="json")

    def invoke_raw(self, payload: bytes, *, method: str = "", credit: int = NO_LIMIT, **fields: Any) -> bytes:
        call = self.new_id()
        inline = len(payload) <= INLINE_LIMIT
        body = Invoke(method, payload=payload if inline else b"", **fields)
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
        """Take frames in until `condition` holds; its value."""
        while not (value := condition()):
            if not select.select([self.socket], [], [], LIMIT)[0]:
                raise AssertionError(f"nothing came for {LIMIT} s; frames: {dict(self.frames)} {self.control}")
            data = self.socket.recv(READ)
            assert data, f"the runner closed its link; frames: {dict(self.frames)} {self.control}"
            for parts in self.splitter.feed(data):
                self._take(parts)
        return value

    def _take(self, parts: list[bytes]) -> None:
        frame = decode(parts)
        if frame.header.type is Type.LOG:
            self.logs.extend(frame.body.records)
        elif frame.header.id == bytes(16):
            self.control.append(frame)
        else:
            self.frames[frame.header.id].append(frame)

    def expect(self, *kinds: Type) -> Frame:
        """The first control frame of these kinds."""
        found: Frame = self.wait(lambda: next((frame for frame in self.control if frame.header.type in kinds), None))
        return found

    def ready(self) -> Frame:
        frame = self.expect(*FIRST)
        assert frame.header.type is Type.READY, frame.body
        return frame

    def start_error(self) -> ErrorInfo:
        frame = self.expect(*FIRST)
        assert frame.header.type is Type.START_FAILED, frame.body
        error: ErrorInfo = frame.body.error
        return error

    def end(self, call: bytes) -> Frame:
        """The terminal frame of a call, and the last; only a CANCEL that came after it is answered once more."""
        frame: Frame = self.wait(lambda: next((f for f in self.frames[call] if f.header.type in TERMINAL), None))
        later = self.frames[call][self.frames[call].index(frame) + 1 :]
        assert all(answer.header.type is Type.CANCELLED for answer in later)
        return frame

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
        found: list[Any] = self.wait(lambda: values if len(values := self.outputs(call)) >= count else None)
        return found

    def result(self, call: bytes, encoding: Any = "msgpack") -> Any:
        frame = self.end(call)
        assert frame.header.type is Type.DONE, frame.body
        return decode_result(encoding, frame.body.payload or frame.buffers[0])

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.invoke(*args, **kwargs))

    def error(self, call: bytes) -> ErrorInfo:
        frame = self.end(call)
        assert frame.header.type is Type.FAILED, frame
        error: ErrorInfo = frame.body.error
        return error

    def wait_log(self, text: str, call: bytes | None = None) -> LogRecord:
        def found() -> LogRecord | None:
            records = (r for r in self.logs if text in r.text and (call is None or r.invocation == call.hex()))
            return next(records, None)

        record: LogRecord = self.wait(found)
        return record


@functools.cache
def specs(directory: Path = APPS) -> dict[str, FunctionSpec]:
    """The functions of `app.py` in `directory`, read in a process of its own as a deployment does."""
    command = [sys.executable, "-c", _PRINT_SPECS, str(directory)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return {spec.name: spec for spec in msgspec.json.decode(done.stdout, type=list[FunctionSpec])}


@contextmanager
def started(config: InstanceConfig, directory: Path, *, module: str = _MAIN) -> Iterator[Runner]:
    """A runner process with `config`, made by running `module`; its files are in `directory`."""
    ours, theirs = socket.socketpair()
    config = replace(config, link=theirs.fileno())
    path = directory / f"{config.instance}.json"
    path.write_bytes(dumps(config))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)], pass_fds=(theirs.fileno(),), start_new_session=True
        )
    try:
        yield Runner(ours, process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ours.close()


@contextmanager
def start(
    name: str, directory: Path, *, source: Path = APPS, spec: FunctionSpec | None = None, **fields: Any
) -> Iterator[Runner]:
    """An instance of the function `name` of the app in `source`. `fields` are the config's."""
    config = InstanceConfig(
        instance="i-1",
        target=Target("test", name, 1),
        specs=(spec or specs(source)[name],),
        source_dir=str(source),
        node="n-1",
    )
    with started(replace(config, **fields), directory) as runner:
        yield runner
