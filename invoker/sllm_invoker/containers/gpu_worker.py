"""A pre-warmed worker: a process with a CUDA context that waits to become an instance.

    python -m sllm_invoker.containers.gpu_worker CONTROL LIFELINE WARM      sees one GPU, by CUDA_VISIBLE_DEVICES

It speaks as a zygote does (`zygote`), with one difference: to "instance" it answers "forked" with its own number and
*is* the instance from then on, because a process with a CUDA context cannot be forked. WARM (module:function) makes the
context and what else a first forward pass needs. Invariant: no user code runs before the request.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from sllm_invoker.containers import zygote

WARM = "sllm_invoker.runner.cuda:warm"


def main() -> NoReturn:
    control, lifeline = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    control.set_inheritable(False)
    os.set_inheritable(lifeline, False)
    zygote.arm_lifeline(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    try:
        for name in zygote.BASE_MODULES:
            importlib.import_module(name)
        module, _, function = sys.argv[3].partition(":")
        getattr(importlib.import_module(module), function)()
    except BaseException as error:
        zygote.send(control, {"op": "error", "info": zygote.describe(error)})
        os._exit(1)
    zygote.send(control, {"op": "ready", "seconds": time.perf_counter() - began, "threads": zygote.threads()})
    received = zygote.receive(control)
    if received is None:
        os._exit(0)
    status = 70
    try:
        _become(control, lifeline, *received)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _become(control: socket.socket, lifeline: int, message: dict[str, Any], fds: list[int]) -> NoReturn:
    pidfd = os.pidfd_open(os.getpid())
    zygote.send(control, {"op": "forked", "request": message["request"], "pid": os.getpid()}, [pidfd])
    os.close(pidfd)
    control.close()
    zygote.become_instance(message, fds, lifeline)


if __name__ == "__main__":
    main()
