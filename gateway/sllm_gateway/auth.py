"""Who may do what: bearer tokens, scopes, limits to apps; and that a browser was not tricked into asking.

Covered: a token is compared by the sha256 of its text, so the time of a look-up says nothing about it; administration
needs a token even on loopback; on loopback the Host header must name this machine (DNS rebinding) and a request with
an Origin must come from this very origin. Not covered: encryption (put a TLS proxy in front), rate limits per token.

    scope     may
    admin     everything
    deploy    apps, bundles, checkpoints; also read and invoke
    invoke    functions, models, and its invocations' streams
    read      lists, status, logs, timelines
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sllm_faas.errors import Forbidden, Unauthenticated, Unavailable
from sllm_faas.wire.messages import TokenEntry
from sllm_gateway.exchange import Exchange

Scope = Literal["admin", "deploy", "invoke", "read"]
_IMPLIED: dict[str, frozenset[str]] = {
    "admin": frozenset({"admin", "deploy", "invoke", "read"}),
    "deploy": frozenset({"deploy", "invoke", "read"}),
    "invoke": frozenset({"invoke"}),
    "read": frozenset({"read"}),
}
_PREFIX = b"sllm_"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `apps` empty: all. `owner`: may see tracebacks."""

    name: str
    scopes: frozenset[str]
    apps: frozenset[str] = frozenset()

    @property
    def owner(self) -> bool:
        return "deploy" in self.scopes or self.name == "anonymous"

    def sees(self, app: str) -> bool:
        return not self.apps or app in self.apps


ANONYMOUS = Principal("anonymous", frozenset({"invoke"}))


class Gate:
    """`tokens()` gives the entries by sha256, None while nobody has told them; `open_invoke` lets anyone invoke;
    `loopback` checks Host."""

    def __init__(
        self,
        tokens: Callable[[], dict[str, TokenEntry] | None],
        *,
        open_invoke: bool,
        loopback: bool,
        host: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._tokens = tokens
        self._open_invoke = open_invoke
        self._loopback = loopback
        self._local = _LOCAL_NAMES | {host.lower()}
        self._now = now

    def admit(self, exchange: Exchange, scope: Scope, app: str = "") -> Principal:
        """Raises Unauthenticated, Forbidden; Unavailable while no token is known yet. `app` when it is about one."""
        entry = self._entry(exchange)
        if entry is None:
            given = _token(exchange)
            # Clients that insist on a key send any; a wrong one of ours is a mistake to be told.
            if scope == "invoke" and self._open_invoke and not given.startswith(_PREFIX):
                exchange.principal = ANONYMOUS
                return ANONYMOUS
            raise Unauthenticated(
                "The token is not known, or has expired." if given else "This needs a token, and none was given.",
                hint="Send `Authorization: Bearer sllm_…`; `sllm token create` makes one.",
            )
        principal = _principal(entry.name, entry.scopes, entry.apps)
        exchange.principal = principal
        if scope not in principal.scopes:
            raise Forbidden(
                f"Token {entry.name!r} has scope {', '.join(entry.scopes) or 'none'}; this needs {scope}.",
                hint="Create a token with that scope.",
            )
        if app:
            self.check_app(principal, app)
        return principal

    @staticmethod
    def check_app(principal: Principal, app: str) -> None:
        if not principal.sees(app):
            raise Forbidden(f"Token {principal.name!r} is not good for app {app!r}.", hint="Create one that is.")

    @staticmethod
    def check_all_apps(principal: Principal) -> None:
        """For what concerns the platform as a whole."""
        if principal.apps:
            raise Forbidden(f"Token {principal.name!r} is limited to {', '.join(sorted(principal.apps))}.")

    def check_browser(self, exchange: Exchange) -> None:
        """Raises Forbidden for a request that a foreign web page may have caused."""
        headers = exchange.headers
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._loopback and _without_port(host) not in self._local:
            raise Forbidden(
                f"Host {host[:200]!r} is not this machine.", hint="Use http://127.0.0.1, or listen on another address."
            )
        origin = headers.get(b"origin")
        if origin is not None:
            text = origin.decode("latin-1").lower()
            if text.partition("://")[2] != host or not host:
                raise Forbidden(f"Requests from web pages of {text[:200]!r} are not accepted.")

    def _entry(self, exchange: Exchange) -> TokenEntry | None:
        token = _token(exchange)
        if not token:
            return None
        tokens = self._tokens()
        if tokens is None:
            if not token.startswith(_PREFIX):  # none of ours, whatever they are
                return None
            raise Unavailable("The gateway has just started.", hint="Try again shortly.", retry_after=1.0)
        entry = tokens.get(hashlib.sha256(token).hexdigest())
        if entry is None or (entry.expires is not None and entry.expires <= self._now()):
            return None
        return entry


@lru_cache(1024)
def _principal(name: str, scopes: tuple[str, ...], apps: tuple[str, ...]) -> Principal:
    implied = frozenset[str]().union(*(_IMPLIED.get(scope, frozenset()) for scope in scopes))
    return Principal(name, implied, frozenset(apps))


def _token(exchange: Exchange) -> bytes:
    """The bearer token sent; empty for none."""
    scheme, _, token = exchange.headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.count(":") == 1 else host
