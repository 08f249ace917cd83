"""The ingest's side of forwarding: what it writes lands in slabs in the same pass, and is the store process's then.

    ingest ── Lend ──► store                            is there room that is nobody's?
           ◄── Lent + [slabs]                           faulted long ago, or beside what the ingest does first
    memory(size): the writer copies into them, and sums and writes from there
           ── Written ──► store                         the object is in place, and nothing here maps them
           ◄── Whole | NotLoaded

All of it is a convenience: whatever fails ends the forwarding, never the ingest, and the checkpoint is read from disk
when it is needed. Slabs are lent for as long as the channel is open, so an ingest that is killed leaves nothing.
Invariant: nothing is handed over before the object is in place, and nothing writes to it afterwards.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from sllm_faas.errors import WireError
from sllm_invoker.checkpoints import channel
from sllm_invoker.checkpoints.channel import AnyMessage
from sllm_invoker.checkpoints.mapping import Mapping, map_shared

PATIENCE = 10.0
"""Seconds that the store has for an answer; it never reads or sums on the thread that answers."""


class Forward:
    """`end` is a channel to the store process. `close` ends it: what was not handed over goes back."""

    def __init__(self, end: socket.socket) -> None:
        end.settimeout(PATIENCE)
        end.set_inheritable(False)
        self._end = end
        self._slabs: list[Mapping] = []
        self._size = 0

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, size: int) -> None:
        """About `size` bytes will be written: have slabs for them, as far as there are any."""
        self._let_go()
        answer, fds = self._ask(channel.Lend(size))
        try:
            if isinstance(answer, channel.Lent):
                self._slabs.extend(map_shared(fd, answer.slab_bytes) for fd in fds)
                self._size = size
        except OSError:
            self._let_go()
        finally:
            channel.close_all(fds)

    def memory(self, size: int) -> list[memoryview]:
        """Slabs in order that hold `size` bytes; none where it is not forwarded."""
        if self._slabs and size != self._size:
            self.expect(size)
        return [memoryview(slab.buffer).cast("B") for slab in self._slabs]

    def hand_over(self, digest: str, directory: Path, size: int) -> bool:
        """`memory(size)` is full and nothing writes to it or looks at it any more: the store's, if it takes it."""
        if not self._slabs:
            return False
        self._let_go()
        return isinstance(self._ask(channel.Written(digest, str(directory), size))[0], channel.Whole)

    def close(self) -> None:
        self._let_go()
        self._end.close()

    def _ask(self, message: AnyMessage) -> tuple[AnyMessage | None, list[int]]:
        """The store's answer with its descriptors, the caller's; None when there is none, and then never again."""
        fds: list[int] = []
        with contextlib.suppress(OSError, WireError):
            channel.send(self._end, message)
            if (received := channel.receive(self._end)) is not None:
                answer, fds, _ = received
                if isinstance(answer, channel.Lent):
                    channel.rest_of(self._end, fds, answer.count)
                return answer, fds
        self._end.close()
        channel.close_all(fds)
        return None, []

    def _let_go(self) -> None:
        for slab in self._slabs:
            slab.unmap()
        self._slabs, self._size = [], 0
