"""`sllm run`: a file's entrypoint or function, on a platform inside this process. Needs no server."""

from __future__ import annotations

import asyncio
import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from sllm_faas.cli import FAILED, OK, output
from sllm_faas.errors import BadSpec, NotFound, SllmError
from sllm_faas.wire.exceptions import format_traceback

_SIMPLE: dict[type, Any] = {str: str, int: int, float: float, bool: bool, Path: click.Path(path_type=Path)}


class Json(click.ParamType[Any]):
    """Any value, written as JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        try:
            return json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("target", metavar="FILE[:APP][::FUNCTION]")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(target: str, arguments: tuple[str, ...]) -> int:
    """Run a local entrypoint of FILE, or one of its functions, with ARGUMENTS as options (--x 3).

    The same code, limits and errors as deployed, in this process. Without ::FUNCTION it is the only entrypoint, the
    one named main, or the only function. `sllm run FILE::FUNCTION -- --help` shows the options.
    """
    from sllm._source import load_app

    from sllm_faas.local import LocalPlatform

    file, _, name = target.partition("::")
    loaded = load_app(file)
    app = loaded.app
    name, code, call = choose(app, name)
    if arguments[:1] == ("--",):
        arguments = arguments[1:]

    try:
        values = command(code).make_context(f"sllm run {file}::{name}", list(arguments)).params
    except click.exceptions.Exit as done:  # --help
        return done.exit_code
    try:
        with LocalPlatform() as platform:
            platform.deploy(app)
            call(values)
    except SllmError:
        raise
    except Exception as error:  # the user's own, as it was raised there
        trace = getattr(error, "remote_traceback", "") or format_traceback(error, str(loaded.root))
        click.echo(trace.rstrip(), err=True)
        return FAILED
    return OK


def choose(app: Any, name: str) -> tuple[str, Callable[..., Any], Callable[[dict[str, Any]], None]]:
    """(name, the code whose signature gives the options, what runs it). Raises NotFound, BadSpec."""
    from sllm import Cls, Llm
    from sllm._options import did_you_mean

    callables: dict[str, Any] = {}
    for known, found in app.registered.items():
        if isinstance(found, Cls):
            if not any(parameter.required for parameter in found.parameters):
                callables |= {f"{known}.{method}": getattr(found(), method) for method in found.methods}
        elif not isinstance(found, Llm):
            callables[known] = found
    names = [*app.entrypoints, *callables]
    if not name:
        several = list(app.entrypoints) or list(callables)
        name = "main" if "main" in app.entrypoints else several[0] if len(several) == 1 else ""
        if not name:
            raise BadSpec(
                f"app {app.name!r} has {len(several)} functions to run and no entrypoint named main",
                hint=f"Name one with ::, of {', '.join(names)}." if names else "Register one with @app.function.",
            )
    if name in app.entrypoints:
        entrypoint = app.entrypoints[name]
        return name, entrypoint, lambda values: _entrypoint(entrypoint, values)
    if name in callables:
        function = callables[name]
        return name, function.raw, lambda values: _function(function, values)
    hint = did_you_mean(name, names) or f"It has: {', '.join(names) or 'none'}."
    raise NotFound(f"app {app.name!r} has no function or entrypoint {name!r}", hint=hint)


def _entrypoint(entrypoint: Callable[..., Any], values: dict[str, Any]) -> None:
    result = entrypoint(**values)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    if result is not None:
        show(result)


def _function(function: Any, values: dict[str, Any]) -> None:
    if hasattr(type(function), "stream"):
        for value in function.stream(**values):
            show(value)
    else:
        show(function.remote(**values))


def show(value: Any) -> None:
    click.echo(value if isinstance(value, str) else output.compact(value))


# -- options from a signature --------------------------------------------------------------------------------


def command(code: Callable[..., Any]) -> click.Command:
    """A command, to parse with, that has one option per parameter of `code`.

    Raises BadSpec for parameters that have no name."""
    try:
        hints = get_type_hints(code)
    except Exception:  # annotations that cannot be evaluated: all options are text
        hints = {}
    options = [
        _option(parameter, hints.get(parameter.name))
        for parameter in inspect.signature(code).parameters.values()
        if parameter.name != "self"
    ]
    return click.Command(None, params=list(options), help=inspect.getdoc(code))


def _option(parameter: inspect.Parameter, hint: Any) -> click.Option:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise BadSpec(
            f"parameter {parameter} cannot be given on the command line; allowed: parameters with names",
            hint="Write a @app.local_entrypoint that calls it.",
        )
    required = parameter.default is parameter.empty
    more = {"required": True} if required else {"default": parameter.default, "show_default": True}
    typed = hint if hint is not None else type(parameter.default) if parameter.default else str
    kind = _kind(typed)
    flag = "--" + parameter.name.replace("_", "-")
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", parameter.name], **more)
    return click.Option([flag, parameter.name], type=kind, **more)


def _kind(hint: Any) -> Any:
    """The type of an option; what is no simple type is written as JSON."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        hint = inner[0] if len(inner) == 1 else Any
    return _SIMPLE.get(hint) or Json()
