"""Payloads in and out of frames: small ones inside the body, large ones as buffers after it. Pure."""

from __future__ import annotations

from sllm_faas.dispatch.invocation import Invocation
from sllm_faas.wire import codec
from sllm_faas.wire.bus import Parts
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Activate, Done, Invoke
from sllm_gateway.handle import Call


def invoke(call: Call, inv: Invocation, number: int) -> Parts:
    """INVOKE of `inv` on the instance `number` of its node."""
    payload = call.payload
    inline = len(payload) <= INLINE_LIMIT
    body = Invoke(
        method=call.method,
        encoding=call.encoding,
        stream=call.stream,
        payload=payload if inline else b"",
        context=call.context,
        execution=call.timeouts.execution,
        resume=inv.resume,
        outputs=inv.wanted,
        caller=call.caller,
    )
    header = Header(Type.INVOKE, inv.id, inv.fence, number, seq=inv.wanted, credit=inv.credit)
    return codec.encode(header, body) if inline else codec.encode(header, body, payload)


def activate(inv: Invocation, number: int, state: bytes) -> Parts:
    """ACTIVATE of `inv`, which the instance `number` of its node holds."""
    return codec.encode(
        Header(Type.ACTIVATE, inv.id, inv.fence, number, seq=inv.wanted, credit=inv.credit), Activate(state)
    )


def result(body: Done, buffers: tuple[bytes, ...]) -> bytes:
    """The payload of a DONE."""
    return buffers[0] if buffers and not body.payload else body.payload


def outputs(items: list[bytes], buffers: tuple[bytes, ...]) -> list[bytes] | None:
    """The payloads of an OUTPUT: buffers fill the empty places, in order. None when they do not match."""
    if not buffers:
        return items
    rest = iter(buffers)
    filled = [item or next(rest, None) for item in items]
    if None in filled or next(rest, None) is not None:
        return None
    return [item for item in filled if item is not None]
