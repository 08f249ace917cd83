"""`sllm up`: starts the platform's processes, restarts what dies, stops all of it.

    supervisor ── controller · node-0 … · gateway-0 …     each in a session of its own, told to end with us
        │ stdout+stderr of each, line by line
        └─► logs/platform.jsonl (bounded) and, in the foreground, the terminal

Not a manager of containers: those are the invoker's. When to restart is `restarts`; who is who, `processes`.
Order: the controller is ready before the others start; at a stop gateways end first, because their streams still
need the invokers, and the controller ends last. Invariant: after `run` nothing of the tree is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sllm_faas import logging
from sllm_faas.cli import processes
from sllm_faas.cli.restarts import Restarts
from sllm_faas.config import MAX_NODE_NAME, Config, write_private
from sllm_faas.errors import SllmError, StartFailed, to_info

READY_TIMEOUT = 60.0
STOP_MARGIN = 10.0
"""Seconds beyond `shutdown_grace` before a process that does not leave is killed."""
CONTROLLER, GATEWAY, INVOKER = "sllm_faas.controller", "sllm_gateway", "sllm_invoker"
_TAIL = 20
_MAX_LINE = 256 * 1024
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)

log = logging.get("supervisor")
Echo = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the platform: `python -m module … --name name`."""

    name: str
    module: str


def plan(config: Config) -> tuple[tuple[Part, ...], ...]:
    """The parts in groups: the first is ready before the others start; each ends after those that follow it."""
    if config.join:
        host = re.sub(r"[^a-z0-9-]", "-", os.uname().nodename.split(".")[0].lower()).strip("-")
        return ((Part(config.node_name or host[:MAX_NODE_NAME] or "node", INVOKER),),)
    return (
        (Part("controller", CONTROLLER),),
        tuple(Part(f"node-{number}", INVOKER) for number in range(config.invokers)),
        tuple(Part(f"gateway-{number}", GATEWAY) for number in range(config.gateways)),
    )


def command(config: Config, part: Part) -> list[str]:
    """How a part is started."""
    return [sys.executable, "-P", "-m", part.module, "--config", str(config.config_path), "--name", part.name]


@dataclass(slots=True, eq=False)
class Child:
    part: Part
    process: subprocess.Popen[bytes]
    pidfd: int
    ready: asyncio.Future[bool]
    """False: it died, or its time was up, before its ready line."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    partial: bytes = b""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))


class Supervisor:
    """One platform on one state directory. `echo` is given every log line, parsed."""

    def __init__(
        self,
        config: Config,
        *,
        echo: Echo | None = None,
        command: Callable[[Config, Part], list[str]] = command,
        ready_timeout: float = READY_TIMEOUT,
    ) -> None:
        self.config = config
        self.life = uuid.uuid4().hex
        self._echo = echo
        self._command = command
        self._ready_timeout = ready_timeout
        self._children: dict[str, Child] = {}
        self._restarts = Restarts()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._up = False

    # -- life ------------------------------------------------------------------------------------------------

    async def run(self, on_up: Callable[[], None]) -> None:
        """Start everything, call `on_up`, and stay until a signal; then stop everything.

        Raises Conflict when the state directory or the port is taken, StartFailed when a process does not start."""
        self.config.prepare()
        lock = processes.Lock(self.config)
        try:
            self._kept = logging.RotatingFile(self.config.logs_dir / "platform.jsonl")
            logging.setup(self.config.log_level, stream=_Lines(self._keep))
            self._recover()
            if not self.config.join:
                processes.check_port(self.config.host, self.config.port)
            self._write_files()
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of a killed invoker are ours to reap
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGCHLD, self._reap)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal)
            try:
                if await self._boot():
                    on_up()
                    await self._stop.wait()
            finally:
                await self._shut_down()
        finally:
            shutil.rmtree(self.config.run_dir, ignore_errors=True)  # made anew at the next start; it may lie in /tmp
            lock.release()

    def stop(self) -> None:
        """Orderly; called again: at once."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _on_signal(self) -> None:
        log.info("stopping", at_once=self._stop.is_set())
        self.stop()

    def _recover(self) -> None:
        left = processes.end(self.config, 1.0)
        if left:
            log.warning("ended processes of an earlier life", count=left)
        if self.config.metrics_dir.exists():
            shutil.rmtree(self.config.metrics_dir)
            self.config.metrics_dir.mkdir(mode=0o700)

    def _write_files(self) -> None:
        path = self.config.admin_token_path
        if not path.exists():
            write_private(path, f"sllm_{secrets.token_urlsafe(32)}\n".encode())
        path.chmod(0o600)
        self.config.write(self.config.config_path)
        self._write_record()

    def _write_record(self) -> None:
        record = {
            "pid": os.getpid(),
            "life": self.life,
            "port": self.config.port,
            "url": self.config.url,
            "children": {child.part.name: child.process.pid for child in self._children.values()},
        }
        write_private(self.config.supervisor_path, json.dumps(record).encode())

    # -- starting --------------------------------------------------------------------------------------------

    async def _boot(self) -> bool:
        """Everything ready; False when a signal came first."""
        first, *rest = plan(self.config)
        for group in (first, [part for others in rest for part in others]):
            started = [self._start(part) for part in group]
            await self._ready(started)
            if self._stop.is_set():
                return False
        self._up = True
        for child in list(self._children.values()):
            if child.gone.is_set():  # it was ready, and died while others were not
                self._restart(child.part)
        log.info("up", url=self.config.url)
        return True

    async def _ready(self, started: list[Child]) -> None:
        """All of them ready, or a signal to stop. Raises StartFailed for the first that died, or when time is up."""
        until = time.monotonic() + self._ready_timeout
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        waiting = list(started)
        try:
            while waiting and not stopped.done():
                pending = {stopped, *(child.ready for child in waiting)}
                left = until - time.monotonic()
                await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                dead = [child for child in waiting if child.ready.done() and not child.ready.result()]
                waiting = [child for child in waiting if not child.ready.done()]
                late = waiting if time.monotonic() >= until else []
                if dead or late:
                    raise _failed([*dead, *late][0], self._ready_timeout)
        finally:
            stopped.cancel()

    def _start(self, part: Part) -> Child:
        loop = asyncio.get_running_loop()
        parent = os.getpid()
        process = subprocess.Popen(
            self._command(self.config, part),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.config.state_dir,
            env=_environment(self.config),
            start_new_session=True,
            preexec_fn=lambda: _end_with(parent),
        )
        child = Child(part, process, os.pidfd_open(process.pid), loop.create_future())
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        loop.add_reader(process.stdout.fileno(), self._read, child)
        loop.add_reader(child.pidfd, self._died, child)
        self._children[part.name] = child
        try:
            self._write_record()
        except OSError as error:
            log.warning("record not written", error=str(error))
        log.info("started", name=part.name, child=process.pid)
        return child

    def _read(self, child: Child) -> bool:
        """Take in what the child wrote; False at its end."""
        assert child.process.stdout is not None
        descriptor = child.process.stdout.fileno()
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)
            return False
        *lines, child.partial = (child.partial + data).split(b"\n")
        if len(child.partial) > _MAX_LINE:
            lines, child.partial = [*lines, child.partial], b""
        for line in lines:
            self._line(child, line)
        return True

    def _line(self, child: Child, line: bytes) -> None:
        if not line:
            return
        if line.startswith(b'{"time"'):
            if not child.ready.done() and json.loads(line).get("event") == "ready":
                child.ready.set_result(True)
                self._restarts.ready(child.part.name, time.monotonic())
            self._keep(line + b"\n")
            return
        text = line.decode(errors="replace")
        child.tail.append(text)
        logging.get(child.part.module.rpartition("_")[2].rpartition(".")[2]).warning(
            "output", name=child.part.name, text=text
        )

    def _keep(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk costs lines, not the platform
            self._kept.write(line)
        if self._echo:
            self._echo(json.loads(line))

    # -- deaths ----------------------------------------------------------------------------------------------

    def _died(self, child: Child) -> None:
        assert child.process.stdout is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.pidfd)
        os.close(child.pidfd)
        while self._read(child):
            pass
        loop.remove_reader(child.process.stdout.fileno())
        child.process.stdout.close()
        code = child.process.wait()
        if not child.ready.done():
            child.ready.set_result(False)
        child.gone.set()
        self._reap()
        if self._stop.is_set() or not self._up:
            log.info("ended", name=child.part.name, code=code)
            return
        if code == 0 and child.ready.result():  # it was asked to leave
            log.info("left", name=child.part.name)
        else:
            log.error("died", name=child.part.name, code=code, text=_death(code))
        self._restart(child.part)

    def _restart(self, part: Part) -> None:
        delay = self._restarts.ended(part.name, time.monotonic())
        log.info("restarting", name=part.name, delay=delay)
        asyncio.get_running_loop().call_later(delay, self._start_again, part)

    def _start_again(self, part: Part) -> None:
        if self._stop.is_set():
            return
        try:
            self._start(part)
        except OSError:
            log.exception("cannot start", name=part.name)
            self._restart(part)

    def _reap(self) -> None:
        """Reap adopted orphans; our own children are left to `_died`."""
        own = {child.process.pid for child in self._children.values() if not child.gone.is_set()}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in own:
                return
            os.waitpid(found.si_pid, 0)

    # -- stopping --------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        self._stop.set()
        for group in reversed(plan(self.config)):
            there = [self._children[part.name] for part in group if part.name in self._children]
            await self._end([child for child in there if not child.gone.is_set()])
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lambda: None)  # nothing may interrupt the rest
        left = await asyncio.to_thread(processes.end, self.config, 1.0)
        if left:
            log.warning("ended what was left", count=left)
        self._reap()
        log.info("down")
        self._kept.close()

    async def _end(self, children: list[Child]) -> None:
        for child in children:
            child.process.terminate()
        gone = asyncio.ensure_future(_all_gone(children))
        hurry = asyncio.ensure_future(self._hurry.wait())
        limit = self.config.shutdown_grace + STOP_MARGIN
        await asyncio.wait({gone, hurry}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not gone.done():
            for child in children:
                if not child.gone.is_set():
                    log.warning("killing", name=child.part.name)
                    child.process.kill()
        await gone


class _Lines:
    """What logging writes to: whole lines, handed on as bytes."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        self._keep_line = keep
        self._text = ""

    def write(self, text: str) -> int:
        self._text += text
        if self._text.endswith("\n"):
            line, self._text = self._text, ""
            self._keep_line(line.encode())
        return len(text)

    def flush(self) -> None:
        """Nothing waits here."""


async def _all_gone(children: Iterable[Child]) -> None:
    for child in children:
        await child.gone.wait()


def _environment(config: Config) -> dict[str, str]:
    env = {**os.environ, processes.MARK: str(config.state_dir), "PYTHONUNBUFFERED": "1"}
    if env.get("PYTHONPATH"):  # the children's working directory is another one
        env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, env["PYTHONPATH"].split(os.pathsep)))
    return env


def _end_with(parent: int) -> None:
    """In the child: SIGTERM when the supervisor dies, at once if it already has."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _death(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _failed(child: Child, limit: float) -> StartFailed:
    code = child.process.poll()
    how = f"was not ready within {limit:g} s" if code is None else f"died while starting ({_death(code)})"
    return StartFailed(f"{child.part.name} {how}", traceback="\n".join(child.tail))


# -- as a daemon ---------------------------------------------------------------------------------------------


def main(command: Callable[[Config, Part], list[str]] = command) -> int:
    """`python -m sllm_faas.cli.supervisor`: configuration as JSON on stdin, one line on stdout saying how it went.

    It detaches at once: what was started ends, and its child, in a session of its own, is the supervisor."""
    config = Config.from_json(sys.stdin.read(), "stdin")
    if os.fork():
        os._exit(0)
    os.setsid()
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)

    def say(line: dict[str, Any]) -> None:
        try:
            os.write(out, json.dumps(line).encode() + b"\n")
        except BrokenPipeError:
            pass  # whoever asked has gone; the log has it
        os.close(out)

    async def serve() -> None:
        await Supervisor(config, command=command).run(lambda: say({"event": "up", "pid": os.getpid()}))

    try:
        asyncio.run(serve())
    except (SllmError, OSError) as error:
        info = to_info(error)
        say(
            {
                "event": "failed",
                "code": info.code,
                "message": info.message,
                "hint": info.hint,
                "traceback": info.traceback,
            }
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
