"""The gateway's own note on an invocation, carried in its INVOKE and handed back to whoever adopts it.

What is needed to go on rendering the same stream for the same client, and nothing of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from sllm_faas.errors import WireError
from sllm_faas.wire import codec


@dataclass(frozen=True, slots=True)
class Note:
    """`kind` function: outputs are passed on as they are; chat, completion: rendered as OpenAI's chunks."""

    kind: Literal["function", "chat", "completion"] = "function"
    id: str = ""
    model: str = ""
    created: int = 0
    fingerprint: str = ""
    usage: bool = False
    """A last chunk with the usage is wanted."""
    logprobs: bool = False


_encode = msgspec.msgpack.Encoder().encode
FUNCTION = _encode(Note())


def pack(note: Note) -> bytes:
    return _encode(note)


def unpack(data: bytes) -> Note:
    """A note that cannot be read (of another release) is that of a plain function."""
    try:
        return codec.unpack_as(Note, data)
    except WireError:
        return Note()
