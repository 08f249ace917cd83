"""`sllm invoke`: one call over HTTP, with JSON in and out."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import PATIENT, Api, error_of, path
from sllm_faas.cli.apps import app_names, get_app
from sllm_faas.cli.common import Session, client_command, split_name, suggest
from sllm_faas.errors import NotFound, PlatformError


@click.command()
@click.argument("name")
@click.argument("arguments", default="{}", metavar="[JSON]")
@click.option("--stream", is_flag=True, help="Print outputs as they come.")
@click.option("--parameters", default="", metavar="JSON", help="Parameters of a class, as a JSON object.")
@client_command(reads=True)
def invoke(session: Session, name: str, arguments: str, stream: bool, parameters: str) -> None:
    """Call NAME (app/function, app/class.method) with JSON: {…} by name, […] in order, - from stdin.

    Text is printed as it is, everything else as JSON; --json prints text as JSON too.
    """
    body = _json(sys.stdin.read() if arguments == "-" else arguments, (dict, list), "an object or an array")
    if parameters:
        _json(parameters, (dict,), "an object")
    app, function = split_name(name)
    with session.api() as api:
        try:
            if stream:
                _stream(api, app, function, body, parameters, session.json)
            else:
                options = {"params": {"parameters": parameters}} if parameters else {}
                headers = {"Accept": "application/json"}
                result = api.post(path("functions", app, function), body, timeout=PATIENT, headers=headers, **options)
                _print(result, session.json)
        except NotFound as error:
            raise _nearest(api, error, app, function) from None


def _json(text: str, kinds: tuple[type, ...], allowed: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, kinds):
        raise click.UsageError(f"{text!r} is not {allowed}")
    return value


def _stream(api: Api, app: str, function: str, body: Any, parameters: str, as_json: bool) -> None:
    with api.events("POST", path("functions", app, function), body, parameters=parameters) as events:
        for event in events:
            if event.kind == "output":
                _print(event.data, as_json)
                sys.stdout.flush()
            elif event.kind == "error":
                raise error_of(event.data)
            elif event.kind == "done":
                return
    raise PlatformError("the stream ended without its end", hint="The server was stopped; call it again.")


def _print(value: Any, as_json: bool) -> None:
    click.echo(value if isinstance(value, str) and not as_json else output.compact(value))


def _nearest(api: Api, error: NotFound, app: str, function: str) -> NotFound:
    """The error with the nearest app, or function of the app, as its hint."""
    plain = function.partition(".")[0]
    if app not in app_names(api):
        return suggest(error, app, lambda: app_names(api))
    return suggest(error, plain, lambda: [item["name"] for item in get_app(api, app)["functions"]])
