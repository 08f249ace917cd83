"""How a process of the platform is told to stop: the first SIGTERM or SIGINT asks, a second one insists."""

from __future__ import annotations

import asyncio
import os
import signal


def stop_requested() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once, with status 1."""
    requested = asyncio.Event()

    def stop() -> None:
        if requested.is_set():
            os._exit(1)
        requested.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return requested
