"""Frames to bytes and back: header, MessagePack body, out-of-band buffers.

One ZeroMQ message is `[header + body, *buffers]`. Decoding validates: a body that is not of its type's shape
is a `WireError`, whatever the bytes. Forwarding needs none of this: a relay reads `header.unpack` and passes
the parts on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from sllm_faas.errors import WireError
from sllm_faas.wire.header import SIZE, Header, Type, unpack
from sllm_faas.wire.messages import BODIES

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_encode = _encoder.encode
_decoders: dict[Type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(body) for kind, body in BODIES.items()
}

MAX_BUFFERS = 64


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded message. `buffers` are the parts after the first."""

    header: Header
    body: Any
    buffers: tuple[bytes, ...] = ()


def encode(header: Header, body: Any = None, *buffers: bytes) -> list[bytes]:
    """The parts of one message. `body` must be of the header's type (None for types without one)."""
    head = header.pack()
    return [head if body is None else head + _encode(body), *buffers]


def decode(parts: list[bytes]) -> Frame:
    """The frame in `parts` (without routing identity). Raises WireError, and nothing else."""
    if not parts or len(parts) > 1 + MAX_BUFFERS:
        raise WireError(f"message of {len(parts)} parts; allowed: 1 to {1 + MAX_BUFFERS}")
    header = unpack(parts[0])
    return Frame(header, decode_body(header.type, parts[0]), tuple(parts[1:]))


def decode_body(kind: Type, part: bytes) -> Any:
    """The body after the header in `part`. Raises WireError when it is not of the type's shape."""
    decoder = _decoders.get(kind)
    if decoder is None:
        if len(part) != SIZE:
            raise WireError(f"{kind.name} frame has a body of {len(part) - SIZE} bytes; it takes none")
        return None
    try:
        return decoder.decode(memoryview(part)[SIZE:])
    except (msgspec.MsgspecError, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{kind.name} frame with a bad body: {error}") from None


def pack(value: Any) -> bytes:
    """A value of the shared types as bare MessagePack (bodies of Request and Reply)."""
    return _encode(value)


def unpack_as(kind: type[T], data: bytes) -> T:
    """Raises WireError when `data` is not a `kind`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a valid {getattr(kind, '__name__', kind)}: {error}") from None
