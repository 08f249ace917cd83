"""The chain and nothing else: `python chain.py PORT [ECHOES]`.

    wrk ── HTTP ──► Starlette on uvicorn ── ZeroMQ DEALER/ROUTER, ipc ──► relay ── socket pair ──► asyncio, ECHOES times

The hops and processes of sllm-faas with no feature on them: no tokens, names, queue, slots, deadlines, cancellation,
logs or metrics, no check of anything. POST /echo/N is answered by process N. What it loses between one echo and a
hundred is what the machine takes for a hundred processes that are woken in turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
import zmq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_HEAD = struct.Struct(">IHI")
"""Length of what follows, number of the echo, number of the call."""


class Bus:
    """A ZeroMQ socket on the running loop; what is sent in one wake-up leaves at its end."""

    def __init__(self, kind: int, on_message: Callable[[list[bytes]], None]) -> None:
        self.zmq: Any = zmq.Context.instance().socket(kind)
        self._on_message = on_message
        self._outbox: list[list[bytes]] = []

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self.zmq.getsockopt(zmq.FD), self._read)
        self._read()

    def send(self, parts: list[bytes]) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(parts)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        for parts in outbox:
            self.zmq.send_multipart(parts, zmq.NOBLOCK)
        if self.zmq.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._read()

    def _read(self) -> None:
        try:
            while True:
                self._on_message(self.zmq.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            pass


class Pipe:
    """A connected socket on the running loop, with frames of `_HEAD` and a body."""

    def __init__(self, sock: socket.socket, on_frame: Callable[[bytes], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._outbox: list[bytes] = []
        self._loop.add_reader(sock.fileno(), self._read)

    def send(self, frame: bytes) -> None:
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(frame)

    def _flush(self) -> None:
        data = b"".join(self._outbox)
        self._outbox.clear()
        if self._sock.send(data) != len(data):
            raise SystemExit("a socket pair is full: the payload is too large for this peer")

    def _read(self) -> None:
        data = self._sock.recv(1 << 18)
        if not data:
            raise SystemExit
        at = 0
        while at < len(data):
            end = at + 4 + _HEAD.unpack_from(data, at)[0]
            self._on_frame(data[at:end])
            at = end


def frame(number: int, call: int, body: bytes) -> bytes:
    return _HEAD.pack(len(body) + _HEAD.size - 4, number, call) + body


async def echo(sock: socket.socket) -> None:
    tasks = set()

    async def answer(request: bytes) -> None:
        _, number, call = _HEAD.unpack_from(request)
        value = json.loads(request[_HEAD.size :])["value"]
        pipe.send(frame(number, call, json.dumps(value).encode()))

    def called(request: bytes) -> None:
        task = asyncio.get_running_loop().create_task(answer(request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    pipe = Pipe(sock, called)
    await asyncio.Event().wait()


async def relay(endpoint: str, socks: list[socket.socket]) -> None:
    def from_gateway(parts: list[bytes]) -> None:
        gateways[:] = parts[:1]
        pipes[_HEAD.unpack_from(parts[1])[1]].send(parts[1])

    gateways = [b""]
    bus = Bus(zmq.ROUTER, from_gateway)
    pipes = [Pipe(sock, lambda answer: bus.send([gateways[0], answer])) for sock in socks]
    bus.zmq.bind(endpoint)
    bus.start()
    await asyncio.Event().wait()


def gateway(endpoint: str) -> Starlette:
    calls: dict[int, asyncio.Future[bytes]] = {}
    buses: list[Bus] = []
    count = 0

    def answered(parts: list[bytes]) -> None:
        calls.pop(_HEAD.unpack_from(parts[0])[2]).set_result(parts[0][_HEAD.size :])

    async def called(request: Request) -> Response:
        nonlocal count
        if not buses:
            buses.append(Bus(zmq.DEALER, answered))
            buses[0].zmq.connect(endpoint)
            buses[0].start()
        count += 1
        future = calls[count] = asyncio.get_running_loop().create_future()
        buses[0].send([frame(int(request.path_params["number"]), count, await request.body())])
        return Response(await future, media_type="application/json")

    return Starlette(routes=[Route("/echo/{number}", called, methods=["POST"])])


def fork(run: Callable[[], None]) -> None:
    if os.fork():
        return
    try:
        run()
    finally:
        os._exit(0)


def run_echo(sock: socket.socket, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    for each in (end for pair in pairs for end in pair if end is not sock):
        each.close()  # so that the end of the relay is seen
    asyncio.run(echo(sock))


def main() -> None:
    port, echoes = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    pairs = [socket.socketpair() for _ in range(echoes)]
    for _, theirs in pairs:
        fork(partial(run_echo, theirs, pairs))
    with tempfile.TemporaryDirectory() as directory:
        endpoint = f"ipc://{Path(directory) / 'relay'}"
        fork(partial(uvloop.run, relay(endpoint, [ours for ours, _ in pairs])))
        for pair in pairs:
            for sock in pair:
                sock.close()
        uvicorn.run(
            gateway(endpoint),
            host="127.0.0.1",
            port=port,
            loop="uvloop",
            http="httptools",
            access_log=False,
            log_level="error",
        )


if __name__ == "__main__":
    main()
