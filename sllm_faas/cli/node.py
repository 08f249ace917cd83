"""`sllm node`: the machines that run functions."""

from __future__ import annotations

import contextlib
import time

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import Api, path
from sllm_faas.cli.common import Session, client_command, suggest
from sllm_faas.errors import NotFound, Unavailable

LOOK = 0.5
BACK = 120.0
"""Seconds between two looks, and until a restarted invoker is given up."""


@click.group()
def node() -> None:
    """The machines that run functions."""


@node.command("list")
@client_command(reads=True)
def list_(session: Session) -> None:
    """List nodes."""
    with session.api() as api:
        nodes = api.get(path("nodes"))["nodes"]
    if session.json:
        output.emit_json(nodes)
        return
    output.table(
        ["node", "state", "instances", "memory used", "memory", "cores", "gpus", "checkpoints"],
        [
            (
                item["name"],
                "draining" if item["draining"] else "cordoned" if item["cordoned"] else item["state"],
                item["instances"],
                output.size(item["memory_used_mb"] << 20),
                output.size(item["memory_mb"] << 20),
                item["cores"],
                item["gpus"],
                len(item["checkpoints"]),
            )
            for item in nodes
        ],
        "There are no nodes.",
    )


def _act(session: Session, name: str, verb: str, said: str) -> None:
    with session.api() as api:
        try:
            api.post(path("nodes", name, verb))
        except NotFound as error:
            raise suggest(error, name, lambda: [item["name"] for item in api.get(path("nodes"))["nodes"]]) from None
    click.echo(f"{name} {said}.")


@node.command()
@click.argument("name")
@client_command()
def cordon(session: Session, name: str) -> None:
    """Start nothing new on NAME."""
    _act(session, name, "cordon", "takes nothing new")


@node.command()
@click.argument("name")
@client_command()
def uncordon(session: Session, name: str) -> None:
    """Let NAME be used again."""
    _act(session, name, "uncordon", "is used again")


@node.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return when nothing is left there.")
@client_command()
def drain(session: Session, name: str, wait: bool) -> None:
    """Empty NAME: others start elsewhere first, what can move does, the rest finishes.

    It takes nothing new until `sllm node uncordon NAME`.
    """
    _act(session, name, "drain", "drains")
    if wait:
        with session.api() as api:
            _empty(api, name)
        click.echo(f"{name} is empty.")


@node.command()
@click.argument("name")
@client_command()
def restart(session: Session, name: str) -> None:
    """Drain NAME, restart its invoker, and use it again. Nothing that runs there is cut."""
    with session.api() as api:
        try:
            before = api.get(path("nodes", name))
        except NotFound as error:
            raise suggest(error, name, lambda: [item["name"] for item in api.get(path("nodes"))["nodes"]]) from None
        api.post(path("nodes", name, "drain"))
        _empty(api, name)
        api.post(path("nodes", name, "restart"))
        _back(api, name, before["life"])
        if not before["cordoned"]:
            api.post(path("nodes", name, "uncordon"))
    click.echo(f"{name} is back{' and cordoned, as before' if before['cordoned'] else ''}.")


def _empty(api: Api, name: str) -> None:
    """Until no instance is there. A controller that was restarted is asked again: it forgot the drain."""
    progress, most = output.Progress(), 0
    while True:
        found = api.get(path("nodes", name))
        left = found["instances_list"]
        if not left:
            break
        if not found["draining"]:
            api.post(path("nodes", name, "drain"))
        most = max(most, len(left))
        running = sum(item["running"] for item in left)
        made = sum(item["outcome"] == "moved" and item["from"] == name for item in found["moves"])
        text = f"{running} running, {len(found['moving'])} moving, {made} moved lately"
        progress.update(f"{name} drains: instances", most - len(left), most, text)
        time.sleep(LOOK)
    progress.clear()


def _back(api: Api, name: str, life: str) -> None:
    """Until another life of its invoker is up. Raises Unavailable."""
    progress = output.Progress()
    until = time.monotonic() + BACK
    while time.monotonic() < until:
        progress.update(f"waiting for {name}")
        with contextlib.suppress(NotFound):
            found = api.get(path("nodes", name))
            if found["life"] != life and found["state"] == "up":
                progress.clear()
                return
        time.sleep(LOOK)
    raise Unavailable(
        f"{name} did not come back within {BACK:g} s.", hint="Is it supervised? See its log, then uncordon it."
    )
