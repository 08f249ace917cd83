"""`App`: the named set of functions a user registers, and the specs that describe it to the platform."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, dataclass_transform, overload

from sllm._cls import Cls
from sllm._code import (
    CONCURRENT,
    HOOK,
    Code,
    Coro,
    check_name,
    check_not_wrapped,
    parameter,
    place,
)
from sllm._function import Address, Function, StreamFunction, make
from sllm._options import ClsOptions, FunctionOptions, LlmOptions, as_bad_spec, as_checkpoint, number, spec_fields
from sllm_faas.errors import BadSpec
from sllm_faas.modules import public_name
from sllm_faas.spec import AppSpec, CheckpointSpec, FunctionSpec, MethodSpec, RetryPolicy, check_app_name

if TYPE_CHECKING:
    from pathlib import Path

P = ParamSpec("P")
R = TypeVar("R")
Y = TypeVar("Y")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

LLM_METHODS = (MethodSpec("chat", stream=True), MethodSpec("complete", stream=True), MethodSpec("embed"))
LLM_CONCURRENCY = 16
"""Requests one engine batches; more wait in the gateway's queue."""


class FunctionDecorator:
    """`app.function`: bare, or with options. What the code returns decides which calls the result allows."""

    def __init__(self, register: Callable[[Any, dict[str, Any]], Any], options: dict[str, Any]) -> None:
        self._register = register
        self._options = options

    # The overlap that the ignores accept: what returns an iterator or a coroutine also "returns something".
    @overload
    def __call__(self, fn: Callable[P, AsyncIterator[Y]], /) -> StreamFunction[P, Y, AsyncIterator[Y]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, fn: Callable[P, Iterator[Y]], /) -> StreamFunction[P, Y, Iterator[Y]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, fn: Callable[P, Coro[R]], /) -> Function[P, R, Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Function[P, R, R]: ...
    @overload
    def __call__(self, /, **options: Unpack[FunctionOptions]) -> FunctionDecorator: ...
    def __call__(self, fn: Any = None, /, **options: Any) -> Any:
        merged = {**self._options, **options}
        return FunctionDecorator(self._register, merged) if fn is None else self._register(fn, merged)


@dataclass(frozen=True, slots=True)
class Llm:
    """A language model of an app: OpenAI-compatible, called over HTTP with the model name `app/name`."""

    app: str
    name: str

    @property
    def model(self) -> str:
        return f"{self.app}/{self.name}"


class App:
    """A named set of functions. `weight` is its share when apps compete for capacity, relative to the others';
    `max_concurrency` caps the calls of all its functions that run at once (0: no cap), shared out between gateways.

    Raises BadSpec for a name that is not 1-63 lower-case letters, digits and '-'.
    """

    def __init__(self, name: str, *, weight: float = 1.0, max_concurrency: int = 0) -> None:
        if not isinstance(name, str):
            raise BadSpec(f"app name is {name!r}; allowed: text, as in sllm.App('translator').")
        with as_bad_spec():
            check_app_name(name)
        number("weight", weight, float)
        if not 0.01 <= weight <= 1000:
            raise BadSpec(f"weight is {weight!r}; allowed: 0.01 to 1000.")
        self.name = name
        self.weight = float(weight)
        number("max_concurrency", max_concurrency, int)
        if not 0 <= max_concurrency <= 1_000_000:
            raise BadSpec(f"max_concurrency is {max_concurrency!r}; allowed: 0 (no cap) to 1000000.")
        self.max_concurrency = max_concurrency
        self.registered: dict[str, Function[..., Any, Any] | StreamFunction[..., Any, Any] | Cls | Llm] = {}
        self.entrypoints: dict[str, Callable[..., Any]] = {}
        self._specs: dict[str, FunctionSpec] = {}

    def __repr__(self) -> str:
        return f"<sllm.App {self.name}: {', '.join(self.registered) or 'no functions'}>"

    # -- registering ---------------------------------------------------------------------------------------------

    @property
    def function(self) -> FunctionDecorator:
        """Register a function: plain, async, generator or async generator. Bare, or with `FunctionOptions`.

        Raises BadSpec for what cannot work: nested functions, lambdas, two of one name, options out of range.
        """
        return FunctionDecorator(self._function, {})

    @overload
    def cls(self, raw: type[T], /) -> type[T]: ...
    @overload
    def cls(self, /, **options: Unpack[ClsOptions]) -> Callable[[type[T]], type[T]]: ...
    @dataclass_transform(kw_only_default=True, field_specifiers=(parameter,))
    def cls(self, raw: Any = None, /, **options: Any) -> Any:
        """Register a class whose `@sllm.method`s are called on one long-lived object per instance."""
        if raw is not None:
            return self._cls(raw, options)
        return lambda raw: self._cls(raw, options)

    def llm(self, name: str, checkpoint: str | Path | CheckpointSpec, **options: Unpack[LlmOptions]) -> Llm:
        """Serve a language model through the OpenAI-compatible endpoints, without code."""
        self._add(llm_spec(name, checkpoint, **options), handle := Llm(self.name, name))
        return handle

    @overload
    def local_entrypoint(self, fn: F, /) -> F: ...
    @overload
    def local_entrypoint(self, /) -> Callable[[F], F]: ...
    def local_entrypoint(self, fn: Any = None, /) -> Any:
        """What `sllm run file.py` runs here, on the caller's machine; its parameters become options."""
        return self._entrypoint if fn is None else self._entrypoint(fn)

    def _entrypoint(self, fn: Any) -> Any:
        check_not_wrapped(fn, "local_entrypoint")
        code = Code.of(fn, "the local entrypoint")
        if code.stream:
            raise BadSpec(f"local entrypoint {fn.__name__!r} is a generator; allowed: plain or async functions.")
        if fn.__name__ in self.entrypoints:
            raise BadSpec(f"app {self.name!r} has two local entrypoints named {fn.__name__!r}.")
        self.entrypoints[fn.__name__] = fn
        return fn

    def _function(self, fn: Any, options: dict[str, Any]) -> Any:
        check_not_wrapped(fn, "function")
        what = f"function {getattr(fn, '__name__', fn)!r}"
        code = Code.of(fn, what, resumable=options.get("resumable", False))
        if hasattr(fn, HOOK):
            raise BadSpec(f"{what} is marked @sllm.{getattr(fn, HOOK)}; allowed only on methods of an @app.cls class.")
        module, qualname = place(fn, what)
        if "." in qualname:
            raise BadSpec(f"{what} is a method ({qualname}); use @app.cls on the class and @sllm.method on the method.")
        name = check_name(options.get("name", fn.__name__), what)
        fields = spec_fields(what, options, FunctionOptions)
        with as_bad_spec(f"{what}: "):
            spec = FunctionSpec(
                name,
                "function",
                module,
                qualname,
                methods=(code.spec(name),),
                concurrency=getattr(fn, CONCURRENT, code.batching.max_batch_size if code.batching else 1),
                **fields,
            )
        handle = make(Address(self.name, name), code, spec.retries)
        self._add(spec, handle)
        return handle

    def _cls(self, raw: Any, options: dict[str, Any]) -> Any:
        check_not_wrapped(raw, "cls")
        if not isinstance(raw, type):
            raise BadSpec(f"@app.cls is given {getattr(raw, '__name__', raw)!r}; allowed: classes.")
        what = f"class {raw.__name__!r}"
        module, qualname = place(raw, what)
        name = check_name(options.get("name", raw.__name__), what)
        fields = spec_fields(what, options, ClsOptions)
        handle = Cls(self.name, raw, fields.get("retries", RetryPolicy()), name)
        batch = max((m.code.batching.max_batch_size for m in handle.methods.values() if m.code.batching), default=1)
        with as_bad_spec(f"{what}: "):
            spec = FunctionSpec(
                name,
                "class",
                module,
                qualname,
                methods=tuple(method.code.spec(key) for key, method in handle.methods.items()),
                parameters=handle.parameters,
                concurrency=getattr(raw, CONCURRENT, batch),
                **fields,
            )
        self._add(spec, handle)
        return handle

    def _add(self, spec: FunctionSpec, handle: Any) -> None:
        if spec.name in self._specs:
            first = self._specs[spec.name]
            raise BadSpec(
                f"app {self.name!r} has two functions named {spec.name!r} ({first.qualname or first.kind} and "
                f"{spec.qualname or spec.kind}); allowed: one.",
                hint="Give one of them another name: @app.function(name=…).",
            )
        self._specs[spec.name] = spec
        self.registered[spec.name] = handle

    # -- describing ------------------------------------------------------------------------------------------------

    @property
    def functions(self) -> tuple[FunctionSpec, ...]:
        """The specs as registered, in order. Modules are named as a container imports them."""
        return tuple(replace(spec, module=public_name(spec.module)) for spec in self._specs.values())

    def spec(self, bundle: str = "", libs: tuple[str, ...] = ()) -> AppSpec:
        """One deployment of the app. `bundle` is the digest of its source, `libs` what that imports. BadSpec."""
        functions = tuple(replace(spec, libs=libs) if spec.kind != "llm" else spec for spec in self.functions)
        with as_bad_spec():
            return AppSpec(self.name, functions, bundle, self.weight, self.max_concurrency)


def llm_spec(name: str, checkpoint: str | Path | CheckpointSpec, **options: Any) -> FunctionSpec:
    """The spec of a language model, for `app.llm` and `sllm deploy --model`. Raises BadSpec."""
    what = f"llm {name!r}"
    check_name(name, what)
    fields = spec_fields(what, {"concurrency": LLM_CONCURRENCY, **options}, LlmOptions)
    with as_bad_spec(f"{what}: "):
        return FunctionSpec(name, "llm", methods=LLM_METHODS, checkpoint=as_checkpoint(checkpoint), **fields)
