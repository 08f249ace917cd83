"""Arguments and results of user code as bytes: MessagePack with declared extension types, or JSON.

    msgpack   nil bool int float str bytes list dict   as they are (dict keys: any scalar or tuple)
      ext 1 tuple · 2 set · 3 frozenset · 4 int beyond 64 bits · 5 numpy array or scalar · 6 object · 7 enum
      ext 8.. scalars with a text form: datetime, date, time, timedelta, Decimal, UUID, complex, Path

An object is a dataclass, pydantic model or named tuple: `[module:qualname, {field: value}]`. Decoding looks the
type up with the caller's `resolve` and never imports what the wire names; where the type cannot be had, the
value is a plain dict. Never pickle: nothing on the wire can run code that the receiver has not loaded.

Invariant: whatever the bytes, decoding returns a value or raises `BadRequest`; whatever the value, encoding
returns bytes or raises the caller's error with the path (`$.a[3]`) of what could not be encoded. Nesting of
extension values is limited to `MAX_NESTING`, of plain lists and dicts to msgpack's own limit (511).
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import json
import math
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import msgpack

from sllm_faas.errors import BadRequest, BadResult, SllmError
from sllm_faas.modules import find, public_name
from sllm_faas.spec import Encoding

Resolve = Callable[[str, str], type | None]
"""(module, qualname) -> the type, or None where it cannot be had."""

MAX_NESTING = 64
MAX_OPEN_BYTES = 256 * 1024 * 1024
"""Bytes of extension values open at once while decoding: nesting may not multiply a payload without bound."""

TUPLE, SET, FROZENSET, BIGINT, ARRAY, OBJECT, ENUM = range(1, 8)

ARRAY_DTYPES = frozenset(
    ["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
)  # no objects, strings, records or dates: fixed-size numbers only


def _delta_to_text(value: datetime.timedelta) -> str:
    return f"{value.days} {value.seconds} {value.microseconds}"


def _delta_from_text(text: str) -> datetime.timedelta:
    days, seconds, microseconds = map(int, text.split(" "))
    return datetime.timedelta(days, seconds, microseconds)


# Order matters where one type is another's subclass: datetime before date.
_SCALARS: tuple[tuple[int, type, Callable[[Any], str], Callable[[str], Any]], ...] = (
    (8, datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    (9, datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    (10, datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    (11, datetime.timedelta, _delta_to_text, _delta_from_text),
    (12, decimal.Decimal, str, decimal.Decimal),
    (13, uuid.UUID, str, uuid.UUID),
    (14, complex, lambda value: f"{value.real!r} {value.imag!r}", lambda text: complex(*map(float, text.split(" ")))),
    (15, PurePath, str, Path),
)
_PLAIN: tuple[type[Any], ...] = (str, float, list, dict, bytes)
_SCALAR_BY_CODE = {code: (kind, parse) for code, kind, _, parse in _SCALARS}


# -- resolving types -----------------------------------------------------------------------------------------


def loaded_types(module: str, qualname: str) -> type | None:
    """Resolves among everything imported in this process: for a caller, who trusts its server's answers."""
    found = find(module, qualname)
    return found if isinstance(found, type) else None


def types_of(root: Path) -> Resolve:
    """Resolves among the imported modules under `root` and the types these modules name in their namespaces.

    For a container: a caller may only have types built that the function's own code mentions.
    """
    tops = (f"{root}/", f"{root.resolve()}/")
    known: dict[tuple[str, str], type] = {}

    def resolve(module: str, qualname: str) -> type | None:
        if (module, qualname) in known:
            return known[module, qualname]
        found = loaded_types(module, qualname)
        if found is None:
            return None
        for loaded in list(sys.modules.values()):
            if not str(getattr(loaded, "__file__", None) or "").startswith(tops):
                continue
            if loaded.__name__ == found.__module__ or any(value is found for value in vars(loaded).values()):
                known[module, qualname] = found
                return found
        return None

    return resolve


def type_name(kind: type) -> str:
    return f"{public_name(kind.__module__)}:{kind.__qualname__}"


# -- encoding ------------------------------------------------------------------------------------------------


def _is_pydantic(kind: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def fields_of(value: object) -> dict[str, Any] | None:
    """Field values of a dataclass, pydantic model or named tuple instance; None for anything else."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
    if _is_pydantic(kind):
        extra = getattr(value, "__pydantic_extra__", None) or {}
        return {**{name: getattr(value, name) for name in kind.model_fields}, **extra}  # type: ignore[attr-defined]
    if _is_namedtuple(kind):
        return dict(value._asdict())  # type: ignore[attr-defined]
    return None


def _numpy_value(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is None or isinstance(value, str | bytes):  # numpy.str_ and numpy.bytes_ are sent as str and bytes
        return False
    return isinstance(value, numpy.ndarray | numpy.generic)


def _array_parts(value: Any) -> list[Any]:
    """[dtype, shape or nil for a scalar, C-order little-endian bytes]."""
    import numpy as np

    array = np.asarray(value)
    little = array.dtype.newbyteorder("<")
    if little.str not in ARRAY_DTYPES:
        raise TypeError(f"numpy dtype {array.dtype} cannot be sent; allowed: booleans, integers, floats and complex")
    shape = None if isinstance(value, np.generic) else list(array.shape)
    return [little.str, shape, array.astype(little, order="C", copy=False).tobytes()]


class _Encoder:
    """One encoding. `default` sees only what msgpack cannot pack by itself."""

    def __init__(self) -> None:
        self.depth = 0

    def pack(self, value: object) -> bytes:
        return bytes(msgpack.packb(value, default=self.default, strict_types=True))

    def _ext(self, code: int, value: object) -> msgpack.ExtType:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ValueError(f"nested more than {MAX_NESTING} levels deep, or contains itself")
        data = self.pack(value)
        self.depth -= 1
        return msgpack.ExtType(code, data)

    def default(self, value: Any) -> object:
        kind = type(value)
        if isinstance(value, enum.Enum):
            return self._ext(ENUM, [type_name(kind), value.name or "", value.value])
        if _numpy_value(value):
            return self._ext(ARRAY, _array_parts(value))
        if isinstance(value, int):
            small = -(2**63) <= value < 2**64
            return int(value) if small else msgpack.ExtType(BIGINT, _int_bytes(value))
        if (fields := fields_of(value)) is not None:
            return self._ext(OBJECT, [type_name(kind), fields])
        if isinstance(value, tuple):
            return self._ext(TUPLE, list(value))
        if isinstance(value, frozenset):
            return self._ext(FROZENSET, list(value))
        if isinstance(value, set):
            return self._ext(SET, list(value))
        for code, scalar, to_text, _ in _SCALARS:
            if isinstance(value, scalar):
                return msgpack.ExtType(code, to_text(value).encode())
        for plain in _PLAIN:
            if isinstance(value, plain):  # a subclass: sent as what it extends
                return plain(value)
        raise TypeError(f"a value of type {type_name(kind)} cannot be sent")


def _int_bytes(value: int) -> bytes:
    return int(value).to_bytes((value.bit_length() + 8) // 8, "big", signed=True)


_HINT = (
    "Allowed: None, bool, int, float, str, bytes, list, tuple, dict, set, dataclasses, pydantic models, enums, "
    "dates, Decimal, UUID and numpy arrays."
)
_ENCODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError, AttributeError)


def encode(value: object, error: type[SllmError] = BadResult, what: str = "the result") -> bytes:
    """`value` as MessagePack. Raises `error` naming the type and the path of what cannot be encoded."""
    try:
        return _Encoder().pack(value)
    except _ENCODE_ERRORS as cause:
        raise _cannot(value, cause, _Encoder, error, what) from None


def encode_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The payload of a call. Raises BadRequest naming what cannot be sent (`$.args[0]`, `$.kwargs.x`)."""
    return encode({"args": list(args), "kwargs": kwargs}, BadRequest, "the arguments")


def encode_result(encoding: Encoding, value: object) -> bytes:
    """A result or an output in the invocation's encoding. Raises BadResult."""
    return to_json(value) if encoding == "json" else encode(value)


def _children(value: object) -> Iterator[tuple[str, object]]:
    fields = fields_of(value)
    if fields is not None:
        yield from ((f".{name}", child) for name, child in fields.items())
    elif isinstance(value, dict):
        for key, child in value.items():
            yield (f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"), child
            yield f".keys()[{key!r}]", key
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", child) for index, child in enumerate(value))


def _culprit(value: object, path: str, encoder: Callable[[], Any], depth: int) -> tuple[str, BaseException] | None:
    """Path and reason of the deepest part that cannot be encoded. Slow; only ever runs on failure."""
    if depth > MAX_NESTING:
        return None
    try:
        encoder().pack(value)
    except _ENCODE_ERRORS as cause:
        for step, child in _children(value):
            found = _culprit(child, path + step, encoder, depth + 1)
            if found is not None:
                return found
        return path, cause
    return None


def _cannot(
    value: object, cause: BaseException, encoder: Callable[[], Any], error: type[SllmError], what: str
) -> SllmError:
    deep = isinstance(cause, RecursionError) or "recursion" in str(cause).lower() or "nested more" in str(cause)
    if deep or "ircular" in str(cause):
        return error(f"{what} cannot be encoded: it is nested too deeply, or contains itself.", hint=_HINT)
    path, reason = _culprit(value, "$", encoder, 0) or ("$", cause)
    return error(f"{what} cannot be encoded: {path}: {_first_line(reason)}.", hint=_HINT)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# -- decoding ------------------------------------------------------------------------------------------------


class _Decoder:
    """One decoding. Raises ValueError (or what a type's constructor raises) for its caller to map."""

    def __init__(self, resolve: Resolve) -> None:
        self.resolve = resolve
        self.depth = 0
        self.open = 0

    def unpack(self, data: bytes) -> Any:
        return msgpack.unpackb(data, ext_hook=self.ext, strict_map_key=False, raw=False)

    def ext(self, code: int, data: bytes) -> Any:
        if code == BIGINT:
            return int.from_bytes(data, "big", signed=True)
        if code in _SCALAR_BY_CODE:
            return _SCALAR_BY_CODE[code][1](data.decode())
        self.depth += 1
        self.open += len(data)
        if self.depth > MAX_NESTING or self.open > MAX_OPEN_BYTES:
            raise ValueError(f"nested more than {MAX_NESTING} levels or {MAX_OPEN_BYTES} bytes deep")
        inner = self.unpack(data)
        self.depth -= 1
        self.open -= len(data)
        if not isinstance(inner, list):
            raise ValueError(f"extension {code} does not hold a list")
        if code == TUPLE:
            return tuple(inner)
        if code == SET:
            return set(inner)
        if code == FROZENSET:
            return frozenset(inner)
        if code == ARRAY:
            return _array(*inner)
        if code == OBJECT:
            return self._object(*inner)
        if code == ENUM:
            return self._enum(*inner)
        raise ValueError(f"unknown extension type {code}")

    def _type(self, name: str) -> type | None:
        module, _, qualname = name.partition(":")
        return self.resolve(module, qualname)

    def _object(self, name: str, fields: dict[str, Any]) -> Any:
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            raise ValueError(f"the fields of {name} are not a map")
        kind = self._type(name)
        if kind is None:
            return fields
        try:
            return _build(kind, fields)
        except Exception as error:  # the type's own validation; any exception is possible
            raise ValueError(f"{name} cannot be built: {type(error).__name__}: {error}") from error

    def _enum(self, name: str, member: str, value: Any) -> Any:
        kind = self._type(name)
        if kind is None or not issubclass(kind, enum.Enum):
            return value
        return kind[member] if member in kind.__members__ else kind(value)  # a value: combined flags


def _build(kind: type, fields: dict[str, Any]) -> Any:
    if dataclasses.is_dataclass(kind):
        computed = {field.name for field in dataclasses.fields(kind) if not field.init}
        value = kind(**{name: item for name, item in fields.items() if name not in computed})
        for name in computed & fields.keys():
            object.__setattr__(value, name, fields[name])
        return value
    if _is_pydantic(kind):
        known = kind.model_fields  # type: ignore[attr-defined]
        aliases = {name: field.validation_alias for name, field in known.items()}
        keys = {name: alias if isinstance(alias := aliases.get(name), str) else name for name in fields}
        return kind.model_validate({keys[name]: item for name, item in fields.items()})  # type: ignore[attr-defined]
    if _is_namedtuple(kind):
        return kind(**fields)
    return fields


def _array(dtype: str, shape: list[int] | None, data: bytes) -> Any:
    if dtype not in ARRAY_DTYPES:
        raise ValueError(f"array dtype {dtype!r} is not allowed; allowed: {', '.join(sorted(ARRAY_DTYPES))}")
    dims = [] if shape is None else shape
    if len(dims) > 32 or not all(isinstance(size, int) and size >= 0 for size in dims) or not isinstance(data, bytes):
        raise ValueError(f"array shape {dims!r} is not one")
    try:
        import numpy as np
    except ImportError:
        raise ValueError("the value holds a numpy array and numpy is not installed here") from None
    if math.prod(dims) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"array of shape {dims} and dtype {dtype} has {len(data)} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(dims).copy()  # a copy: writable, as arrays usually are
    return array[()] if shape is None else array


def decode(data: bytes, resolve: Resolve = loaded_types) -> Any:
    """The value in `data`. Raises BadRequest, and nothing else, when it is not a payload."""
    try:
        return _Decoder(resolve).unpack(data)
    except (
        ValueError, TypeError, KeyError, OverflowError, RecursionError, ArithmeticError, msgpack.UnpackException
    ) as error:  # fmt: skip
        raise BadRequest(f"not a valid MessagePack payload: {_first_line(error)}.") from error


def decode_call(
    encoding: Encoding, payload: bytes, resolve: Resolve = loaded_types
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call. JSON: an object is kwargs, an array args, nothing none. Raises BadRequest."""
    if not payload:
        return (), {}
    if encoding == "json":
        value = from_json(payload)
        if isinstance(value, dict):
            return (), value
        if isinstance(value, list):
            return tuple(value), {}
        raise BadRequest(
            f"the body is a JSON {_json_kind(value)}; allowed: an object (keyword arguments) or an array (positional)."
        )
    value = decode(payload, resolve)
    if (
        not isinstance(value, dict)
        or value.keys() != {"args", "kwargs"}
        or not isinstance(value["args"], list)
        or not isinstance(value["kwargs"], dict)
        or not all(isinstance(key, str) for key in value["kwargs"])
    ):
        raise BadRequest('the body is not a call; allowed: a map {"args": [...], "kwargs": {...}}.')
    return tuple(value["args"]), value["kwargs"]


def decode_result(encoding: Encoding, payload: bytes, resolve: Resolve = loaded_types) -> Any:
    """A result or an output as the caller gets it. Raises BadResult when it cannot be had here: its type's own
    validation refuses it, numpy is not installed, or the bytes are damaged."""
    try:
        return from_json(payload) if encoding == "json" else decode(payload, resolve)
    except BadRequest as error:
        raise BadResult(f"the result cannot be decoded: {error.message}") from error


# -- JSON ----------------------------------------------------------------------------------------------------


class _JsonEncoder:
    def __init__(self) -> None:
        self._encode = json.JSONEncoder(
            default=self.default, allow_nan=False, ensure_ascii=False, separators=(",", ":")
        ).encode

    def pack(self, value: object) -> bytes:
        return self._encode(value).encode()

    def default(self, value: Any) -> object:
        if isinstance(value, enum.Enum):
            return value.value
        if _numpy_value(value):
            return value.tolist()
        if isinstance(value, bytes | bytearray | memoryview):
            return base64.b64encode(value).decode()
        if _is_pydantic(type(value)):
            return value.model_dump(mode="json")  # its own JSON form, custom serializers included
        if (fields := fields_of(value)) is not None:
            return fields
        if isinstance(value, set | frozenset):
            return list(value)
        for _, scalar, to_text, _ in _SCALARS:
            if isinstance(value, scalar) and scalar is not complex:
                return value.total_seconds() if isinstance(value, datetime.timedelta) else to_text(value)
        raise TypeError(f"a value of type {type_name(type(value))} has no JSON form")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Made once: both cost more to make than to use.
_json = _JsonEncoder()
_scan_json = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def to_json(value: object, what: str = "the result") -> bytes:
    """UTF-8 JSON: dataclasses and models as objects, arrays as lists, bytes as base64 text, durations as
    seconds. Raises BadResult (a NaN or an infinity is refused: JSON has none)."""
    try:
        return _json.pack(value)
    except _ENCODE_ERRORS as cause:
        raise _cannot(value, cause, _JsonEncoder, BadResult, what) from None


def from_json(data: bytes) -> Any:
    """Raises BadRequest when `data` is not JSON as RFC 8259 has it (UTF-8, no NaN)."""
    try:
        text = data.decode().strip(" \t\n\r")
        value, end = _scan_json(text)
        if end != len(text):
            raise ValueError(f"more follows after character {end}")
        return value
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not valid JSON: {error}.") from None


def _json_kind(value: object) -> str:
    return {str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")
