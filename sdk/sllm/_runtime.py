"""What a runner needs of the user's code, without knowing decorators: find, make, call.

found = resolve(module, qualname)          imports the module (it must be on sys.path)
obj = found.instantiate(parameters)        a class: the object, hooks not yet run; a function: None
for hook in found.enter: hook(obj)         bound by passing obj; may be a coroutine function
code = found.method(name, obj)             Code(raw, stream, is_async, batching), bound to obj
bind_arguments(code.raw, args, kwargs)     BadRequest where the call does not fit the signature
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sllm._calls import cancel_calls
from sllm._cls import Cls
from sllm._code import Code
from sllm._context import Cancelled, Invocation, serving
from sllm._function import Function, StreamFunction
from sllm_faas.errors import BadRequest, ImportFailed, NotFound

__all__ = ["Cancelled", "Code", "Found", "Invocation", "bind_arguments", "cancel_calls", "resolve", "serving"]


@dataclass(frozen=True, slots=True)
class Found:
    """The decorated object. Exactly one of `raw` (a function's code) and `raw_class` is set."""

    raw: Callable[..., Any] | None
    raw_class: type | None
    enter: tuple[Callable[[Any], Any], ...]
    exit: tuple[Callable[[Any], Any], ...]
    codes: dict[str, Code]
    cls: Cls | None = None

    def instantiate(self, parameters: Mapping[str, object] | str = "") -> Any:
        """The object to serve, from parameter values or their canonical JSON. Raises BadRequest for wrong values
        and whatever the class's own `__init__` raises."""
        if self.cls is None:
            return None
        values = (json.loads(parameters) if parameters else {}) if isinstance(parameters, str) else parameters
        return self.cls.instantiate(values)

    def method(self, name: str = "", obj: Any = None) -> Code:
        """The code of a method, bound to `obj` if given; a function's only one whatever the name. NotFound."""
        if self.cls is None:
            return next(iter(self.codes.values()))
        code = self.codes.get(name)
        if code is None:
            raise NotFound(f"class {self.cls.name!r} has no method {name!r}; allowed: {', '.join(self.codes)}.")
        return code if obj is None else code.bound(obj)


def resolve(module: str, qualname: str) -> Found:
    """Import `module` and find the decorated function or class. Raises ImportFailed when it is not there, and
    whatever the import of the user's module raises."""
    loaded = importlib.import_module(module)
    found: Any = loaded
    for part in qualname.split("."):
        found = inspect.getattr_static(found, part, None)
    if inspect.isfunction(found) or inspect.isclass(found):  # decorated by hand: g = app.function(f)
        handles = (value for value in vars(loaded).values() if isinstance(value, Function | StreamFunction | Cls))
        found = next((one for one in handles if (one.raw_class if isinstance(one, Cls) else one.raw) is found), found)
    if isinstance(found, Cls):
        codes = {name: method.code for name, method in found.methods.items()}
        return Found(None, found.raw_class, found.enter_hooks, found.exit_hooks, codes, found)
    if isinstance(found, Function | StreamFunction) and found.code is not None:
        return Found(found.raw, None, (), (), {found.name: found.code})
    what = "is not there" if found is None else f"is a {type(found).__name__}, not a decorated function or class"
    raise ImportFailed(
        f"{module}:{qualname} {what}.",
        hint="It must be at the module's top level and decorated with @app.function or @app.cls.",
    )


def bind_arguments(raw: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises BadRequest naming the argument that is missing or unknown, before any of the user's code runs."""
    try:
        signature = inspect.signature(raw)
    except (TypeError, ValueError):  # a callable that does not tell
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(raw, "__name__", "function")
        raise BadRequest(f"{name}{signature} was called wrongly: {error}.") from None
