"""What commands print: JSON for programs, aligned columns for people, progress on stderr.

Columns are plain text, so a pipe gets the same rows; colour only on a terminal and without NO_COLOR.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click


def emit_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def compact(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], empty: str) -> None:
    """Rows under headings; `empty` when there are none."""
    cells = [[show(value) for value in row] for row in rows]
    if not cells:
        click.echo(empty)
        return
    widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    click.echo(style(_align([name.upper() for name in columns], widths), bold=True))
    for row in cells:
        click.echo(_align(row, widths))


def pairs(values: Iterable[tuple[str, Any]]) -> None:
    """name  value, one per line."""
    kept = [(name, show(value)) for name, value in values]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        click.echo(f"{style(name.ljust(width), bold=True)}  {value}")


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def show(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={show(item)}" for key, item in value.items()) or "-"
    return str(value).replace("\n", " ")


def style(text: str, **how: Any) -> str:
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else click.style(text, **how)


def ago(when: float | None) -> str:
    """Unix time as an age."""
    return "-" if not when else duration(max(0.0, time.time() - when))


def when(moment: float | None) -> str:
    """Unix time as local date and time."""
    return "never" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600} h"
    return f"{int(seconds) // 86400} d"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Progress:
    """Stages of one long operation, on stderr: a bar that redraws on a terminal, else a line per stage."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._stage = ""
        self._began = time.monotonic()

    def update(self, stage: str, done: int = 0, total: int = 0, text: str = "") -> None:
        if self._quiet:
            return
        if self._live:
            click.echo(f"\r\x1b[2K{self._bar(stage, done, total, text)}", nl=False, err=True)
        elif stage != self._stage:
            click.echo(f"{text or stage} …", err=True)
        self._stage = stage

    def _bar(self, stage: str, done: int, total: int, text: str) -> str:
        spent = duration(time.monotonic() - self._began)
        if total <= 0:
            return f"{text or stage} ({spent})"
        filled = round(24 * min(done, total) / total)
        amount = f"{size(done)} of {size(total)}" if total > 4096 else f"{done} of {total}"
        return f"{stage} [{'█' * filled}{'·' * (24 - filled)}] {amount} {text} ({spent})"

    def clear(self) -> None:
        if self._live and self._stage:
            click.echo("\r\x1b[2K", nl=False, err=True)
        self._stage = ""
