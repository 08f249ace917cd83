"""`sllm deploy`: an app's source, or a model without any, to the server."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sllm_faas.bundle import Bundle
from sllm_faas.cli import output
from sllm_faas.cli.api import PATIENT, Api, path
from sllm_faas.cli.checkpoint import follow
from sllm_faas.cli.common import Session, client_command
from sllm_faas.errors import NotFound
from sllm_faas.spec import AppSpec


@click.command()
@click.argument("file", required=False, metavar="FILE[:APP]")
@click.option(
    "--model", metavar="DIR|REPO", help="Serve a language model: a directory of the server, or a repository id."
)
@click.option("--name", default="", help="With --model: the app's name. Default: from the model's.")
@click.option("--revision", default="", help="With --model: branch, tag or commit.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@client_command(reads=True)
def deploy(session: Session, file: str | None, model: str | None, name: str, revision: str, dtype: str) -> None:
    """Deploy the app of a Python file, or a model.

    The version that serves goes on serving until the new one is ready; a failed deployment changes nothing.
    """
    if (file is None) == (model is None):
        raise click.UsageError("name either a FILE or --model")
    if file is not None and (name or revision):
        raise click.UsageError("--name and --revision go with --model; the app's name is in its file")
    from sllm._source import build, load_app

    if model is not None:
        spec, bundle = model_spec(model, name, revision, dtype), None
    else:
        assert file is not None
        spec, bundle = build(load_app(file))
    with session.api() as api:
        done = send(api, spec, bundle, quiet=session.json)
        if session.json:
            output.emit_json(done)
        else:
            report(api.server, spec, done)


def model_spec(model: str, name: str, revision: str, dtype: Any) -> AppSpec:
    """An app of one language model, both of one name. Raises BadSpec."""
    from sllm import App, Checkpoint

    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    name = name or re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rpartition("/")[2].lower()).strip("-")[:63]
    app = App(name)
    app.llm(name, Checkpoint(source, revision, dtype))
    return app.spec()


def send(api: Api, spec: AppSpec, bundle: Bundle | None, *, quiet: bool = False) -> dict[str, Any]:
    """Upload what is not there yet, deploy, and wait for the end. Raises what it failed with."""
    if bundle is not None and not has(api, bundle.digest):
        progress = output.Progress(quiet)
        progress.update("upload", len(bundle.data), len(bundle.data), f"uploading {len(bundle.files)} files")
        api.put(path("bundles", bundle.digest), bundle.data, timeout=PATIENT)
        progress.clear()
    return follow(api, path("apps", spec.name, "deployments"), {"spec": asdict(spec)}, quiet)


def has(api: Api, digest: str) -> bool:
    try:
        api.head(path("bundles", digest))
    except NotFound:
        return False
    return True


def report(server: str, spec: AppSpec, done: dict[str, Any], began: float | None = None) -> None:
    """Say what serves now, and how it is called."""
    seconds = done["seconds"] if began is None else time.monotonic() - began
    if done["unchanged"]:
        click.echo(f"{spec.name} is unchanged: version {done['version']} serves.")
    else:
        click.echo(f"Deployed {spec.name} version {done['version']} in {output.duration(seconds)}.")
    for function in spec.functions:
        if function.kind == "llm":
            click.echo(f"  {spec.name}/{function.name}  base_url={server}/v1  model={spec.name}/{function.name}")
            continue
        for method in function.methods:
            called = function.name if function.kind == "function" else f"{function.name}.{method.name}"
            click.echo(f"  {spec.name}/{called}  POST {server}/v1/functions/{spec.name}/{called}")
