"""CURVE keys and who is let in: key files, join tokens, the ZAP handler. Only for TCP; ipc is guarded by its directory.

    join token   sllmjoin_ + base64url JSON {endpoint, server_key, public, secret, expires}: all a node needs to reach
                 the controller and to be known by it. Its key stays the node's key; it is the node's server key, too.
    admission    a Router's CURVE handshake asks the ZAP handler, which asks the `allow(public key)` of its domain.

Covered: who cannot prove a key that `allow` names gets no frame in or out, and everything is encrypted. Not covered:
what an admitted node may then say (its role is checked by the controller).
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq
from zmq.auth.asyncio import AsyncioAuthenticator

from sllm_faas.errors import BadRequest, Forbidden
from sllm_faas.wire.bus import CurveKeys

PREFIX = "sllmjoin_"
DOMAIN = "sllm"
"""The ZAP domain that `bus.Router` names by itself."""
_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def public_of(secret: str) -> str:
    """The public key of a secret one, both Z85."""
    return zmq.curve_public(secret.encode()).decode()


def load_or_create(folder: Path, name: str) -> CurveKeys:
    """The key pair NAME of `folder` (0700), made at the first call; the file `NAME.key` (0600) holds the secret.

    Two processes may call it at once: they get the same keys. Raises Forbidden when others can read the file,
    BadRequest when it holds no key."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{name}.key"
    if not path.exists():
        keys = CurveKeys.generate()
        partial = folder / f".{name}-{secrets.token_hex(4)}"
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(keys.secret + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)  # fails when another was faster, where a rename would replace its keys
        except FileExistsError:
            pass
        finally:
            partial.unlink(missing_ok=True)
    return load(path)


def load(path: Path) -> CurveKeys:
    """The keys of a secret's file. Raises Forbidden, BadRequest."""
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise Forbidden(f"key file {path} has mode {stat.S_IMODE(mode):o}; allowed: 600", hint=f"Run: chmod 600 {path}")
    secret = path.read_text(encoding="ascii", errors="replace").strip()
    if not _Z85.fullmatch(secret):
        raise BadRequest(f"key file {path} does not hold a key", hint="Delete it to have a new one made.")
    return CurveKeys(public_of(secret), secret)


@dataclass(frozen=True, slots=True)
class JoinToken:
    """`expires`: Unix seconds until which it may be used for the first time."""

    endpoint: str
    server_key: str
    public: str
    secret: str
    expires: float

    @property
    def keys(self) -> CurveKeys:
        return CurveKeys(self.public, self.secret)

    def encode(self) -> str:
        text = json.dumps(asdict(self), separators=(",", ":"))
        return PREFIX + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Raises BadRequest; its message never holds the token."""
        refusal = BadRequest(
            f"that is not a join token; one begins with {PREFIX!r}", hint="Make one with `sllm join-token`."
        )
        if not text.startswith(PREFIX):
            raise refusal
        body = text[len(PREFIX) :].strip()
        try:
            plain = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            token = cls(**plain)
            whole = all(_Z85.fullmatch(key) for key in (token.server_key, token.public, token.secret))
            if not whole or not token.endpoint.startswith("tcp://") or public_of(token.secret) != token.public:
                raise refusal
            float(token.expires)
        except (ValueError, TypeError, AttributeError):
            raise refusal from None
        return token

    def check_fresh(self, now: float | None = None) -> None:
        """Raises BadRequest when it is too late to use it for the first time."""
        if (time.time() if now is None else now) > self.expires:
            raise BadRequest("the join token has expired", hint="Make a new one on the platform's machine.")


class Admission:
    """The ZAP handler of this process: one for all its CURVE sockets. `start` before a Router binds, then `stop`.

    `allow` says by domain whether the client with a public key (Z85) may come in; it is asked at every handshake, also
    at reconnects, so a revoked key is out as soon as its connection breaks. Who is not let in is told so and does not
    try again; with `later` it does, because it may only be early: we have not been told of its key yet."""

    def __init__(self, allow: Mapping[str, Callable[[str], bool]], *, later: bool = False) -> None:
        self._allow = allow
        self.refused = 0
        self._handler = _Handler(later=later)

    def start(self) -> None:
        self._handler.start()
        for domain in self._allow:
            self._handler.configure_curve_callback(domain, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the handler, with the key in Z85."""
        try:
            allowed = self._allow[domain](key.decode("ascii"))
        except UnicodeDecodeError:
            allowed = False
        self.refused += not allowed
        return allowed

    def stop(self) -> None:
        # Closing alone frees the address only when the socket's thread comes to it.
        self._handler.zap_socket.unbind("inproc://zeromq.zap.01")
        self._handler.stop()


class _Handler(AsyncioAuthenticator):  # type: ignore[misc]  # it has no types
    def __init__(self, *, later: bool) -> None:
        super().__init__(zmq.Context.instance())
        self._refusal = b"300" if later else b"400"
        """A temporary failure is a closed connection to the client, and it comes again (ZeroMQ RFC 27)."""

    def _send_zap_reply(
        self, request_id: bytes, status_code: bytes, status_text: bytes, user_id: str = "anonymous"
    ) -> None:
        code = self._refusal if status_code == b"400" else status_code
        super()._send_zap_reply(request_id, code, status_text, user_id)
