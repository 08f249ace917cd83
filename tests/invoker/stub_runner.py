"""What containers run in these tests: `config.env["DO"]` says how to misbehave."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

from sllm_invoker.runner.config import InstanceConfig


def run(config: InstanceConfig, confined: Callable[[], None]) -> None:
    confined()
    what = config.env.get("DO", "")
    if what == "exit":
        os._exit(3)
    if what == "descriptors":
        print("fds", *sorted(int(name) for name in os.listdir("/proc/self/fd")), flush=True)
    if what == "random":
        print("random", random.random(), flush=True)
    if what == "gpu":
        print("sees", repr(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
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
