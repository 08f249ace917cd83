"""Stopping synchronous user code: `Cancelled` raised in the thread that runs it.

Two ways, one protocol:

    SignalInterrupter      the main thread, by a signal: ends a sleep, a wait for a lock or a socket too
    ThreadInterrupter      any thread, by CPython's asynchronous exception: at the next bytecode only

    enter(job)      in the code's thread: from here on it may be interrupted
    leave()         in the code's thread: not any more
    interrupt(job)  on any other thread

A job is a call or a batch. Invariants: `Cancelled` is raised at most once per job, so clean-up code is not
interrupted in its turn; only between `enter` and `leave` of *that* job (or inside `leave`, which is to be
repeated then). Code that catches it goes on and keeps its slot: the invoker kills the process after the grace
period.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType
from typing import Protocol

from sllm._runtime import Cancelled

SIGNAL = signal.SIGUSR1


class Job(Protocol):
    interrupted: bool

    @property
    def cancelled(self) -> bool: ...


class Interrupter(Protocol):
    def enter(self, job: Job) -> None:
        """Raises Cancelled at once when the job is cancelled already and was not told so."""

    def leave(self) -> None: ...

    def interrupt(self, job: Job) -> None: ...


class SignalInterrupter:
    """For the main thread of a process that is the instance's own. `install` it there first."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._main = 0

    def install(self) -> None:
        self._main = threading.get_ident()
        signal.signal(SIGNAL, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})

    def enter(self, job: Job) -> None:
        self._job = job
        if job.cancelled and not job.interrupted:
            self._raise(job)

    def leave(self) -> None:
        self._job = None

    def interrupt(self, job: Job) -> None:
        # Whether it is still that job is checked where it cannot change: in the handler, on the main thread.
        if self._job is job:
            # To this thread and no other: it is its system call that must come back.
            signal.pthread_kill(self._main, SIGNAL)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        job = self._job
        if job is not None and job.cancelled and not job.interrupted:
            self._raise(job)

    def _raise(self, job: Job) -> None:
        job.interrupted = True
        self._job = None
        raise Cancelled


class ThreadInterrupter:
    """For one worker thread; made in any thread, `enter` says which."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._thread = 0
        self._lock = threading.Lock()

    def enter(self, job: Job) -> None:
        with self._lock:
            self._job, self._thread = job, threading.get_ident()
            if job.cancelled and not job.interrupted:
                job.interrupted = True
                self._job = None
                raise Cancelled

    def leave(self) -> None:
        with self._lock:
            job, self._job = self._job, None
            if job is not None and job.interrupted:
                _raise_in(self._thread, None)  # sent while the code was ending: take it back

    def interrupt(self, job: Job) -> None:
        with self._lock:
            if self._job is job and job.cancelled and not job.interrupted:
                job.interrupted = True
                _raise_in(self._thread, Cancelled)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )
