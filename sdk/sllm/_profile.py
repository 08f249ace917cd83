"""Which server, with which token: one rule for the SDK and the command line.

server  SLLM_SERVER, else the profile SLLM_PROFILE, else the platform of this machine's state directory
token   SLLM_TOKEN, else the profile's, else the state directory's admin token — for that local platform only: it
        is never sent to another server

Profiles are tables of ~/.config/sllm/profiles.toml: `[lab]` with `server` and, optionally, `token`; a file with a
token must be readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sllm._options import check_known, did_you_mean
from sllm_faas.config import Config
from sllm_faas.errors import BadSpec


@dataclass(frozen=True, slots=True)
class Profile:
    """A server's URL and the token to show it ('' for none)."""

    server: str
    token: str = field(default="", repr=False)


def load_profile(env: Mapping[str, str] = os.environ) -> Profile:
    """Raises BadSpec for settings that are not allowed."""
    token, server, name = env.get("SLLM_TOKEN", ""), env.get("SLLM_SERVER", ""), env.get("SLLM_PROFILE", "")
    if not server and name:
        profile = read_profile(name, env)
        return Profile(profile.server, token or profile.token)
    local = local_profile(Config.load(None, env)[0])
    if server and check_server(server, "SLLM_SERVER") != local.server:
        return Profile(check_server(server, "SLLM_SERVER"), token)
    return Profile(local.server, token or local.token)


def check_server(server: str, source: str) -> str:
    """The URL without a trailing slash. Raises BadSpec."""
    if not server.startswith(("http://", "https://")) or any(char.isspace() for char in server):
        raise BadSpec(f"{source} is {server!r}; allowed: a URL, http://HOST:PORT or https://HOST.")
    return server.rstrip("/")


def local_profile(config: Config) -> Profile:
    """The platform of a state directory: where it listens (or would), and its admin token if it is readable."""
    try:
        server = str(json.loads(config.supervisor_path.read_bytes())["url"]).rstrip("/")
    except (OSError, ValueError, KeyError, TypeError):
        server = config.url
    try:
        token = config.admin_token_path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    return Profile(server, token)


def profiles_path(env: Mapping[str, str] = os.environ) -> Path:
    base = env.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "sllm" / "profiles.toml"


def read_profile(name: str, env: Mapping[str, str] = os.environ) -> Profile:
    """Raises BadSpec naming the file and what is wrong in it."""
    path = profiles_path(env)
    try:
        text = path.read_text("utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        table = {}
    except (OSError, ValueError) as error:
        raise BadSpec(f"{path} cannot be read: {error}.") from None
    profile = table.get(name)
    if not isinstance(profile, dict):
        hint = did_you_mean(name, list(table)) or f'Add a table [{name}] with server = "http://…".'
        raise BadSpec(f"there is no profile {name!r} in {path}.", hint=hint)
    check_known(f"profile {name!r} of {path}", profile, ["server", "token"])
    server, token = profile.get("server", ""), profile.get("token", "")
    if not isinstance(server, str) or not isinstance(token, str):
        raise BadSpec(f"profile {name!r} of {path} is not one; allowed: server and token as text.")
    if token and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise BadSpec(f"{path} holds a token and others may read it.", hint=f"Do: chmod 600 {path}")
    return Profile(check_server(server, f"server of profile {name!r}"), token)
