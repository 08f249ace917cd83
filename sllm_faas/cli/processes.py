"""The processes of one platform, found by what they carry: the lock, and a mark in the environment.

Every process of a platform descends from its supervisor and inherits `SLLM_PLATFORM=<state directory>`, whatever
became of its parents. So what an earlier life left behind is found without trusting any recorded pid.
The lock is a `flock`: it dies with its holder, so it cannot be stale; what is written in it is only for people.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, Conflict

MARK = "SLLM_PLATFORM"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a state directory. `since` is Unix time."""

    pid: int = 0
    url: str = ""
    since: float = 0.0


class Lock:
    """The exclusive hold on a state directory. Raises Conflict, saying who has it."""

    def __init__(self, config: Config) -> None:
        self._fd = os.open(config.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            held = _read(config.lock_path)
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.since))
            raise Conflict(
                f"a platform is already running on {config.state_dir}: pid {held.pid}, {held.url}, since {since}",
                hint="Stop it with `sllm down`, or choose another --state-dir and --port.",
            ) from None
        holder = Holder(os.getpid(), config.url, time.time())
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(asdict(holder)).encode(), 0)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two holders lock two files of one name."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def _read(path: Path) -> Holder:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return Holder()


def holder(config: Config) -> Holder | None:
    """Who runs on the state directory now; None when nobody does."""
    try:
        descriptor = os.open(config.lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(config.lock_path)
    finally:
        os.close(descriptor)
    return None


def marked(config: Config) -> list[psutil.Process]:
    """Processes of the platform on this state directory, the caller left out."""
    wanted = str(config.state_dir)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == wanted:
                found.append(process)
    return found


def end(config: Config, grace: float) -> int:
    """End every marked process: SIGTERM, `grace` seconds later SIGKILL. Returns how many there were.

    Raises Conflict when one of them does not die."""
    there = marked(config)
    _signal(there, "terminate")
    wait([process.pid for process in there], grace)
    left = marked(config)  # found afresh: a fork meanwhile is not in the earlier list
    for _ in range(3):
        if not left:
            break
        _signal(left, "kill")
        wait([process.pid for process in left], 2.0)
        left = marked(config)
    if left:
        raise Conflict(f"processes {[process.pid for process in left]} do not die", hint="Look at them with `ps`.")
    return len(there)


def wait(pids: Sequence[int], timeout: float) -> bool:
    """Whether all of them ended within `timeout` seconds. A zombie has ended, whenever its parent may notice."""
    until = time.monotonic() + timeout
    poller, waiting = select.poll(), set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            waiting.add(pidfd := os.pidfd_open(pid))
            poller.register(pidfd, select.POLLIN)
    try:
        while waiting and (left := until - time.monotonic()) >= 0:
            for pidfd, _ in poller.poll(left * 1000):
                poller.unregister(pidfd)
                waiting.discard(pidfd)
                os.close(pidfd)
        return not waiting
    finally:
        for pidfd in waiting:
            os.close(pidfd)


def _signal(processes: Sequence[psutil.Process], verb: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, verb)()


def check_port(host: str, port: int) -> None:
    """Raises Conflict when something listens there, BadSpec when the host is none of this machine's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BadSpec(f"host {host!r} cannot be resolved: {error}", param="host") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise BadSpec(f"port {port} needs privileges; allowed: 1024 and above", param="port") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"port {port} of {host} is in use{_listener(port)}",
                    hint="Choose another with --port.",
                    param="port",
                ) from None
            raise BadSpec(f"cannot listen on {host}:{port}: {error.strerror}", param="host") from None


def _listener(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
