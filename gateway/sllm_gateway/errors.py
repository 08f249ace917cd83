"""Errors as HTTP: one shape, the status of the exception tree, `type` values that OpenAI's clients know.

    {"error": {"message", "type", "param", "code", "hint", "request_id"(, "traceback")}}

Foreign exceptions become an internal error here and nowhere else: their text goes to the log, not to the client. The
traceback of user code is for the app's owner only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from sllm_faas.errors import ErrorInfo, FunctionError, SllmError, by_code, to_info

JSON = b"application/json"
MSGPACK = b"application/msgpack"

Headers = list[tuple[bytes, bytes]]

_TYPES = {401: "authentication_error", 403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}
_TRACEBACK_TAIL = 8_000
_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Rendered:
    status: int
    content_type: bytes
    body: bytes
    headers: Headers


def info_of(error: BaseException) -> ErrorInfo:
    """The error as a value, fit to leave the platform."""
    if isinstance(error, SllmError):
        return to_info(error)
    return ErrorInfo("internal", "Something went wrong in the gateway.", hint="The log has it under the request id.")


def status_of(info: ErrorInfo) -> int:
    """An error that came over the wire may claim anything; only 4xx and 5xx are errors."""
    return info.status if 400 <= info.status <= 599 else 500


def type_of(info: ErrorInfo) -> str:
    """OpenAI's `error.type`."""
    status = status_of(info)
    if status in _TYPES:
        return _TYPES[status]
    if status < 500:
        return "invalid_request_error"
    return "function_error" if issubclass(by_code(info.code), FunctionError) else "server_error"


def shape(info: ErrorInfo, request_id: str, *, owner: bool) -> dict[str, Any]:
    """The error object of a JSON answer or event."""
    error: dict[str, Any] = {
        "message": info.message,
        "type": type_of(info),
        "param": info.param or None,
        "code": info.code,
        "hint": info.hint or None,
        "request_id": request_id,
    }
    if owner and info.traceback:
        error["traceback"] = info.traceback[-_TRACEBACK_TAIL:]
    return {"error": error}


def for_owner(info: ErrorInfo, *, owner: bool) -> ErrorInfo:
    """Without its traceback, unless the reader owns the code."""
    if owner or not info.traceback:
        return info
    return ErrorInfo(
        info.code, info.message, info.hint, info.param, info.status, info.retry_after, info.type, info.args
    )


def render(info: ErrorInfo, request_id: str, *, owner: bool, msgpack: bool = False) -> Rendered:
    """A whole answer. In the SDK's encoding the body is the ErrorInfo itself, so the SDK can raise its own type."""
    headers: Headers = []
    if info.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(info.retry_after))).encode()))
    if info.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="sllm"'))
    if info.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if msgpack:
        return Rendered(status_of(info), MSGPACK, _encode_msgpack(for_owner(info, owner=owner)), headers)
    return Rendered(status_of(info), JSON, _encode_json(shape(info, request_id, owner=owner)), headers)
