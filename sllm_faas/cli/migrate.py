"""`sllm migrate`: let a running invocation go on at another node."""

from __future__ import annotations

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import PATIENT, path
from sllm_faas.cli.common import Session, client_command


@click.command()
@click.argument("invocation")
@click.argument("node")
@client_command(reads=True)
def migrate(session: Session, invocation: str, node: str) -> None:
    """Move INVOCATION, while it runs, to NODE. An instance is started there if there is none.

    Calls of language models can move, and generators that are declared resumable.
    """
    with session.api() as api:
        found = api.post(path("invocations", invocation, "migrate"), {"node": node}, timeout=PATIENT)
    if session.json:
        output.emit_json(found)
    elif found["outcome"] == "ended":
        click.echo(f"{invocation} ended before it could move.")
    else:
        took, paused = output.duration(found["seconds"]), output.duration(found["paused"])
        click.echo(
            f"{invocation} goes on in {found['instance']} on {found['to']}: "
            f"moved in {took}, paused for {paused}, {found['rounds']} rounds, {found['tokens']} tokens."
        )
