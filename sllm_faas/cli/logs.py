"""`sllm logs`: what functions printed, each line with the invocation it belongs to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import error_of, path
from sllm_faas.cli.apps import get_app
from sllm_faas.cli.common import Session, client_command
from sllm_faas.cli.token import Duration


@click.command()
@click.argument("name", required=False, default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=100, show_default=True, help="Earlier lines.")
@click.option("--since", type=Duration(), metavar="DURATION", help="Only the last 90s, 15m, 12h, 30d.")
@click.option("--instance", default="", help="Of one instance.")
@click.option("--invocation", default="", help="Of one invocation.")
@client_command(reads=True)
def logs(
    session: Session, name: str, follow: bool, lines: int, since: float | None, instance: str, invocation: str
) -> None:
    """Show log lines of NAME (app, or app/function), or of all. --json prints one object per line."""
    app, _, function = name.partition("/")
    filters = {
        "app": app,
        "function": function,
        "instance": instance,
        "invocation": invocation,
        "since": time.time() - since if since else None,
        "lines": str(lines),
    }
    with session.api() as api:
        if app:
            get_app(api, app)
        if not follow:
            _show(api.lines(path("logs"), **filters), session.json)
            return
        with api.events("GET", path("logs"), follow=1, **filters) as events:
            for event in events:
                if event.kind == "error":
                    raise error_of(event.data)
                _show([event.data], session.json)


def _show(records: Iterable[dict[str, Any]], as_json: bool) -> None:
    for record in records:
        click.echo(output.compact(record) if as_json else line(record))


def line(record: dict[str, Any]) -> str:
    """time app/function instance invocation | text; errors and stderr in red on a terminal."""
    when = record.get("time", "")
    if isinstance(when, (int, float)):
        when = time.strftime("%H:%M:%S", time.localtime(when)) + f".{int(when % 1 * 1000):03d}"
    place = "/".join(filter(None, (record.get("app", ""), record.get("function", ""))))
    marks = " ".join(filter(None, (place, record.get("instance", ""), str(record.get("invocation", ""))[:12])))
    text = str(record.get("text", record.get("event", "")))
    loud = record.get("stream") == "stderr" or record.get("level") in ("error", "critical")
    return f"{output.style(f'{when} {marks} |', dim=True)} {output.style(text, fg='red') if loud else text}"
