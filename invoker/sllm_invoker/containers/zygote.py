"""A zygote: a single-threaded process that forks instances, and zygotes one layer warmer, on request.

    python -m sllm_invoker.containers.zygote CONTROL LIFELINE        (the base; the others are forked)

Spoken over a SOCK_SEQPACKET pair, JSON with descriptors beside it (SCM_RIGHTS); payloads that may be large or
secret travel as memfds:

    invoker ─► {"op": "layer", "request", "key", "libs"} + [control end, template memfd?]
            ─► {"op": "instance", "request", "entry", "cgroups", "fds"} + [config memfd, stdout, stderr, *those of fds]
            ◄─ {"op": "forked", "request", "pid"} + [pidfd]   |  {"op": "failed", "request", "error"}
            ◄─ {"op": "exited", "pid", "status"}
            ◄─ {"op": "standby", "pid"}     one waits; 0: it has ended
            ─► {"op": "standby", "pid"}     it may become an instance
    a new layer, on its own control end ─► {"op": "ready", "seconds", "threads"} | {"op": "error", "info"}

Off the critical path it forks one process ahead (`Standby`), which does what can be done before it is known whose
instance it is to be, and waits: the next instance is that one. Whoever asks before the invoker has agreed to that gets
a new fork.

Invariants: nothing here starts a thread or runs user code before the last fork; whoever holds the lifeline's read
end dies with its invoker — the kernel sends SIGKILL to the process group at its end of file, so even code that
never yields the interpreter cannot outlive it. End of file on the control socket ends the zygote alone.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_MESSAGE = 64 * 1024
MAX_FDS = 8
ENTRY = "sllm_invoker.runner.main:enter"
BASE_MODULES = ("asyncio", "sllm", "sllm_invoker.runner.main", "sllm_invoker.runner.template")
OOM_SCORE = 500
"""Above the invoker's 0: an instance is killed before the process that owns it."""

REST = 0.3
"""Seconds without a request after which a process is forked ahead: until then the cores are for those that start."""
STANDBY, INSTANCE = "sllm-standby", "sllm-instance"
"""Names of processes."""
OOM_STANDBY = 1000
"""The first to be killed: nobody has it yet."""

_F_SETSIG = 10
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphaned descendants of this process become its children instead of init's."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def arm_lifeline(lifeline: int) -> int:
    """Have the kernel kill this process group when the pipe behind `lifeline` loses its writer.

    Needs an open file description of its own, because owner and signal belong to that; returns it."""
    own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([own], [], [], 0)[0]:  # it ended before it was armed
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return own


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One message and its descriptors; None at the end."""
    data, ancillary, _, _ = control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return (json.loads(data), list(fds)) if data else None


def send(control: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Raises OSError; BlockingIOError on a non-blocking socket that is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    control.sendmsg([json.dumps(message).encode()], rights)


def read_memfd(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@dataclass(slots=True)
class Standby:
    """A process forked ahead, and the end of a socket pair on which it waits for an "instance" message; at its end of
    file it ends."""

    pid: int
    control: socket.socket
    ready: bool = False


class Zygote:
    def __init__(self, control: socket.socket, lifeline: int, armed: int) -> None:
        self._control = control
        self._armed = armed
        self._lifeline = lifeline
        """The inherited end, never armed itself: armed ones are opened anew from it in every process."""
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = select.poll()
        self._standby: Standby | None = None
        self._ahead = True
        """Whether to fork ahead: not after one that ended by itself, until an instance has been asked for."""

    def serve(self) -> NoReturn:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._wake_r, select.POLLIN)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                lacking = self._ahead and self._standby is None
                ready = {fd for fd, _ in self._poller.poll(1000 * REST if lacking else None)}
                if not ready:
                    self._fork_ahead()
                if self._wake_r in ready:
                    os.read(self._wake_r, 4096)
                    self._reap()
                if self._standby is not None and self._standby.control.fileno() in ready:
                    self._hear(self._standby)
                if self._control.fileno() in ready:
                    message = receive(self._control)
                    if message is None:
                        break
                    self._handle(*message)
        os._exit(0)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                send(self._control, {"op": "exited", "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["op"] == "standby":
            if self._standby is not None and self._standby.pid == message["pid"]:
                self._standby.ready = True
            return
        try:
            pid = self._hand_over(message, fds) or self._fork(lambda: self._become(message, fds))
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            send(self._control, {"op": "failed", "request": message["request"], "error": str(error)})
        else:
            send(self._control, {"op": "forked", "request": message["request"], "pid": pid}, [pidfd])
            os.close(pidfd)
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(self, life: Callable[[], NoReturn]) -> int:
        """A child that lives that life, a session of its own. Raises OSError."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            self._child(life)
        return pid

    def _child(self, life: Callable[[], NoReturn]) -> NoReturn:
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            self._control.close()
            for fd in (self._wake_r, self._wake_w, self._armed):
                os.close(fd)
            if self._standby is not None:
                self._standby.control.close()
            life()
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def _become(self, message: dict[str, Any], fds: list[int]) -> NoReturn:
        if message["op"] == "layer":
            self._layer(message, fds)
        become_instance(message, fds, self._lifeline)

    # -- one ahead -------------------------------------------------------------------------------------------

    def _fork_ahead(self) -> None:
        from sllm_invoker.runner import template

        template.warm_up()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = self._fork(lambda: self._stand_by(ours, theirs))
        except OSError:  # no room for it: it can be done without
            self._ahead = False
            ours.close()
        else:
            self._standby = Standby(pid, ours)
            self._poller.register(ours, select.POLLIN)
        theirs.close()

    def _stand_by(self, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        from sllm_invoker.runner import template

        ours.close()
        armed = arm_lifeline(self._lifeline)
        _call(STANDBY)
        _accept_the_killer(OOM_STANDBY)
        template.rehearse()
        send(theirs, {"op": "ready"})
        received = receive(theirs)
        if received is None:
            os._exit(0)
        theirs.close()
        os.close(armed)  # the instance arms its own
        become_instance(*received, self._lifeline)

    def _hear(self, standby: Standby) -> None:
        """It waits, or it has ended."""
        said = None
        with contextlib.suppress(OSError):
            said = receive(standby.control)
        if said is None:
            self._ahead = False
            self._let_go(standby)
        send(self._control, {"op": "standby", "pid": standby.pid if said is not None else 0})

    def _hand_over(self, message: dict[str, Any], fds: list[int]) -> int:
        """Its number, if one is ready to be the instance; 0: none is."""
        if message["op"] != "instance":
            return 0
        self._ahead = True
        standby = self._standby
        if standby is None or not standby.ready:
            return 0
        try:
            send(standby.control, message, fds)
        except OSError:  # it has just ended
            return 0
        finally:
            self._let_go(standby)
        return standby.pid

    def _let_go(self, standby: Standby) -> None:
        self._poller.unregister(standby.control)
        standby.control.close()
        self._standby = None

    def _layer(self, message: dict[str, Any], fds: list[int]) -> NoReturn:
        control = socket.socket(fileno=fds[0])
        armed = arm_lifeline(self._lifeline)
        began = time.perf_counter()
        try:
            from sllm_invoker.runner import template

            template.import_libs(message["libs"])
            if len(fds) > 1:
                import msgspec

                from sllm_faas.spec import FunctionSpec

                wanted = json.loads(read_memfd(fds[1]))
                template.prepare(msgspec.convert(wanted["spec"], FunctionSpec), wanted["object_dir"])
                os.close(fds[1])
        except BaseException as error:
            send(control, {"op": "error", "info": describe(error)})
            os._exit(1)
        send(control, {"op": "ready", "seconds": time.perf_counter() - began, "threads": threads()})
        Zygote(control, self._lifeline, armed).serve()


def become_instance(message: dict[str, Any], fds: list[int], lifeline: int) -> NoReturn:
    """What a process does that is to be the instance an "instance" message describes; `lifeline` is closed."""
    # Moving into a group waits for the kernel (15 ms): beside everything that runs no user code.
    entering = threading.Thread(target=enter, args=(message["cgroups"], os.getpid()), name="cgroup")
    entering.start()
    become_subreaper()
    _call(INSTANCE)
    _accept_the_killer(OOM_SCORE)
    _use_all_cores()
    config_fd, out, err, *rest = fds
    config = read_memfd(config_fd)
    os.dup2(out, 1)
    os.dup2(err, 2)
    arm_lifeline(lifeline)
    for fd in (config_fd, out, err, lifeline):
        os.close(fd)
    inherited = dict(zip(message["fds"], rest, strict=True))
    module, _, name = message["entry"].partition(":")
    run = getattr(importlib.import_module(module), name)
    run(config, inherited, entering.join)
    os._exit(0)


def _use_all_cores() -> None:
    """A zygote is told to use one thread so that it can be forked; this process may use them all."""
    cores = len(os.sched_getaffinity(0))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(cores)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(cores)


def _call(name: str) -> None:
    """As `ps` shows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _accept_the_killer(score: int) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def enter(groups: list[str], pid: int) -> None:
    """Move the process into those groups."""
    for group in groups:
        with contextlib.suppress(OSError):  # no limit then; said once by whoever made the group
            Path(group, "cgroup.procs").write_text(str(pid))


def describe(error: BaseException) -> dict[str, Any]:
    """An error of preparing a layer as ErrorInfo's fields, with its traceback."""
    from sllm_faas.errors import SllmError, to_info

    text = "".join(traceback.format_exception(error))
    if isinstance(error, SllmError):
        return {**dataclasses.asdict(to_info(error)), "args": "", "traceback": error.traceback or text}
    return {"code": "start_failed", "message": f"{type(error).__name__}: {error}", "status": 503, "traceback": text}


def main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    lifeline = int(sys.argv[2])
    os.set_inheritable(control.fileno(), False)
    os.set_inheritable(lifeline, False)
    armed = arm_lifeline(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    for name in BASE_MODULES:
        importlib.import_module(name)
    send(control, {"op": "ready", "seconds": time.perf_counter() - began, "threads": threads()})
    Zygote(control, lifeline, armed).serve()


if __name__ == "__main__":
    main()
