"""The `sllm` command: one module per noun, imported only when its command runs.

Exit codes: 0 ok · 1 failed · 2 usage or configuration · 3 server unreachable · 4 not found · 5 not allowed ·
130 interrupted. Errors go to stderr as what was wrong, then the next step; `--json` output goes to stdout alone.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from sllm_faas.errors import Forbidden, NotFound, SllmError, Unauthenticated, Unavailable

OK, FAILED, USAGE, UNREACHABLE, NOT_FOUND, NOT_ALLOWED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, one line of help)
    "up": ("up", "Start the platform on this machine."),
    "down": ("up", "Stop it, and leave nothing running."),
    "status": ("status", "Show what runs, where and since when."),
    "run": ("run", "Run a file's function here, without a server."),
    "dev": ("dev", "Deploy a file and again whenever it changes."),
    "deploy": ("deploy", "Deploy an app, or a model."),
    "invoke": ("invoke", "Call a function."),
    "ps": ("apps", "List running instances."),
    "logs": ("logs", "Show what functions and the platform wrote."),
    "describe": ("describe", "Show an app, function, invocation, node in full."),
    "history": ("apps", "List an app's versions."),
    "rollback": ("apps", "Serve an earlier version of an app."),
    "delete": ("apps", "Delete an app."),
    "checkpoint": ("checkpoint", "Pull, list, pin, verify, remove checkpoints."),
    "node": ("node", "List, cordon, drain, restart nodes."),
    "migrate": ("migrate", "Move a running invocation to another node."),
    "token": ("token", "Create, list, delete access tokens."),
    "join-token": ("token", "Make a token that lets another machine join."),
    "invoker": ("up", "Join this machine to a platform as a node."),
    "config": ("config", "Show settings and where they come from."),
    "doctor": ("doctor", "Check this machine for what the platform needs."),
    "bench": ("bench", "Run a benchmark of the source tree."),
    "simulate": ("simulate", "Simulate a cluster and compare policies."),
}


# ruff: noqa: ARG002 - click's signatures
class Lazy(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sllm_faas.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean `sllm {near[0]}`?" if near else "`sllm --help` lists them."
            ctx.fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sllm-faas", message="sllm-faas %(version)s")
def cli() -> None:
    """Serverless model functions.

    \b
    sllm up                     start the platform
    sllm deploy app.py          deploy an app
    sllm invoke app/function    call it

    Exit codes: 0 ok, 1 failed, 2 usage, 3 server unreachable, 4 not found, 5 not allowed, 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> None:
    """The console script: never a traceback for what a user can cause."""
    sys.exit(execute(args))


def execute(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    try:
        value: Any = cli.main(args, prog_name="sllm", standalone_mode=False)
        sys.stdout.flush()
        return value if isinstance(value, int) else OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `sllm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except SllmError as error:
        show_error(error)
        return exit_code(error)
    except OSError as error:  # a directory that cannot be written, a full disk
        click.echo(f"{_red('Error:')} {error}", err=True)
        return FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _OPTIONAL:
            raise
        click.echo(
            f"{_red('Error:')} this command needs {error.name!r}; install it with: pip install 'sllm-faas[all]'",
            err=True,
        )
        return FAILED


_OPTIONAL = {"psutil", "zmq", "msgspec", "uvicorn", "starlette", "sqlalchemy", "torch", "transformers", "watchfiles"}


def exit_code(error: SllmError) -> int:
    if isinstance(error, NotFound):
        return NOT_FOUND
    if isinstance(error, (Unauthenticated, Forbidden)):
        return NOT_ALLOWED
    if isinstance(error, Unavailable) and error.param == "server":
        return UNREACHABLE
    return FAILED


def show_error(error: SllmError) -> None:
    if error.traceback:
        click.echo(error.traceback.rstrip(), err=True)
    click.echo(f"{_red('Error:')} {error.message}", err=True)
    if error.hint:
        click.echo(error.hint, err=True)


def _red(text: str) -> str:
    return click.style(text, fg="red", bold=True) if not os.environ.get("NO_COLOR") else text
