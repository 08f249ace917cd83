"""Who may do what: the platform's tokens, and the join tokens of its nodes. The operations of both.

Text of a token is given out once and never kept: its sha256 is stored and published to gateways. Of a join token the
public key is kept; whoever proves the secret one may connect.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from sllm_faas.controller import rpc
from sllm_faas.controller.store import JoinToken as StoredJoin
from sllm_faas.controller.views import Shape
from sllm_faas.errors import BadRequest, Conflict, SllmError
from sllm_faas.spec import check_app_name
from sllm_faas.wire.bus import CurveKeys
from sllm_faas.wire.curve import JoinToken, load_or_create
from sllm_faas.wire.messages import Keys, TokenEntry

if TYPE_CHECKING:
    from sllm_faas.controller.service import Controller

ADMIN = "admin"


@dataclass(slots=True)
class Access:
    controller: Controller
    _tokens: dict[str, tuple[TokenEntry, float]] = field(default_factory=dict)
    _joins: dict[str, StoredJoin] = field(default_factory=dict)

    async def load(self) -> None:
        """Publish the tokens the store knows, and the administrator's. Raises the store's errors."""
        store = self.controller.store
        tokens, joins = await self.controller.write(lambda: (store.tokens(), store.join_tokens()))
        self._joins = {join.key: join for join in joins}
        self._tokens = {entry.name: (entry, created) for entry, created in tokens}
        for entry in (self._admin_token(), *(entry for entry, _ in self._tokens.values())):
            self.controller.routes.set_token(entry)

    def _admin_token(self) -> TokenEntry:
        """Of the file only its owner can read; made when there is none."""
        path = self.controller.config.admin_token_path
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(_new_token())
        text = path.read_text(encoding="ascii").strip()
        return TokenEntry(ADMIN, _sha256(text), (ADMIN,))

    # -- tokens ----------------------------------------------------------------------------------------------

    async def _op_token_create(self, body: rpc.TokenCreate) -> Shape:
        _check_token(body)
        now, text = time.time(), _new_token()
        expires = now + body.expires_in if body.expires_in is not None else None
        entry = TokenEntry(body.name, _sha256(text), tuple(body.scopes), tuple(body.apps), expires)
        await self.controller.write(lambda: self.controller.store.add_token(entry, now))
        self._tokens[entry.name] = (entry, now)
        self.controller.routes.set_token(entry)
        return {
            "name": entry.name,
            "token": text,
            "scopes": list(entry.scopes),
            "apps": list(entry.apps),
            "expires": expires,
        }

    def _op_token_list(self, _body: rpc.Nothing) -> Shape:
        return {
            "tokens": [
                {
                    "name": entry.name,
                    "scopes": list(entry.scopes),
                    "apps": list(entry.apps),
                    "created": created,
                    "expires": entry.expires,
                }
                for entry, created in (self._tokens[name] for name in sorted(self._tokens))
            ]
        }

    async def _op_token_delete(self, body: rpc.OfToken) -> Shape:
        if body.name == ADMIN:
            raise Conflict("the token 'admin' is the platform's own", hint="Replace its file and restart to change it.")
        await self.controller.write(lambda: self.controller.store.delete_token(body.name))
        self._tokens.pop(body.name, None)
        self.controller.routes.drop_token(body.name)
        return {"name": body.name, "deleted": True}

    # -- joining nodes ---------------------------------------------------------------------------------------

    async def _op_join_create(self, body: rpc.JoinCreate) -> Shape:
        config = self.controller.config
        if not config.listen:
            raise Conflict(
                "this platform does not listen for nodes of other machines",
                hint='Set listen = "tcp://ADDRESS:8701" and restart.',
            )
        if not 1 <= body.expires_in <= 30 * 86400:
            raise BadRequest(f"expires_in is {body.expires_in!r} seconds; allowed: 1 to 2592000", param="expires_in")
        now, keys = time.time(), CurveKeys.generate()
        server = load_or_create(config.keys_dir, "controller").public
        endpoint = self.controller.endpoints[-1]
        token = JoinToken(endpoint, server, keys.public, keys.secret, now + body.expires_in)
        stored = StoredJoin(keys.public, now, token.expires)
        await self.controller.write(lambda: self.controller.store.add_join_token(stored))
        self._joins[keys.public] = stored
        return {"token": token.encode(), "endpoint": endpoint, "expires": token.expires}

    def _op_join_list(self, _body: rpc.Nothing) -> Shape:
        return {"tokens": [asdict(join) for join in self._joins.values()]}

    async def _op_join_revoke(self, body: rpc.OfKey) -> Shape:
        await self.controller.write(lambda: self.controller.store.revoke_join_token(body.key))
        join = self._joins[body.key]
        self._joins[body.key] = StoredJoin(join.key, join.created, join.expires, join.used, True)
        self.controller.tell_keys()
        return {"key": body.key, "revoked": True}

    def admits(self, key: str) -> bool:
        """Whether a node with that public key may connect; its first time makes the token its own."""
        join, now = self._joins.get(key), time.time()
        if join is None or join.revoked or (join.used is None and now > join.expires):
            return False
        if join.used is None:
            self._joins[key] = StoredJoin(join.key, join.created, join.expires, now)
            self.controller.tell_keys()
            self.controller.spawn(self._note_use(key, now))
        return True

    async def _note_use(self, key: str, now: float) -> None:
        with contextlib.suppress(SllmError):
            await self.controller.write(lambda: self.controller.store.use_join_token(key, now))

    def keys(self) -> Keys:
        """Whom invokers are to let in over TCP. One pair is all gateways' of a platform and one all its own machine's
        invokers'; a joined node's is the one that it proved here, not the one that it says it has."""
        folder = self.controller.config.keys_dir
        joined = (join.key for join in self._joins.values() if join.used is not None and not join.revoked)
        invokers = (load_or_create(folder, "invoker").public, *joined)
        return Keys((load_or_create(folder, "gateway").public,), invokers)


def check_name(app: str) -> None:
    """Raises BadRequest."""
    try:
        check_app_name(app)
    except ValueError as error:
        raise BadRequest(str(error), param="app") from None


def _check_token(body: rpc.TokenCreate) -> None:
    if not 1 <= len(body.name) <= 63 or not body.name.replace("-", "").replace("_", "").isalnum():
        raise BadRequest(f"token name {body.name[:80]!r}; allowed: 1-63 letters, digits, '-' and '_'", param="name")
    if body.name == ADMIN:
        raise Conflict("the name 'admin' is the platform's own token's", param="name")
    unknown = set(body.scopes) - set(rpc.SCOPES)
    if unknown or not body.scopes:
        raise BadRequest(f"scopes are {list(body.scopes)}; allowed: some of {', '.join(rpc.SCOPES)}", param="scopes")
    if body.expires_in is not None and not 1 <= body.expires_in <= 10 * 365 * 86400:
        raise BadRequest(f"expires_in is {body.expires_in!r} seconds; allowed: 1 s to 10 years", param="expires_in")
    for app in body.apps:
        check_name(app)


def _new_token() -> str:
    return "sllm_" + secrets.token_urlsafe(32)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
