"""`sllm node`: the machines that run functions."""

from __future__ import annotations

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import path
from sllm_faas.cli.common import Session, client_command, suggest
from sllm_faas.errors import NotFound


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
@client_command()
def drain(session: Session, name: str) -> None:
    """Cordon NAME, let what runs there finish, and stop its instances."""
    _act(session, name, "drain", "drains")
