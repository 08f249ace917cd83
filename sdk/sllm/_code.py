"""The user's callables as the platform sees them, and the decorators that only mark them.

`concurrent`, `batched`, `enter`, `exit` and `parameter` change nothing about the code: they note something on the
object that `@app.function` or `@app.cls` above them reads. That is why they must stand below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar, cast, overload

from sllm._options import as_bad_spec, number
from sllm_faas.errors import BadSpec
from sllm_faas.modules import public_name
from sllm_faas.spec import Batching, MethodSpec, ParameterSpec, check_function_name

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")
S = TypeVar("S")
A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")
Coro = Coroutine[Any, Any, R]

CONCURRENT = "__sllm_concurrent__"
BATCHED = "__sllm_batched__"
HOOK = "__sllm_hook__"
_NOT_RESUMABLE = "What returns one value is tried again with retries=…"


@dataclass(frozen=True, slots=True)
class Code:
    """A callable and how it must be called. With `batching`, `raw` takes a list per argument and returns a list."""

    raw: Callable[..., Any]
    stream: bool
    is_async: bool
    batching: Batching | None = None
    resumable: bool = False

    @classmethod
    def of(cls, raw: object, what: str, *, resumable: bool = False) -> Code:
        """Raises BadSpec when `raw` is not a function the platform can find again in its module."""
        if not inspect.isfunction(raw):
            refuse_object(raw, what)
        if raw.__name__ == "<lambda>":
            raise BadSpec(f"{what} is a lambda; allowed: functions with a name, defined with `def`.")
        async_stream = inspect.isasyncgenfunction(raw)
        code = cls(
            raw,
            stream=async_stream or inspect.isgeneratorfunction(raw),
            is_async=async_stream or inspect.iscoroutinefunction(raw),
            batching=getattr(raw, BATCHED, None),
            resumable=resumable,
        )
        if not isinstance(resumable, bool):
            raise BadSpec(f"{what} has resumable={resumable!r}; allowed: True or False.")
        if resumable and not code.stream:
            raise BadSpec(f"{what} is resumable but no generator; allowed: only generators.", hint=_NOT_RESUMABLE)
        if code.stream and code.batching:
            raise BadSpec(f"{what} is a generator and batched; allowed: one of the two.")
        return code

    def bound(self, obj: object) -> Code:
        """The same code as a method of `obj`."""
        return replace(self, raw=self.raw.__get__(obj))

    def spec(self, name: str) -> MethodSpec:
        with as_bad_spec():
            return MethodSpec(name, self.stream, self.is_async, self.batching, self.resumable)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The code, here and now, with the semantics of a remote call: a batched function gets a batch of one."""
        if self.batching is None:
            return self.raw(*args, **kwargs)
        batch = [[arg] for arg in args], {name: [value] for name, value in kwargs.items()}
        if self.is_async:
            return self._first_async(*batch)
        return self.raw(*batch[0], **batch[1])[0]

    async def _first_async(self, args: list[list[Any]], kwargs: dict[str, list[Any]]) -> Any:
        return (await self.raw(*args, **kwargs))[0]


def refuse_object(raw: object, what: str) -> NoReturn:
    if isinstance(raw, staticmethod | classmethod | property):
        raise BadSpec(f"{what} is a {type(raw).__name__}; allowed: plain functions and methods.")
    if inspect.isclass(raw):
        raise BadSpec(f"{what} is the class {raw.__name__}; use @app.cls for classes.")
    raise BadSpec(f"{what} is {raw!r}; allowed: functions defined with `def` or `async def` at a module's top level.")


def place(raw: Any, what: str) -> tuple[str, str]:
    """(module, qualname) under which a container finds `raw`. Raises BadSpec for what is nested."""
    module, qualname = public_name(raw.__module__), raw.__qualname__
    if "<locals>" in qualname:
        raise BadSpec(
            f"{what} ({qualname}) is defined inside a function; a container could not find it. "
            "Allowed: functions and classes at a module's top level."
        )
    if module == "__main__":
        raise BadSpec(f"{what} is defined in an interactive session; allowed: code in a file.")
    return module, qualname


def check_not_wrapped(target: object, decorator: str) -> None:
    """Explains the order when a marking decorator stands above one that has already read the marks."""
    if getattr(target, "__sllm_registered__", False):
        name = getattr(target, "name", "")
        raise BadSpec(
            f"@sllm.{decorator} stands above @app.function, @app.cls or @sllm.method of {name!r}; put it below them.",
            hint=f"The function comes last: @app.function, then @sllm.{decorator}(…), then def.",
        )


def concurrent(*, max_inputs: int) -> Callable[[C], C]:
    """Let one instance run up to `max_inputs` invocations at once. Asynchronous code shares its loop; synchronous
    code runs in that many threads. Stands below `@app.function` or `@app.cls`."""
    number("max_inputs", max_inputs, int)
    if not 1 <= max_inputs <= 10_000:
        raise BadSpec(f"max_inputs is {max_inputs}; allowed: 1 to 10000.")

    def mark(target: C) -> C:
        check_not_wrapped(target, "concurrent")
        setattr(target, CONCURRENT, max_inputs)
        return target

    return mark


class _Batched:
    """What `batched(…)` returns. The overloads turn a function over lists into the function its callers see."""

    def __init__(self, batching: Batching) -> None:
        self.batching = batching

    @overload
    def __call__(self, fn: Callable[[list[A]], Coro[list[R]]], /) -> Callable[[A], Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[[list[A]], list[R]], /) -> Callable[[A], R]: ...
    @overload
    def __call__(self, fn: Callable[[list[A], list[B]], Coro[list[R]]], /) -> Callable[[A, B], Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[[list[A], list[B]], list[R]], /) -> Callable[[A, B], R]: ...
    @overload
    def __call__(self, fn: Callable[[S, list[A]], Coro[list[R]]], /) -> Callable[[S, A], Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[[S, list[A]], list[R]], /) -> Callable[[S, A], R]: ...
    @overload
    def __call__(self, fn: Callable[[S, list[A], list[B]], Coro[list[R]]], /) -> Callable[[S, A, B], Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[[S, list[A], list[B]], list[R]], /) -> Callable[[S, A, B], R]: ...
    def __call__(self, fn: Any, /) -> Any:
        check_not_wrapped(fn, "batched")
        if not inspect.isfunction(fn):
            refuse_object(fn, "the argument of @sllm.batched")
        setattr(fn, BATCHED, self.batching)
        return fn


def batched(*, max_batch_size: int, wait_ms: float = 10.0) -> _Batched:
    """Gather calls into one: the function takes a list per argument and returns a list of the same length, its
    callers pass and get single values. At most `max_batch_size` calls, the first waiting at most `wait_ms`."""
    number("max_batch_size", max_batch_size, int)
    number("wait_ms", wait_ms, float)
    with as_bad_spec():
        return _Batched(Batching(max_batch_size, float(wait_ms)))


def _hook(kind: Literal["enter", "exit"], fn: F) -> F:
    if not inspect.isfunction(fn):
        raise BadSpec(f"@sllm.{kind} is given {fn!r}; allowed: methods.")
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise BadSpec(f"@sllm.{kind} method {fn.__name__!r} is a generator; allowed: plain or async methods.")
    setattr(fn, HOOK, kind)
    return fn


@overload
def enter(fn: F, /) -> F: ...
@overload
def enter() -> Callable[[F], F]: ...
def enter(fn: Any = None, /) -> Any:
    """A method to run once when an instance starts, before its first invocation. May be async."""
    return _hook("enter", fn) if fn is not None else lambda fn: _hook("enter", fn)


@overload
def exit(fn: F, /) -> F: ...
@overload
def exit() -> Callable[[F], F]: ...
def exit(fn: Any = None, /) -> Any:
    """A method to run once when an instance ends in an orderly way. May be async."""
    return _hook("exit", fn) if fn is not None else lambda fn: _hook("exit", fn)


@dataclass(frozen=True, slots=True)
class Parameter:
    """What `parameter()` leaves in a class body until `@app.cls` reads it."""

    default: Any


_REQUIRED: Any = object()
_TYPES: dict[Any, str] = {str: "str", int: "int", float: "float", bool: "bool"}


def parameter(*, default: Any = _REQUIRED) -> Any:
    """A constructor parameter of an `@app.cls` class: `size: str = sllm.parameter(default="small")`.

    The annotation must be str, int, float or bool. Instances with different values never share a container.
    """
    return Parameter(default)


def parameter_spec(owner: str, name: str, annotation: object, mark: Parameter) -> ParameterSpec:
    if isinstance(annotation, str):
        annotation = {kind.__name__: kind for kind in _TYPES}.get(annotation, annotation)
    if annotation not in _TYPES:
        shown = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))
        raise BadSpec(
            f"parameter {name!r} of {owner} is annotated {shown!r}; allowed: str, int, float, bool.",
            hint=f"Write {name}: str = sllm.parameter(…).",
        )
    kind = cast(Literal["str", "int", "float", "bool"], _TYPES[annotation])
    if mark.default is _REQUIRED:
        with as_bad_spec():
            return ParameterSpec(name, kind)
    allowed = (int, float) if kind == "float" else (annotation,)
    if type(mark.default) not in allowed:
        raise BadSpec(f"parameter {name!r} of {owner} has the default {mark.default!r}; allowed: a {kind}.")
    with as_bad_spec():
        return ParameterSpec(
            name, kind, required=False, default=float(mark.default) if kind == "float" else mark.default
        )


def check_name(name: object, what: str) -> str:
    if not isinstance(name, str):
        raise BadSpec(f"name of {what} is {name!r}; allowed: text.")
    with as_bad_spec():
        return check_function_name(name)
