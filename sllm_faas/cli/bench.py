"""`sllm bench`: hands over to the benchmarks of the source tree."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import click

from sllm_faas.errors import NotFound


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> int:
    """Run the benchmark NAME (dataplane, cancel …) with ARGUMENTS, such as --quick or --json PATH."""
    sys.path.insert(0, "")  # the source tree is where we are
    if importlib.util.find_spec("benchmarks") is None:
        raise NotFound("there are no benchmarks here", hint="They are part of the source tree: run this at its root.")
    if importlib.util.find_spec(f"benchmarks.{name}") is None:
        raise NotFound(f"there is no benchmark {name!r}", hint="`ls benchmarks` shows them.")
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False).returncode
