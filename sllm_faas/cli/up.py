"""`sllm up`, `sllm down` and `sllm invoker`: the processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sllm_faas import logging
from sllm_faas.cli import output, processes
from sllm_faas.cli.common import load_config, state_option
from sllm_faas.cli.supervisor import STOP_MARGIN, Supervisor
from sllm_faas.config import Config, settings
from sllm_faas.errors import BadRequest, SllmError, by_code

SUPERVISOR = [sys.executable, "-P", "-m", "sllm_faas.cli.supervisor"]
_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "Path": click.Path(path_type=Path)}


def setting_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One option per setting, none with a default: what was not given is looked for elsewhere."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, kind, help_, secret in reversed(settings()):
            flag = "--" + name.replace("_", "-")
            if secret or name in without:
                continue
            if kind.startswith("bool"):
                command = click.option(
                    f"{flag}/--no-{flag[2:]}", name, default=None, help=f"{help_[0].upper()}{help_[1:]}."
                )(command)
            else:
                command = click.option(flag, name, type=_TYPES[kind], help=f"{help_[0].upper()}{help_[1:]}.")(command)
        return command

    return decorate


@click.command()
@setting_options(without=("node_name",))
@click.option("--config", "file", type=click.Path(path_type=Path), help="Settings file instead of ./sllm.toml.")
@click.option("--daemon", is_flag=True, help="Return once it serves; stop it with `sllm down`.")
def up(file: Path | None, daemon: bool, **flags: Any) -> None:
    """Start the platform on this machine.

    In the foreground Ctrl-C stops it in order, a second Ctrl-C at once.
    """
    _serve(load_config(flags, file), daemon)


def _serve(config: Config, daemon: bool) -> None:
    if daemon:
        spawn(config)
        _banner(config, "Stop it with `sllm down`.")
        return
    human = sys.stdout.isatty()

    def echo(line: dict[str, Any]) -> None:
        click.echo(logging.human_line(line) if human else json.dumps(line, ensure_ascii=False))

    async def serve() -> None:
        await Supervisor(config, echo=echo).run(lambda: _banner(config, "Ctrl-C stops it."))

    asyncio.run(serve())


def _banner(config: Config, last: str) -> None:
    if config.join:
        click.echo(f"This machine has joined as a node (state in {config.state_dir}). {last}", err=True)
        return
    click.echo(f"sllm-faas serves {output.style(config.url, bold=True)} (state in {config.state_dir})", err=True)
    click.echo(f"Deploy with `sllm deploy FILE`. {last}", err=True)


def spawn(config: Config) -> None:
    """Start the supervisor, which leaves our session by itself, and wait until everything is ready.

    Ctrl-C meanwhile leaves it starting: `sllm down` stops it."""
    config.prepare()
    with (config.logs_dir / "supervisor.err").open("ab") as errors:
        process = subprocess.Popen(
            SUPERVISOR,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(config.to_json().encode())
        process.stdin.close()
        line = process.stdout.readline()
    told: dict[str, Any] = (
        json.loads(line) if line else {"code": "start_failed", "message": f"the supervisor died; see {errors.name}"}
    )
    if told.get("event") != "up":
        raise by_code(told["code"])(told["message"], hint=told.get("hint", ""), traceback=told.get("traceback", ""))


@click.command()
@state_option
@click.option(
    "--timeout", type=click.FloatRange(min=0), help="Seconds before it is killed. Default: shutdown_grace + 30."
)
def down(state_dir: Path | None, timeout: float | None) -> None:
    """Stop the platform of this state directory, and verify that nothing of it is left."""
    config = load_config({"state_dir": state_dir})
    began = time.monotonic()
    holder = processes.holder(config)
    if holder is None:
        left = processes.end(config, 1.0)
        ended = f" Ended {left} processes that an earlier one left." if left else ""
        click.echo(f"No platform runs on {config.state_dir}.{ended}")
        return
    orderly = stop(config, _running_grace(config) + STOP_MARGIN + 20.0 if timeout is None else timeout)
    spent = output.duration(time.monotonic() - began)
    click.echo(f"{'Stopped' if orderly else 'Killed: it did not stop in time'} ({spent}); nothing is left.")


def stop(config: Config, limit: float) -> bool:
    """Stop the platform of a state directory and verify that nothing of it is left; kill it after `limit` seconds.

    False when it had to be killed."""
    holder = processes.holder(config)
    orderly = holder is None or _stop(holder.pid, limit)
    processes.end(config, 1.0)
    config.supervisor_path.unlink(missing_ok=True)
    return orderly


def _running_grace(config: Config) -> float:
    """The grace that the running platform was started with."""
    try:
        return Config.read(config.config_path).shutdown_grace
    except SllmError:
        return config.shutdown_grace


def _stop(pid: int, limit: float) -> bool:
    """SIGTERM and wait; SIGKILL after `limit` seconds. False when it had to be killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if not processes.wait([pid], limit):
            os.kill(pid, signal.SIGKILL)
            processes.wait([pid], 5.0)
            return False
    return True


@click.command()
@setting_options(without=("gateways", "invokers", "host", "port", "open_invoke", "max_body"))
@click.option("--join", required=True, metavar="TOKEN", help="Join token of the platform; '-' reads it from stdin.")
@click.option("--daemon", is_flag=True, help="Return once it has joined; stop it with `sllm down`.")
def invoker(join: str, daemon: bool, **flags: Any) -> None:
    """Join this machine to a platform as a node.

    Make the token with `sllm join-token` where the platform runs.
    """
    token = (sys.stdin.readline() if join == "-" else join).strip()
    if not token:
        raise BadRequest("the join token is empty", hint="Make one with `sllm join-token`.")
    from sllm_faas.wire.curve import JoinToken  # needs ZeroMQ, which no other command does

    JoinToken.decode(token)  # said here, where the person is, and not in the log of the invoker
    _serve(load_config({**flags, "join": token, "invokers": 1}), daemon)
