"""`sllm config`: settings and where each came from."""

from __future__ import annotations

from pathlib import Path

import click

from sllm_faas.cli import output
from sllm_faas.cli.common import Misconfigured, state_option
from sllm_faas.config import Config, settings
from sllm_faas.errors import BadSpec


@click.group()
def config() -> None:
    """Settings of the platform on this machine."""


@config.command()
@state_option
@click.option("--config", "file", type=click.Path(path_type=Path), help="Settings file instead of ./sllm.toml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(state_dir: Path | None, file: Path | None, as_json: bool) -> None:
    """Show every setting, its value and its source."""
    try:
        found, sources = Config.load({"state_dir": state_dir}, toml_path=file)
    except BadSpec as error:
        raise Misconfigured(error) from None
    values = {}
    for name, _, _, secret in settings():
        value = getattr(found, name)
        values[name] = "(hidden)" if secret and value else str(value) if name == "state_dir" else value
    if as_json:
        output.emit_json({name: {"value": values[name], "source": sources[name]} for name in values})
        return
    helps = {name: help_ for name, _, help_, _ in settings()}
    output.table(
        ["setting", "value", "source", "meaning"],
        [(name, value, sources[name], helps[name]) for name, value in values.items()],
        "",
    )
