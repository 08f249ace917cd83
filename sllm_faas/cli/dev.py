"""`sllm dev`: deploy a file and again whenever its source changes, with its logs, until Ctrl-C.

On the platform that --server, --profile or the state directory name when one runs there; otherwise on one of its
own, in a temporary directory, which is gone afterwards.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import click

from sllm_faas.cli import output, show_error
from sllm_faas.cli.api import Api, path
from sllm_faas.cli.common import Session, client_command, load_config
from sllm_faas.cli.deploy import report, send
from sllm_faas.cli.logs import line
from sllm_faas.errors import SllmError


@click.command()
@click.argument("file", metavar="FILE[:APP]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the temporary platform.")
@client_command()
def dev(session: Session, file: str, port: int | None) -> None:
    """Deploy the app of a Python file and again whenever its directory changes; show its logs."""
    import watchfiles
    from sllm._source import build, load_app

    followed: set[str] = set()

    def deploy(api: Api) -> Path | None:
        """The directory to watch; None when not even that is known."""
        root = None
        try:
            loaded = load_app(file)
            root = loaded.root
            spec, bundle = build(loaded)
            report(api.server, spec, send(api, spec, bundle))
            if spec.name not in followed:
                followed.add(spec.name)
                threading.Thread(target=_logs, args=(address, spec.name), daemon=True).start()
        except SllmError as error:
            show_error(error)
        return root

    with _platform(session, port) as address, Api(*address) as api:
        root = deploy(api) or Path(file.partition(":")[0]).resolve().parent
        click.echo(output.style(f"Watching {root}; Ctrl-C ends.", dim=True), err=True)
        for changes in watchfiles.watch(root, raise_interrupt=True):
            changed = ", ".join(sorted({Path(name).name for _, name in changes})[:3])
            click.echo(output.style(f"{changed} changed.", dim=True), err=True)
            deploy(api)


@contextlib.contextmanager
def _platform(session: Session, port: int | None) -> Iterator[tuple[str, str]]:
    """(URL, token) of a platform that runs."""
    from sllm_faas.cli import processes, up

    config = session.config()
    if session.server or session.profile or processes.holder(config) is not None:
        yield session.address()
        return
    with tempfile.TemporaryDirectory(prefix="sllm-dev-") as directory:
        mine = load_config({"state_dir": Path(directory), "port": port})
        up.spawn(mine)
        try:
            yield mine.url, mine.admin_token_path.read_text(encoding="ascii").strip()
        finally:
            up.stop(mine, mine.shutdown_grace)


def _logs(address: tuple[str, str], app: str) -> None:
    """Follow the app's logs until the connection ends."""
    with (
        contextlib.suppress(SllmError),
        Api(*address) as api,
        api.events("GET", path("logs"), app=app, follow=1, lines="0") as events,
    ):
        for event in events:
            if event.kind == "log":
                click.echo(line(event.data))
