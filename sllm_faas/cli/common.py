"""What every command that talks to a server shares: which server, with which token, and the options for it.

The rule is `sllm._profile`'s, with --server before SLLM_SERVER, --profile before SLLM_PROFILE and --state-dir before
SLLM_STATE_DIR.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, NotFound, SllmError

if TYPE_CHECKING:
    from sllm_faas.cli.api import Api

F = TypeVar("F", bound=Callable[..., Any])


class Misconfigured(click.ClickException):
    """A setting that is not allowed: the same exit code as a wrong option."""

    exit_code = 2

    def __init__(self, error: SllmError) -> None:
        super().__init__(str(error))


@dataclass(slots=True)
class Session:
    """The options of one command line that say which server is meant."""

    server: str | None
    profile: str | None
    state_dir: Path | None
    json: bool = False

    def config(self) -> Config:
        return load_config({"state_dir": self.state_dir})

    def address(self) -> tuple[str, str]:
        """(URL, token) of the server."""
        from sllm._profile import load_profile

        env = dict(os.environ)
        if self.server:
            env["SLLM_SERVER"] = self.server
        elif self.profile:
            env["SLLM_PROFILE"] = self.profile
            env.pop("SLLM_SERVER", None)
        if self.state_dir:
            env["SLLM_STATE_DIR"] = str(self.state_dir)
        try:
            found = load_profile(env)
        except BadSpec as error:
            raise Misconfigured(error) from None
        return found.server, found.token

    def api(self) -> Api:
        from sllm_faas.cli.api import Api

        return Api(*self.address())


def load_config(flags: dict[str, Any], toml_path: Path | None = None) -> Config:
    try:
        return Config.load(flags, toml_path=toml_path)[0]
    except BadSpec as error:
        raise Misconfigured(error) from None


def state_option(command: F) -> F:
    return click.option(
        "--state-dir", type=click.Path(path_type=Path), metavar="DIR", help="State directory of the platform."
    )(command)


def client_command(*, reads: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `session` as its first argument and the options that fill it; `--json` when it `reads`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(*, server: str | None, profile: str | None, state_dir: Path | None, **rest: Any) -> Any:
            as_json = bool(rest.pop("as_json", False))
            return command(Session(server, profile, state_dir, as_json), **rest)

        wrapped: Callable[..., Any] = state_option(run)
        wrapped = click.option("--profile", metavar="NAME", help="Server of ~/.config/sllm/profiles.toml.")(wrapped)
        wrapped = click.option("--server", metavar="URL", help="Server to talk to.")(wrapped)
        if reads:
            wrapped = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(wrapped)
        return wrapped

    return decorate


def split_name(text: str) -> tuple[str, str]:
    """`app/function` → both; a name alone is an app and function of that name."""
    app, slash, function = text.partition("/")
    return (app, function) if slash else (text, text)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def suggest(error: NotFound, name: str, known: Callable[[], Iterable[str]]) -> NotFound:
    """`error` with the nearest name there is as its hint; `known` is asked only now, and may fail."""
    try:
        hint = _near(name, known())
    except SllmError:
        hint = ""
    return NotFound(error.message, hint=hint or error.hint, param=error.param)
