"""What the gateway knows of the world: serving versions, nodes, tokens. Pure.

    ROUTES        the whole table at seq n                    replace()
    ROUTES_DELTA  seq n+1: what changed and what is gone      apply() -> False on a gap: ask for the table again

Names are resolved here, and here only: `app/function`, `function.method`, OpenAI model names. Every failure is a
`NotFound` that says what was asked for, and the nearest names that exist.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sllm_faas.errors import BadRequest, NotFound
from sllm_faas.parameters import bind, convert
from sllm_faas.spec import FunctionSpec, MethodSpec, Target, canonical
from sllm_faas.wire.messages import FunctionRoute, NodeInfo, Routes, RoutesDelta, TokenEntry


@dataclass(frozen=True, slots=True)
class Resolved:
    """A callable and the instances that serve it."""

    route: FunctionRoute
    method: MethodSpec
    target: Target


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the known names most like `name`; or all of them when they are few; or nothing."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(other) for other in close)}?"
    if 0 < len(names) <= 5:
        return f"There is {', '.join(repr(other) for other in names)}."
    return ""


class RouteTable:
    """Mutable only through `replace` and `apply`."""

    def __init__(self) -> None:
        self.seq = -1
        """Of the last change taken in; -1 before the first table."""
        self.functions: dict[tuple[str, str], FunctionRoute] = {}
        self.nodes: dict[str, NodeInfo] = {}
        self.tokens: dict[str, TokenEntry] = {}
        """By sha256 of their text, hex."""
        self._models: dict[str, list[FunctionRoute]] = {}
        self._resolved: dict[tuple[str, str], Resolved] = {}

    @property
    def known(self) -> bool:
        return self.seq >= 0

    def replace(self, routes: Routes) -> None:
        self.seq = routes.seq
        self.functions = {(route.app, route.spec.name): route for route in routes.functions}
        self.nodes = {node.name: node for node in routes.nodes}
        self.tokens = {token.sha256: token for token in routes.tokens}
        self._changed()

    def apply(self, delta: RoutesDelta) -> bool:
        """False, and nothing changes, when the delta is not the next one (an old one is taken for done)."""
        if not self.known or delta.seq > self.seq + 1:
            return False
        if delta.seq <= self.seq:
            return True
        self.seq = delta.seq
        for app, function in delta.functions_gone:
            self.functions.pop((app, function), None)
        for route in delta.functions:
            self.functions[route.app, route.spec.name] = route
        for name in delta.nodes_gone:
            self.nodes.pop(name, None)
        for node in delta.nodes:
            self.nodes[node.name] = node
        replaced = {*delta.tokens_gone, *(token.name for token in delta.tokens)}
        self.tokens = {sha: token for sha, token in self.tokens.items() if token.name not in replaced}
        self.tokens.update((token.sha256, token) for token in delta.tokens)
        self._changed()
        return True

    def caps(self, gateway: str) -> dict[str, int]:
        """How many invocations may run at once through that gateway, of the apps for which that is limited."""
        return {route.app: route.cap + (gateway in route.more) for route in self.functions.values() if route.cap > 0}

    def _changed(self) -> None:
        self._resolved.clear()
        self._models = {}
        for (app, name), route in sorted(self.functions.items()):
            if route.spec.kind == "llm":
                self._models.setdefault(f"{app}/{name}", []).append(route)
                self._models.setdefault(name, []).append(route)

    # -- names -----------------------------------------------------------------------------------------------

    def function(self, app: str, function: str) -> FunctionRoute:
        """Raises NotFound."""
        route = self.functions.get((app, function))
        if route is not None:
            return route
        apps = {name for name, _ in self.functions}
        if app not in apps:
            raise NotFound(f"There is no app {app!r}.", hint=nearest(app, apps) or "Deploy it with `sllm deploy`.")
        names = (name for other, name in self.functions if other == app)
        raise NotFound(f"App {app!r} has no function {function!r}.", hint=nearest(function, names))

    def resolve(self, app: str, name: str, parameters: Mapping[str, Any] | None = None) -> Resolved:
        """What `app/name` calls, where name is `function` or `function.method`.

        Raises NotFound for a name, BadRequest for parameters that the class does not take or a method left out.
        """
        if not parameters:
            known = self._resolved.get((app, name))
            if known is not None:
                return known
        function, _, method = name.partition(".")
        route = self.function(app, function)
        resolved = Resolved(
            route,
            _method(route.spec, method),
            Target(app, function, route.version, check_parameters(route.spec, parameters or {})),
        )
        if not parameters:
            self._resolved[app, name] = resolved
        return resolved

    def successor(self, target: Target) -> Target:
        """The target whose instances serve now what was meant for `target`'s. Raises NotFound once it is deleted."""
        route = self.functions.get((target.app, target.function))
        if route is None:
            raise NotFound(f"{target.app}/{target.function} was deleted.")
        if route.version == target.version:
            return target
        return Target(target.app, target.function, route.version, target.parameters)

    def serves(self, target: Target, method: str) -> bool:
        """Whether the serving version still has the method."""
        route = self.functions.get((target.app, target.function))
        return route is not None and (route.spec.kind == "llm" or route.spec.method(method) is not None)

    def model(self, name: str) -> FunctionRoute:
        """The language model called `app/function`, or by the function's name alone. Raises NotFound."""
        routes = self._models.get(name, [])
        if len(routes) == 1:
            return routes[0]
        if routes:
            several = ", ".join(repr(f"{route.app}/{route.spec.name}") for route in routes)
            raise NotFound(f"The model name {name!r} is ambiguous.", hint=f"Name one of {several}.", param="model")
        raise NotFound(f"The model {name!r} does not exist.", hint=nearest(name, self._models), param="model")

    def served(self, name: str) -> tuple[FunctionRoute, str]:
        """The language model called `name`, and the adapter: `model:adapter` names one. Raises NotFound."""
        model, colon, adapter = name.partition(":")
        route = self.model(model)
        names = [each.name for each in route.spec.adapters]
        if colon and adapter not in names:
            known = [f"{model}:{each}" for each in names]
            raise NotFound(f"The model {name!r} does not exist.", hint=nearest(name, known), param="model")
        return route, adapter

    def models(self) -> list[tuple[str, FunctionRoute]]:
        """Every model under its shortest unambiguous name, and its adapters, sorted."""
        out = []
        for (app, name), route in self.functions.items():
            if route.spec.kind == "llm":
                shortest = name if len(self._models[name]) == 1 else f"{app}/{name}"
                out.append((shortest, route))
                out += [(f"{shortest}:{adapter.name}", route) for adapter in route.spec.adapters]
        return sorted(out, key=lambda item: item[0])


def _method(spec: FunctionSpec, name: str) -> MethodSpec:
    if spec.kind == "llm":
        raise BadRequest(
            f"{spec.name!r} is a language model, not a function.",
            hint="Call it at /v1/chat/completions, /v1/completions or /v1/embeddings.",
        )
    method = spec.method(name)
    if method is None and not name and len(spec.methods) == 1:
        method = spec.methods[0]
    if method is not None:
        return method
    names = [method.name for method in spec.methods]
    if not name:
        listed = ", ".join(repr(f"{spec.name}.{other}") for other in names)
        raise BadRequest(f"{spec.name!r} is a class; which method?", hint=f"Call {listed}.")
    raise NotFound(f"{spec.name!r} has no method {name!r}.", hint=nearest(name, names))


def check_parameters(spec: FunctionSpec, given: Mapping[str, object]) -> str:
    """The canonical text of a class's parameter values, for `Target`. A value equal to its default is left out, so
    that naming a default and leaving it out share their instances, and "" is the function as it is.

    Raises BadRequest naming the parameter."""
    values = bind(spec.parameters, given)
    for parameter in spec.parameters:
        if not parameter.required and values[parameter.name] == convert(parameter, parameter.default):
            del values[parameter.name]
    return canonical(values)
