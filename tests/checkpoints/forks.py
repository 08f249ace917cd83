"""Processes that ingest or use a checkpoint, forked from one that has everything imported: hundreds of them in seconds.

    forks = Forks()                          runs this module as a process of its own
    process = await forks.start("token", directory=..., channel=...)
    await process.hear()                     a line of what it found; None when it is dead

What a fork does is in `_ACTS`. It shares no descriptor with its sisters, as containers do not, or a channel would seem
to be held by all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

REQUEST_BYTES = 1 << 16
"""Bytes of one request at most."""


class Fork:
    """A process, and the conversation with it, whose end is its death."""

    def __init__(self, pid: int, ours: socket.socket) -> None:
        self.pid = pid
        self._socket = ours
        self._rest = b""

    async def hear(self) -> str | None:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._rest:
            try:
                more = await asyncio.wait_for(loop.sock_recv(self._socket, 4096), 60)
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def ask(self, what: str) -> str | None:
        await asyncio.get_running_loop().sock_sendall(self._socket, f"{what}\n".encode())
        return await self.hear()

    async def kill(self) -> None:
        """Returns when it is dead, unless it has children."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        while await self.hear() is not None:
            pass
        self._socket.close()


class Forks:
    """The process that forks; without `models` it knows no torch, and is there at once."""

    def __init__(self, *, models: bool = True) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            command = [sys.executable, "-m", "tests.checkpoints.forks", str(theirs.fileno())] + ["models"] * models
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)

    async def run(self, act: str, *, channel: int = -1, **arguments: Any) -> str | None:
        """What it said first; None: it died before that. It is dead in any case."""
        fork = await self.start(act, channel=channel, **arguments)
        answer = await fork.hear()
        await fork.kill()
        return answer

    async def start(self, act: str, *, channel: int = -1, **arguments: Any) -> Fork:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno()] + ([channel] if channel >= 0 else [])
            request = json.dumps({"act": act, **{name: str(value) for name, value in arguments.items()}})
            socket.send_fds(self._control, [request.encode()], fds)
        ours.setblocking(False)
        pid = int(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._control, REQUEST_BYTES), 60))
        return Fork(pid, ours)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


# -- in the forks --------------------------------------------------------------------------------------------


class _Line:
    """The fork's end of the conversation."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._lines: IO[str] = self._socket.makefile("r")

    def say(self, text: object) -> None:
        self._socket.sendall(f"{text}\n".encode())

    def __iter__(self) -> Iterator[str]:
        return (line.strip() for line in self._lines)


def _attach(line: _Line, channel: int, request: dict[str, str]) -> None:
    """Map the weights and answer questions about them until the end."""
    import xxhash
    from sllm_invoker.checkpoints.object import open_object
    from sllm_invoker.runner.weights import from_store

    found = open_object(Path(request["directory"]))
    weights = from_store(channel, found.part_path(), found.manifest.parts[0])
    weights.wait()
    line.say("slabs" if "sllm-slab" in Path("/proc/self/maps").read_text() else "file")
    for command in line:
        match command:
            case "sum":
                line.say(xxhash.xxh3_64_hexdigest(memoryview(weights.buffer)))
            case "write":
                memoryview(weights.buffer).cast("B")[5000:5004] = b"mine"
                line.say("written")
            case "leave":  # the channel, and not the map
                with contextlib.suppress(OSError):  # it has left before
                    os.close(channel)
                line.say("left")


def _token(line: _Line, channel: int, request: dict[str, str]) -> None:
    """A start as a container does it, to the first logits."""
    import torch
    import xxhash
    from sllm_invoker.runner import attach
    from sllm_invoker.runner.arriving import arriving

    skeleton = attach.prepare(Path(request["directory"]))
    skeleton.channel = channel
    attach.attach(skeleton)
    with torch.inference_mode(), arriving(skeleton.weights):
        logits = skeleton.model(torch.tensor([[5, 9, 3, 7, 1, 8]])).logits
    line.say(f"served {xxhash.xxh3_64_hexdigest(logits.numpy().tobytes())}")


def _ingest(line: _Line, channel: int, request: dict[str, str]) -> None:
    """Ingest, forwarding through `channel` if there is one, and die at the `die`-th event: an operation on a file, just
    before it happens, or a step of progress."""
    from sllm_invoker.checkpoints.forward import Forward
    from sllm_invoker.checkpoints.ingest import ingest
    from sllm_invoker.checkpoints.store import CheckpointStore

    forward = Forward(socket.socket(fileno=channel)) if channel >= 0 else None
    last, events = int(request.get("die", 0)), 0

    def step(*_: object) -> None:
        nonlocal events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, _arguments: object) -> None:
        if event == "open" or event.startswith(("os.", "fcntl.", "shutil.")):
            step()

    sys.addaudithook(audit)
    result = ingest(
        CheckpointStore(Path(request["root"])),
        request["source"],
        request["name"],
        progress=step,
        forward=forward,
        limit=int(request.get("limit", 0)),
        tensor_parallel=int(request.get("ranks", 1)),
    )
    line.say(f"{result.digest} {events}")


_ACTS: dict[str, Callable[[_Line, int, dict[str, str]], None]] = {
    "attach": _attach, "token": _token, "ingest": _ingest,
}  # fmt: skip


def _run(data: bytes, fds: list[int]) -> None:
    from sllm_faas.errors import SllmError

    request = json.loads(data)
    line = _Line(fds[0])
    try:
        _ACTS[request["act"]](line, fds[1] if len(fds) > 1 else -1, request)
    except SllmError as error:
        line.say(f"error {error.code} {error.message}")


def _import_models() -> None:
    """Before the forks, for all of them."""
    import torch
    import transformers
    from sllm_invoker.checkpoints import ingest  # noqa: F401
    from sllm_invoker.runner import attach  # noqa: F401
    from sllm_invoker.runner.engines import rows  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def main() -> None:
    if "models" in sys.argv[2:]:
        _import_models()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 2)
        if not data:
            return
        pid = os.fork()
        if not pid:
            control.close()
            try:
                _run(data, fds)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)
        control.send(str(pid).encode())


if __name__ == "__main__":
    main()
