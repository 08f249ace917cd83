"""Structured logs: one JSON object per line, the same fields everywhere.

    log = logging.get("gateway").bind(app="counting")
    log.info("dispatched", invocation=id, node=node)

Fields, always in this order, the empty ones left out: time, level, component, event, app, function, version,
instance, invocation, node; then whatever else the event carries. `event` is a few constant words: variable parts are
fields, so lines can be counted. Processes write to stdout; whoever started them (the supervisor) keeps it, in files
bounded in size.

Invariant: secrets, prompts and outputs never enter a line. Callers do not pass them; as a second line of defence
fields with such names and texts that look like our tokens are hidden here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

CONTEXT = ("app", "function", "version", "instance", "invocation", "node")
FIELDS = ("time", "level", "component", "event", *CONTEXT)
MAX_TEXT = 16_384
"""Characters of one field; the middle of longer ones is cut out."""

_HIDDEN_NAMES = frozenset(
    {"token", "authorization", "password", "secret", "secrets", "api_key", "prompt", "messages", "payload", "output"}
)
_HIDDEN_TEXT = re.compile(r"\bsllm(?:join)?_[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{20,}|(?i:bearer\s+)\S+")


class Log:
    """A component's logger with some fields bound to it. Immutable and cheap to bind."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: dict[str, Any]) -> None:
        self._logger = logger
        self._bound = bound

    def bind(self, **fields: Any) -> Log:
        return Log(self._logger, {**self._bound, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._emit(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._emit(logging.ERROR, event, {**fields, "traceback": traceback.format_exc()})

    def ready(self, **fields: Any) -> None:
        """The line a supervisor waits for: this process serves. Written whatever the level."""
        self._logger.handle(self._record(logging.INFO, "ready", {"pid": os.getpid(), **fields}))

    def enabled(self, level: int) -> bool:
        return self._logger.isEnabledFor(level)

    def _emit(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.handle(self._record(level, event, fields))

    def _record(self, level: int, event: str, fields: dict[str, Any]) -> logging.LogRecord:
        record = logging.LogRecord(self._logger.name, level, "", 0, event, None, None)
        record.sllm = {**self._bound, **fields} if self._bound else fields
        return record


def get(component: str) -> Log:
    """The logger of `component`: controller, gateway, invoker, runner, store, supervisor, cli …"""
    return Log(logging.getLogger(f"sllm.{component}"), {})


def bind(component: str, **fields: Any) -> Log:
    return get(component).bind(**fields)


# -- set-up --------------------------------------------------------------------------------------------------


class Writer(Protocol):
    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...


def setup(level: str = "info", *, file: Path | None = None, stream: Writer | None = None, human: bool = False) -> None:
    """Send every log line of this process to `file`, or to `stream` (default stdout), and nowhere else.

    `level` bounds our own lines; libraries are heard from `warning` on. Calling it again replaces what it did."""
    handler: logging.Handler = FileHandler(file) if file else logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_Formatter(human))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("sllm").setLevel(level.upper())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a reader of our stdout that went away must not take us with it


class RotatingFile:
    """A file that only grows to `max_bytes`, then becomes `.1`, the earlier `.1` becomes `.2`, up to `keep`.

    Whole lines go in, so whole lines come out. Raises OSError like a file does."""

    def __init__(self, path: Path, max_bytes: int = 16 * 1024 * 1024, keep: int = 4) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.keep = keep
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        if self._size and self._size + len(data) > self.max_bytes:
            self._rotate()
        self._size += os.write(self._fd, data)

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(self.keep - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        if self.keep:
            self.path.replace(self._numbered(1))
        else:
            self.path.unlink()
        self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileHandler(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = RotatingFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record).encode() + b"\n")
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        self._file.close()
        super().close()


# -- lines ---------------------------------------------------------------------------------------------------


class _Formatter(logging.Formatter):
    def __init__(self, human: bool) -> None:
        super().__init__()
        self._human = human
        self._second = -1
        self._prefix = ""

    def format(self, record: logging.LogRecord) -> str:
        line = self._fields(record)
        return human_line(line) if self._human else json.dumps(line, ensure_ascii=False, default=str)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        line: dict[str, Any] = {"time": self._time(record.created), "level": record.levelname.lower()}
        fields = getattr(record, "sllm", None)
        if fields is None:  # a library's
            line |= {"component": record.name, "event": "library", "text": _clean("text", record.getMessage())}
            if record.exc_info:
                line["traceback"] = _clean("traceback", self.formatException(record.exc_info))
            return line
        line["component"] = record.name.removeprefix("sllm.")
        line["event"] = record.msg
        for name in CONTEXT:
            if fields.get(name) not in (None, ""):
                line[name] = _clean(name, fields[name])
        for name, value in fields.items():
            if name not in line and name not in CONTEXT:
                line[name] = _clean(name, value)
        return line

    def _time(self, created: float) -> str:
        second = int(created)
        if second != self._second:
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._prefix}.{int((created - second) * 1e6):06d}Z"


def _clean(name: str, value: Any) -> Any:
    if isinstance(value, (int, float, bool, type(None))):
        return value
    if name in _HIDDEN_NAMES:
        return "(hidden)"
    if isinstance(value, dict):
        return {str(key): _clean(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean("", item) for item in value]
    text = _HIDDEN_TEXT.sub("(hidden)", str(value))
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]} … {len(text) - MAX_TEXT} characters … {text[-MAX_TEXT // 2 :]}"
    return text


def human_line(line: dict[str, Any]) -> str:
    """A structured line as a person reads it: time of day (UTC), component, event, the rest as name=value."""
    clock = str(line.get("time", ""))[11:23]
    level = str(line.get("level", "info"))
    mark = "" if level in ("info", "debug") else f"{level.upper()} "
    shown = [
        f"{name}={_short(value)}"
        for name, value in line.items()
        if name not in ("time", "level", "component", "event", "traceback", "pid", "text")
    ]
    text = [str(line["text"])] if "text" in line else []
    head = f"{clock} {line.get('component', '?')!s:<12} {mark}{line.get('event', '')}"
    trace = f"\n{str(line['traceback']).rstrip()}" if line.get("traceback") else ""
    return " ".join([head, *text, *shown]) + trace


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
