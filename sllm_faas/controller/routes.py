"""The routing table that gateways hold: a snapshot and its sequenced changes. No sockets.

Invariant: `whole()` at seq n is `whole()` at seq 0 with the deltas 1 … n applied in order; an unchanged entry is not
published again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sllm_faas.wire.messages import FunctionRoute, NodeInfo, Routes, RoutesDelta, TokenEntry


class RouteTable:
    """`publish` is given every delta as it happens."""

    def __init__(self, publish: Callable[[RoutesDelta], None]) -> None:
        self._publish = publish
        self._seq = 0
        self._functions: dict[tuple[str, str], FunctionRoute] = {}
        self._nodes: dict[str, NodeInfo] = {}
        self._tokens: dict[str, TokenEntry] = {}

    def whole(self) -> Routes:
        return Routes(
            self._seq, tuple(self._functions.values()), tuple(self._nodes.values()), tuple(self._tokens.values())
        )

    def set_functions(self, app: str, functions: Sequence[FunctionRoute], gone: Sequence[str]) -> None:
        changed = tuple(f for f in functions if self._functions.get((app, f.spec.name)) != f)
        missing = tuple((app, name) for name in gone if (app, name) in self._functions)
        for function in changed:
            self._functions[app, function.spec.name] = function
        for key in missing:
            del self._functions[key]
        if changed or missing:
            self._publish(RoutesDelta(self._next(), functions=changed, functions_gone=missing))

    def set_node(self, info: NodeInfo) -> None:
        if self._nodes.get(info.name) != info:
            self._nodes[info.name] = info
            self._publish(RoutesDelta(self._next(), nodes=(info,)))

    def drop_node(self, name: str) -> None:
        if self._nodes.pop(name, None) is not None:
            self._publish(RoutesDelta(self._next(), nodes_gone=(name,)))

    def set_token(self, entry: TokenEntry) -> None:
        if self._tokens.get(entry.name) != entry:
            self._tokens[entry.name] = entry
            self._publish(RoutesDelta(self._next(), tokens=(entry,)))

    def drop_token(self, name: str) -> None:
        if self._tokens.pop(name, None) is not None:
            self._publish(RoutesDelta(self._next(), tokens_gone=(name,)))

    def _next(self) -> int:
        self._seq += 1
        return self._seq
