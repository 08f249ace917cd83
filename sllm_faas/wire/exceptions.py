"""Exceptions of user code as values, and back as their own type.

What travels: the type's name, its arguments and attributes as a payload (where they can be encoded), the first
line of its message and the traceback as text. What comes back: the type itself if it is a builtin or already
imported here, else `RemoteError`. Never pickle; nothing is imported because the wire names it.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from sllm_faas.errors import ErrorInfo, FunctionError, RemoteError, SllmError, from_info
from sllm_faas.wire.payload import Resolve, decode, encode, loaded_types, type_name

MAX_TRACEBACK = 32 * 1024
MAX_ARGS = 256 * 1024
MAX_MESSAGE = 2000

_OURS = ("sllm", "sllm_faas", "sllm_invoker", "sllm_gateway")


def exception_to_info(error: BaseException, root: str = "") -> ErrorInfo:
    """An exception that user code raised. `root`, the source directory, is taken off the file names.

    Its code is always `function_error`, also for an error of our own tree: a `QueueFull` of a nested call must
    not read as if this invocation had been refused.
    """
    return ErrorInfo(
        code=FunctionError.code,
        message=_headline(error),
        status=FunctionError.status,
        type=type_name(type(error)),
        args=_pack(error),
        traceback=format_traceback(error, root),
    )


def info_to_exception(info: ErrorInfo, resolve: Resolve = loaded_types) -> Exception:
    """What to raise for `info`: the user's own type where it can be had, with the remote traceback as a note
    and as `.remote_traceback`; otherwise the error of our tree that the code names."""
    own = _own_type(info, resolve) if info.type and info.code == FunctionError.code else None
    error: Exception = own if own is not None else from_info(info)
    if info.traceback:
        error.add_note("Remote traceback:\n" + info.traceback.rstrip())
        error.remote_traceback = info.traceback  # type: ignore[attr-defined]
    return error


def format_traceback(error: BaseException, root: str = "") -> str:
    """The traceback with chained causes, platform frames before the user's first one left out."""
    text = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    chain: list[tuple[traceback.TracebackException, BaseException]] = [(text, error)]
    while chain:
        summary, real = chain.pop()
        if id(real) in seen:
            continue
        seen.add(id(real))
        summary.stack = traceback.StackSummary.from_list(list(summary.stack)[_skip(real) :])
        if summary.__cause__ is not None and real.__cause__ is not None:
            chain.append((summary.__cause__, real.__cause__))
        if summary.__context__ is not None and real.__context__ is not None:
            chain.append((summary.__context__, real.__context__))
    whole = "".join(text.format())
    if root:
        whole = whole.replace(f'File "{root.rstrip("/")}/', 'File "')
    return whole if len(whole) <= MAX_TRACEBACK else "…\n" + whole[-MAX_TRACEBACK:]


def _skip(error: BaseException) -> int:
    """How many leading frames are the platform's; 0 when all of them are, so that nothing is ever hidden. A syntax
    error names the user's file itself, in none of its frames."""
    tb, count = error.__traceback__, 0
    while tb is not None:
        name = str(tb.tb_frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in _OURS and not _is_stdlib(tb.tb_frame.f_code.co_filename):
            return count
        count += 1
        tb = tb.tb_next
    return count if isinstance(error, SyntaxError) else 0


_STDLIB = str(Path(traceback.__file__).parent)


def _is_stdlib(file: str) -> bool:
    return file.startswith((_STDLIB + "/", "<frozen")) and "site-packages" not in file


def _headline(error: BaseException) -> str:
    try:
        text = error.message if isinstance(error, SllmError) else str(error)
    except Exception:  # a user's __str__ may raise
        text = ""
    first = text.strip().splitlines()[0] if text.strip() else ""
    name = type(error).__qualname__
    return (f"{name}: {first}" if first else name)[:MAX_MESSAGE]


def _pack(error: BaseException) -> bytes:
    """Arguments and attributes; each attribute that cannot be encoded is left out, and all if arguments cannot."""
    try:
        args = encode(list(error.args))
    except SllmError:
        return b""
    state: dict[str, object] = {}
    for name, value in vars(error).items():
        if name.startswith("__") or name == "remote_traceback":
            continue
        try:
            if len(encode(value)) + len(args) <= MAX_ARGS:
                state[name] = value
        except SllmError:
            continue
    packed = encode([list(error.args), state])
    return packed if len(packed) <= MAX_ARGS else b""


def _own_type(info: ErrorInfo, resolve: Resolve) -> Exception | None:
    module, _, qualname = info.type.partition(":")
    kind = resolve(module, qualname)
    if kind is None and module == "builtins":
        kind = loaded_types(module, qualname)
    if kind is None or not issubclass(kind, Exception) or issubclass(kind, RemoteError):
        return None  # SystemExit and its like must not end the caller
    if not info.args:
        return None
    try:
        args, state = decode(info.args, resolve)
        try:
            error: Exception = kind(*args)
        except Exception:  # an __init__ of another signature than its args: build it as copy and pickle would not
            error = kind.__new__(kind, *args)
            error.args = tuple(args)
        for name, value in state.items():
            setattr(error, name, value)
    except Exception:  # whatever a foreign type does, the caller must get some error
        return None
    return error
