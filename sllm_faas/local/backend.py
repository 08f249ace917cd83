"""Where SDK calls go on a local platform: to its dispatcher, as an HTTP gateway would hand them over.

Runs on the SDK's loop thread, like every backend; payloads pass as the bytes they would be on the wire.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from dataclasses import replace

from sllm._backend import Call
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.handle import Call as Submitted
from sllm_gateway.handle import Ended, Handle

from sllm_faas.dispatch.resume import way_of
from sllm_faas.dispatch.routes import Resolved
from sllm_faas.errors import BadRequest, TooLarge
from sllm_faas.spec import MAX_PAYLOAD, Timeouts
from sllm_faas.wire.exceptions import info_to_exception


class LocalBackend:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def call(self, call: Call) -> bytes:
        handle, resolved = self._submit(call)
        if resolved.method.stream:
            handle.cancel()
            raise BadRequest(f"{call.label} is a generator.", hint="Call it with .stream(…).")
        try:
            ended = await handle.result()
        finally:
            handle.cancel()  # of no effect once it has ended
        _raise(ended)
        return ended.payload

    async def stream(self, call: Call) -> AsyncGenerator[bytes]:
        handle, resolved = self._submit(call)
        try:
            async for outputs in handle.batches():
                for output in outputs:
                    yield output
        finally:
            handle.cancel()
        assert handle.ended is not None
        _raise(handle.ended)
        if not resolved.method.stream:
            yield handle.ended.payload

    async def close(self) -> None:
        """The platform closes what there is to close."""

    def _submit(self, call: Call) -> tuple[Handle, Resolved]:
        if len(call.payload) > MAX_PAYLOAD:
            raise TooLarge(f"the arguments have {len(call.payload)} bytes; allowed: {MAX_PAYLOAD}")
        name = f"{call.function}.{call.method}" if call.method else call.function
        parameters = json.loads(call.parameters) if call.parameters else None
        resolved = self._dispatcher.routes.resolve(call.app, name, parameters)
        spec = resolved.route.spec
        submitted = Submitted(
            os.urandom(16),
            resolved.target,
            resolved.method.name,
            call.payload,
            stream=resolved.method.stream,
            timeouts=_lowered(spec.timeouts, call),
            retries=spec.retries,
            max_queue=spec.max_queue,
            weight=resolved.route.weight,
            caller=call.caller,
            way=way_of(spec.kind, resolved.method.name, resolved.method),
        )
        return self._dispatcher.submit(submitted), resolved


def _lowered(timeouts: Timeouts, call: Call) -> Timeouts:
    for phase, limit in call.timeouts:
        own = getattr(timeouts, phase)
        timeouts = replace(timeouts, **{phase: limit if own is None else min(own, limit)})
    return timeouts


def _raise(ended: Ended) -> None:
    if ended.error is not None:
        raise info_to_exception(ended.error)
