"""`sllm checkpoint`: weights on the nodes' disks."""

from __future__ import annotations

from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import Api, error_of, path
from sllm_faas.cli.common import Session, client_command
from sllm_faas.errors import PlatformError
from sllm_faas.spec import MAX_RANKS


@click.group()
def checkpoint() -> None:
    """Weights that the platform keeps."""


def follow(api: Api, url: str, body: Any, quiet: bool) -> dict[str, Any]:
    """A long operation's result; its progress is shown meanwhile. Raises what it failed with."""
    progress = output.Progress(quiet)
    try:
        with api.events("POST", url, body) as events:
            for event in events:
                if event.kind == "progress":
                    data = event.data
                    progress.update(data["stage"], data.get("done", 0), data.get("total", 0), data.get("text", ""))
                elif event.kind == "result":
                    result: dict[str, Any] = event.data
                    return result
                elif event.kind == "error":
                    raise error_of(event.data)
    finally:
        progress.clear()
    raise PlatformError("the answer ended without a result", hint="See `sllm logs` and try again.")


@checkpoint.command()
@click.argument("source")
@click.option("--name", default="", help="Name to keep it under. Default: from the source.")
@click.option("--revision", default="", help="Branch, tag or commit of a repository.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, MAX_RANKS),
    default=1,
    show_default=True,
    help="Ranks that share the weights out: one part for each.",
)
@click.option("--base", default="", help="For a LoRA adapter: name or digest of the checkpoint that it adapts.")
@client_command(reads=True)
def pull(session: Session, source: str, name: str, revision: str, dtype: str, tensor_parallel: int, base: str) -> None:
    """Get SOURCE onto the platform's disk: a Hugging Face repository, a folder behind https:// or s3://, or a directory
    of the server's machine."""
    body = {
        "source": source,
        "revision": revision,
        "dtype": dtype,
        "tensor_parallel": tensor_parallel,
        "name": name,
        "base": base,
    }
    with session.api() as api:
        done = follow(api, path("checkpoints"), body, session.json)
    if session.json:
        output.emit_json(done)
        return
    click.echo(f"Pulled {done['name']}: {output.size(done['bytes'])}, {done['digest'][:12]}.")


@checkpoint.command("list")
@client_command(reads=True)
def list_(session: Session) -> None:
    """List checkpoints.

    One that does not say why it stays may leave a disk that is too full for the next, the one worth least first.
    A start that needs it fetches it again.
    """
    with session.api() as api:
        found = api.get(path("checkpoints"))["checkpoints"]
    if session.json:
        output.emit_json(found)
        return
    output.table(
        ["digest", "names", "size", "tier", "leases", "stays", "node", "source"],
        [
            (
                item["digest"][:12],
                item.get("names", ()),
                output.size(item["bytes"]),
                _tier(item),
                item.get("leases", 0),
                item.get("stays", ""),
                item.get("node"),
                item.get("source"),
            )
            for item in found
        ],
        "There are no checkpoints; `sllm checkpoint pull` gets one.",
    )


def _tier(item: dict[str, Any]) -> str:
    """Where it is; how much is in memory while it is being read."""
    loaded = item.get("loaded", 0)
    reading = item.get("tier") == "disk" and loaded
    return f"disk, {output.size(loaded)} read" if reading else str(item.get("tier", "disk"))


@checkpoint.command()
@click.argument("ref")
@client_command()
def pin(session: Session, ref: str) -> None:
    """Never evict REF (a name or digest), from memory or disk."""
    with session.api() as api:
        api.post(path("checkpoints", ref, "pin"))
    click.echo(f"Pinned {ref}.")


@checkpoint.command()
@click.argument("ref")
@client_command()
def unpin(session: Session, ref: str) -> None:
    """Let REF be evicted when space is needed."""
    with session.api() as api:
        api.post(path("checkpoints", ref, "unpin"))
    click.echo(f"Unpinned {ref}.")


@checkpoint.command()
@click.argument("ref")
@client_command()
def rm(session: Session, ref: str) -> None:
    """Remove REF from disk, if nothing uses it."""
    with session.api() as api:
        api.delete(path("checkpoints", ref))
    click.echo(f"Removed {ref}.")


@checkpoint.command()
@click.argument("ref")
@client_command(reads=True)
def verify(session: Session, ref: str) -> None:
    """Read REF whole and compare it with its checksums."""
    with session.api() as api:
        found = api.post(path("checkpoints", ref, "verify"), timeout=None)
    if session.json:
        output.emit_json(found)
        return
    click.echo(f"{ref} is what it says (on {', '.join(found['nodes'])}).")
