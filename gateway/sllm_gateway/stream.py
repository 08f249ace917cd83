"""From an invocation to an HTTP answer: whole, or as a stream.

Used by functions and language models alike; what differs is the `Writer`. A stream's status line waits for its first
output or its end, so that a call that fails before is answered with its real status; but `HOLD` seconds after its
dispatch, and `QUIET` seconds after it was submitted, it begins with a ping.

Invariant: whichever way this is left, the invocation has ended or is told to.
"""

from __future__ import annotations

from collections.abc import Callable

from sllm_faas.errors import ErrorInfo, SllmError, TooLarge
from sllm_gateway.errors import info_of
from sllm_gateway.exchange import Exchange
from sllm_gateway.handle import Ended, Handle
from sllm_gateway.sse import EVENT_STREAM, Pulse, Watches, Writer, comment
from sllm_gateway.timeline import server_timing

COMMENTS = b"x-sllm-comments"
"""The request header that asks for a comment line when a stream goes on from another instance."""


class Streams:
    def __init__(self, collect_limit: int, pulse: Pulse | None = None, watches: Watches | None = None) -> None:
        self._collect_limit = collect_limit
        self._pulse = pulse or Pulse()
        self._watches = watches or Watches()

    def close(self) -> None:
        self._pulse.close()
        self._watches.close()

    async def result(self, exchange: Exchange, handle: Handle) -> Ended:
        """How it ended; given up when the client leaves."""
        exchange.handle = handle
        watch = self._watches.add(exchange.receive, handle)
        try:
            return await handle.result()
        finally:
            self._watches.remove(watch)
            handle.cancel()

    async def collect(self, exchange: Exchange, handle: Handle, take: Callable[[list[bytes]], None]) -> Ended:
        """Hand all outputs to `take`, and say how it ended. Raises what `take` raises, and TooLarge."""
        exchange.handle = handle
        watch = self._watches.add(exchange.receive, handle)
        size = 0
        try:
            async for outputs in handle.batches():
                size += sum(map(len, outputs))
                if size > self._collect_limit:
                    raise TooLarge(
                        f"The outputs together exceed {self._collect_limit} bytes.", hint="Ask for them as a stream."
                    )
                take(outputs)
            assert handle.ended is not None
            return handle.ended
        finally:
            self._watches.remove(watch)
            handle.cancel()

    async def stream(self, exchange: Exchange, handle: Handle, writer: Writer) -> None:
        """Outputs as they come, then a terminal event."""
        exchange.handle = handle
        watch = self._watches.add(exchange.receive, handle, now=True)
        try:
            await self._relay(exchange, handle, writer)
        finally:
            self._watches.remove(watch)
            self._pulse.remove(handle)
            handle.cancel()

    async def _relay(self, exchange: Exchange, handle: Handle, writer: Writer) -> None:
        ordinal = handle.inv.consumed + handle.skip
        comments = exchange.header(COMMENTS) == "1" and writer.content_type is EVENT_STREAM
        told = 0
        self._pulse.hold(handle)
        while True:
            outputs = await handle.batch()
            ended = handle.ended
            try:
                data = writer.outputs(ordinal, outputs) if outputs else b""
                if comments and told < len(handle.handovers) and handle.handover is None:
                    data = comment(handle.handovers[-1].comment) + data
                    told = len(handle.handovers)
                ordinal += len(outputs)
                if ended is not None and ended.error is None:
                    if not handle.inv.stream:  # a plain result, asked for as a stream
                        data += writer.outputs(0, [ended.payload])
                    data += writer.done(ended)
            except SllmError as error:
                handle.cancel()
                ended, data = Ended(error=info_of(error)), b""
            if ended is not None and ended.error is not None:
                await self._fail(exchange, ended.error, data, writer)
                return
            if not exchange.status:
                self._pulse.begun(handle)
                await self._start(exchange, handle, writer)
            if ended is not None:
                await exchange.finish(data)
                return
            await exchange.write(data or writer.ping)
            self._pulse.wrote(handle)

    async def _fail(self, exchange: Exchange, error: ErrorInfo, data: bytes, writer: Writer) -> None:
        if not exchange.status and not data:
            await exchange.fail(error)
            return
        exchange.code = error.code
        if not exchange.status:
            assert exchange.handle is not None
            await self._start(exchange, exchange.handle, writer)
        await exchange.finish(data + writer.error(error, exchange))

    @staticmethod
    async def _start(exchange: Exchange, handle: Handle, writer: Writer) -> None:
        await exchange.start(200, writer.content_type, [(b"server-timing", server_timing(handle))])
