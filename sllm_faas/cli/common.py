"""What every command that talks to a server shares: which server, with which token, and the options for it.

The server is the first of: --server, --profile, SLLM_SERVER, SLLM_PROFILE, the platform of this state directory.
The token is the first of: SLLM_TOKEN, the profile's, the state directory's admin token (local platform only: it
is never sent to another server). Profiles are tables of ~/.config/sllm/profiles.toml:

    [lab]
    server = "https://gpu-box:8700"
    token = "sllm_…"          # the file must then be readable by you alone
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sllm_faas.config import Config, check_keys, read_toml
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
        token = os.environ.get("SLLM_TOKEN", "")
        server = self.server or ("" if self.profile else os.environ.get("SLLM_SERVER", ""))
        profile = self.profile or os.environ.get("SLLM_PROFILE", "")
        if not server and profile:
            server, kept = read_profile(profile)
            return server, token or kept
        config = self.config()
        local = local_url(config)
        if not server or server.rstrip("/") == local:
            return local, token or _admin_token(config)
        return server, token

    def api(self) -> Api:
        from sllm_faas.cli.api import Api

        return Api(*self.address())


def load_config(flags: dict[str, Any], toml_path: Path | None = None) -> Config:
    try:
        return Config.load(flags, toml_path=toml_path)[0]
    except BadSpec as error:
        raise Misconfigured(error) from None


def local_url(config: Config) -> str:
    """Where the platform of this state directory listens: as it runs, or as it would."""
    try:
        url = json.loads(config.supervisor_path.read_bytes())["url"]
        return str(url)
    except (OSError, ValueError, KeyError, TypeError):
        return config.url


def _admin_token(config: Config) -> str:
    try:
        return config.admin_token_path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def profiles_path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "sllm" / "profiles.toml"


def read_profile(name: str) -> tuple[str, str]:
    """(server, token) of a profile. Raises Misconfigured."""
    path = profiles_path()
    try:
        table = read_toml(path)
        profile = table.get(name)
        if not isinstance(profile, dict):
            hint = _near(name, table) or f'Add a table [{name}] with server = "http://…" to {path}.'
            raise BadSpec(f"there is no profile {name!r} in {path}", hint=hint)
        check_keys(profile, ["server", "token"], f"{path} [{name}]")
        server, token = profile.get("server"), profile.get("token", "")
        if not isinstance(server, str) or not server.startswith(("http://", "https://")) or not isinstance(token, str):
            raise BadSpec(f'profile {name!r} of {path} needs server = "http(s)://…" and, optionally, token = "…"')
        if token and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise BadSpec(f"{path} holds a token and others may read it", hint=f"Do: chmod 600 {path}")
    except BadSpec as error:
        raise Misconfigured(error) from None
    return server, token


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
