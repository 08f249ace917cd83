"""`sllm token`, `sllm join-token`: who may do what. A token's text is shown once, when it is made."""

from __future__ import annotations

import re

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import path
from sllm_faas.cli.common import Session, client_command

SCOPES = ("admin", "deploy", "invoke", "read")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """Seconds, written 90s, 15m, 12h or 30d."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,9})([smhd])", str(value))
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is not a duration; allowed: 90s, 15m, 12h, 30d", param, ctx)
        return float(int(found[1]) * _UNITS[found[2]])


@click.group()
def token() -> None:
    """Tokens of people and programs that use the platform."""


@token.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=["invoke"], show_default=True)
@click.option("--app", "apps", multiple=True, help="Good for this app only; may be repeated. Default: all.")
@click.option("--expires", type=Duration(), metavar="DURATION", help="90s, 15m, 12h, 30d. Default: never.")
@client_command(reads=True)
def create(session: Session, name: str, scopes: tuple[str, ...], apps: tuple[str, ...], expires: float | None) -> None:
    """Create the token NAME and print it, once."""
    with session.api() as api:
        made = api.post(
            path("tokens"), {"name": name, "scopes": list(scopes), "apps": list(apps), "expires_in": expires}
        )
    if session.json:
        output.emit_json(made)
        return
    click.echo(made["token"])
    click.echo("Keep it: it is not shown again.", err=True)


@token.command("list")
@client_command(reads=True)
def list_(session: Session) -> None:
    """List tokens, without their text."""
    with session.api() as api:
        tokens = api.get(path("tokens"))["tokens"]
    if session.json:
        output.emit_json(tokens)
        return
    output.table(
        ["name", "scopes", "apps", "created", "expires"],
        [
            (
                item["name"],
                item["scopes"],
                item["apps"] or "all",
                f"{output.ago(item['created'])} ago" if item["created"] else None,
                output.when(item["expires"]),
            )
            for item in tokens
        ],
        "There are no tokens.",
    )


@token.command()
@click.argument("name")
@client_command()
def delete(session: Session, name: str) -> None:
    """Delete the token NAME; it is refused from now on."""
    with session.api() as api:
        api.delete(path("tokens", name))
    click.echo(f"Deleted {name}.")


@click.command("join-token")
@click.option(
    "--expires", type=Duration(), metavar="DURATION", default="1h", show_default=True, help="90s, 15m, 12h, 30d."
)
@client_command(reads=True)
def join_token(session: Session, expires: float) -> None:
    """Make a token that lets another machine join, once: `sllm invoker --join -` there."""
    with session.api() as api:
        made = api.post(path("join-tokens"), {"expires_in": expires})
    if session.json:
        output.emit_json(made)
        return
    click.echo(made["token"])
    click.echo(f"Good until {output.when(made['expires'])}.", err=True)
