"""What containers run in these tests: `config.env["DO"]` says how to misbehave."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from sllm_invoker.runner.config import loads
from sllm_invoker.runner.kept import Kept


def run(given: bytes, descriptors: Mapping[str, int], confined: Callable[[], None]) -> None:
    confined()
    config = replace(loads(given), **descriptors)
    what = config.env.get("DO", "")
    if what == "exit":
        os._exit(3)
    if what == "descriptors":
        print("fds", *sorted(int(name) for name in os.listdir("/proc/self/fd")), flush=True)
    if what == "random":
        print("random", random.random(), flush=True)
    if what == "gpu":
        print("sees", repr(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
    if what.startswith("keep"):
        _keep(config.kept, int(what.removeprefix("keep")))
    if what == "family":
        _grandchildren()
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", config.instance, flush=True)
    os.write(2, b"below python\n")
    while True:
        time.sleep(3600)


def warm() -> None:
    """What a worker of a GPU does before it waits, where there is no GPU."""


def broken() -> None:
    raise RuntimeError("no driver")


def _keep(channel: int, count: int) -> None:
    """The weights of three groups, of which so many get whole: memory of a device, played by memfds that say who made
    them. Says what was there."""
    kept, ranges = Kept(channel, 0), [(number * 10, number * 10 + 10) for number in range(3)]
    found, _ = kept.want(ranges)
    print("found", [os.pread(found[each], 100, 0).decode() if each in found else "" for each in ranges], flush=True)
    for number, each in enumerate(ranges[:count]):
        if each not in found:
            memory = os.memfd_create("device")
            os.write(memory, f"{os.getpid()}:{number}".encode())
            kept.whole(each, memory)


def _grandchildren() -> None:
    """A child, one that left the session, and one that double-forked away."""
    for escape in (False, True):
        if os.fork() == 0:
            if escape:
                os.setsid()
                if os.fork():
                    os._exit(0)
                os.setsid()
            while True:
                time.sleep(3600)
    os.wait()
