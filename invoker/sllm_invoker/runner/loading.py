"""From a spec to the user's objects: import the module, find the function or class, make its object.

    load(spec, root)         imports and looks up; this is all that an import check does
    build(...)               parameters → object, hooks → callables, methods → `Method`s
    start_error(error)       what to report when either, or a hook, failed

Errors are for the developer: ImportFailed names what is missing and what to do, and carries the user's own
traceback, without the platform's frames. Nothing is called here but the class's constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm._runtime import Found, Invocation, resolve

from sllm_faas.errors import ErrorInfo, ImportFailed, SllmError, StartFailed, to_info
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.exceptions import format_traceback
from sllm_faas.wire.payload import types_of
from sllm_invoker.runner.method import Method

_HINT_ENVIRONMENT = "Functions run in the platform's environment: install it there ({pip}), then deploy again."
_HINT_BUNDLE = "Is it part of the bundle? See the ignore file; files outside of the app's directory are left out."


@dataclass(frozen=True, slots=True)
class User:
    """What is served: methods by name, hooks in order, all bound to the user's object where there is one."""

    methods: dict[str, Method]
    enter: tuple[Callable[[], Any], ...] = ()
    exit: tuple[Callable[[], Any], ...] = ()

    @property
    def uses_loop(self) -> bool:
        """Some of it is asynchronous."""
        hooks = any(inspect.iscoroutinefunction(hook) for hook in (*self.enter, *self.exit))
        return hooks or any(method.spec.is_async for method in self.methods.values())


def load(spec: FunctionSpec, root: str) -> Found:
    """The registered object that `spec` names, its module imported. `root` is the source directory.

    Raises ImportFailed.
    """
    try:
        found = resolve(spec.module, spec.qualname)
    except ImportFailed:
        raise
    except ModuleNotFoundError as error:
        raise _missing(error, spec, root) from error
    except BaseException as error:  # a module may do anything, exit included
        raise ImportFailed(
            f"module {spec.module!r} of function {spec.name!r} failed to import: {_line(error)}.",
            hint="See the traceback; it must import without the things that only exist on your machine.",
            traceback=_traceback(error, root),
        ) from error
    missing = [method.name for method in spec.methods if spec.kind == "class" and method.name not in found.codes]
    if missing or (found.cls is not None) != (spec.kind == "class"):
        raise ImportFailed(
            f"{spec.module}:{spec.qualname} is not the {spec.kind} that was deployed"
            + (f": it has no method {missing[0]!r}." if missing else "."),
            hint="Deploy the app again.",
        )
    return found


def build(found: Found, spec: FunctionSpec, target: Target, root: str, instance: str = "", node: str = "") -> User:
    """Make the user's object, hooks not yet run. Raises whatever its constructor raises."""
    place = Invocation("", target.app, target.function, "", target.version, instance, node)
    types = types_of(Path(root))
    obj = found.instantiate(target.parameters)
    methods = {
        method.name: Method(method, found.method(method.name, obj).raw, types, root, place) for method in spec.methods
    }
    return User(
        methods,
        tuple(hook.__get__(obj) for hook in found.enter),
        tuple(hook.__get__(obj) for hook in found.exit),
    )


def start_error(error: BaseException, root: str) -> ErrorInfo:
    """Why an instance did not start: an error of the platform as it is, one of the user's constructor or hooks
    as StartFailed with its traceback."""
    if isinstance(error, SllmError):
        return to_info(error)
    return to_info(
        StartFailed(
            f"the instance did not start: {_line(error)}.",
            hint="See the traceback: the constructor or an enter hook raised it.",
            traceback=_traceback(error, root),
        )
    )


def _traceback(error: BaseException, root: str) -> str:
    """The user's part of the traceback. A module that does not parse has no frame of its own."""
    tb = error.__traceback__
    while tb is not None and not tb.tb_frame.f_code.co_filename.startswith(root):
        tb = tb.tb_next
    bare = tb is None and isinstance(error, SyntaxError)
    return format_traceback(error.with_traceback(None) if bare else error, root)


def _missing(error: ModuleNotFoundError, spec: FunctionSpec, root: str) -> ImportFailed:
    name = error.name or ""
    top = name.partition(".")[0]
    own = top == spec.module.partition(".")[0] or (Path(root) / top).exists()
    hint = _HINT_BUNDLE if own else _HINT_ENVIRONMENT.format(pip=f"pip install {top}")
    return ImportFailed(
        f"function {spec.name!r} needs module {name!r}, which is not there.",
        hint=hint,
        param=name,
        traceback=_traceback(error, root),
    )


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
