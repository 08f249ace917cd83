"""Classes: `@app.cls` with `enter`, `exit`, `method` and `parameter`.

Two lives of one class. For a caller `Greeter(language="de").greet.remote("you")` makes no object, only the name
of a target: class, parameter values, method. In a container `ResolvedClass.instantiate` makes the one object.
For a type checker the class stays what was written.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, dataclass_transform, overload

from sllm._code import HOOK, Code, Coro, Parameter, check_not_wrapped, parameter, parameter_spec
from sllm._function import Address, AnyFunction, Function, StreamFunction, make
from sllm_faas.errors import BadRequest, BadSpec
from sllm_faas.parameters import Value, bind
from sllm_faas.spec import FunctionSpec, ParameterSpec, RetryPolicy, canonical

P = ParamSpec("P")
R = TypeVar("R")
Y = TypeVar("Y")

OWNER = "__sllm_cls__"
VALUES = "__sllm_parameters__"


@dataclass_transform(kw_only_default=True, field_specifiers=(parameter,))
class Parameters:
    """Optional base of `@app.cls` classes that have parameters. It adds nothing at run time: it tells type
    checkers that apply no class decorators (mypy) that the constructor takes the `parameter()`s by name."""


class Method:
    """What `@sllm.method` leaves in the class; on an object it gives the function to call."""

    __sllm_registered__ = True

    def __init__(self, code: Code) -> None:
        self.code = code
        self.name = code.raw.__name__
        self.__doc__ = code.raw.__doc__

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        if obj is None:
            return self
        code = self.code.bound(obj)
        cls: Cls | None = getattr(type(obj), OWNER, None)
        if cls is None:
            raise BadSpec(f"class {type(obj).__name__} has an @sllm.method but is not decorated with @app.cls.")
        values = obj.__dict__.get(VALUES, {})
        return make(Address(cls.app, cls.name, self.name, canonical(values)), code, cls.retries)


class MethodDecorator:
    """`sllm.method`, bare or with options. What the code returns decides which calls are allowed."""

    def __init__(self, *, resumable: bool = False) -> None:
        self._resumable = resumable

    # The overlap that the ignores accept: what returns an iterator or a coroutine also "returns something".
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, fn: Callable[Concatenate[Any, P], AsyncIterator[Y]], /
    ) -> StreamFunction[P, Y, AsyncIterator[Y]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, fn: Callable[Concatenate[Any, P], Iterator[Y]], /
    ) -> StreamFunction[P, Y, Iterator[Y]]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], Coro[R]], /) -> Function[P, R, Coro[R]]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], R], /) -> Function[P, R, R]: ...
    @overload
    def __call__(self, /, *, resumable: bool = False) -> MethodDecorator: ...
    def __call__(self, fn: Any = None, /, *, resumable: bool = False) -> Any:
        """A method that can be called remotely. Inside the class another one is called `self.other.local(…)`.

        `resumable`: a generator that goes on elsewhere from `sllm.resumed()` when its instance is lost."""
        if fn is None:
            return MethodDecorator(resumable=resumable)
        check_not_wrapped(fn, "method")
        what = f"the argument of @sllm.method ({getattr(fn, '__name__', fn)})"
        return Method(Code.of(fn, what, resumable=self._resumable))


method = MethodDecorator()


class Cls:
    """An `@app.cls` class. Calling it with parameter values gives the handle to call methods on."""

    __sllm_registered__ = True

    def __init__(self, app: str, raw: type, retries: RetryPolicy, name: str) -> None:
        self.app = app
        self.name = name
        self.raw_class = raw
        self.retries = retries
        self.methods = _collect_methods(raw)
        self.parameters = _collect_parameters(raw)
        self.enter_hooks = _collect_hooks(raw, "enter")
        self.exit_hooks = _collect_hooks(raw, "exit")
        self.spec: FunctionSpec | None = None
        self.__doc__ = raw.__doc__
        _check_init(raw)
        setattr(raw, OWNER, self)

    def __call__(self, *args: object, **values: object) -> Obj:
        if args:
            raise BadRequest(f"{self.name} takes its parameters by name; allowed: {self._signature()}.")
        return Obj(self, bind(self.parameters, values))

    def instantiate(self, values: Mapping[str, object]) -> Any:
        """The object a container serves: parameters set, `__init__` run, hooks not yet."""
        bound = bind(self.parameters, values)
        obj: Any = object.__new__(self.raw_class)
        for name, value in bound.items():
            setattr(obj, name, value)
        obj.__dict__[VALUES] = bound
        obj.__init__()
        return obj

    def _signature(self) -> str:
        return f"{self.name}({', '.join(f'{spec.name}=…' for spec in self.parameters)})"

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return (self.raw_class,)  # `class B(A)` extends the undecorated class

    def __getattr__(self, name: str) -> NoReturn:
        if name in self.__dict__.get("methods", {}):
            raise AttributeError(f"{name!r} is called on an object: {self._signature()}.{name}.remote(…)")
        raise AttributeError(f"class {self.__dict__.get('name')!r} has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<sllm.Cls {self.app}/{self.name}>"

    @staticmethod
    def from_name(app: str, name: str) -> RemoteCls:
        """A deployed class for callers without its source. Names and values are checked by the server."""
        return RemoteCls(app, name)


class Obj:
    """A class with parameter values: `obj.method.remote(…)`. No object exists here unless `.local` is used."""

    def __init__(self, cls: Cls, values: dict[str, Value]) -> None:
        self._cls = cls
        self._values = values
        self._object: Any = None

    def _local_object(self) -> Any:
        """One local object, its synchronous enter hooks run on first use."""
        if self._object is None:
            obj = self._cls.instantiate(self._values)
            for hook in self._cls.enter_hooks:
                if inspect.iscoroutinefunction(hook):
                    raise BadRequest(
                        f"{self._cls.name} has an async enter hook, which .local does not run; use sllm.testing."
                    )
                hook(obj)
            self._object = obj
        return self._object

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cls, values = self._cls, self._values
        if name in values:
            return values[name]
        found = cls.methods.get(name)
        if found is None:
            allowed = ", ".join(cls.methods)
            raise AttributeError(f"class {cls.name!r} has no remote method {name!r}; allowed: {allowed}")
        code = found.code

        def local(*args: Any, **kwargs: Any) -> Any:
            return code.bound(self._local_object()).call(*args, **kwargs)

        return make(Address(cls.app, cls.name, name, canonical(values)), code, cls.retries, local)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"{self._cls.app}/{self._cls.name}({values})"


class RemoteCls:
    """A deployed class known by name."""

    def __init__(self, app: str, name: str) -> None:
        self._app, self._name = app, name

    def __call__(self, **values: Value) -> RemoteObj:
        return RemoteObj(self._app, self._name, canonical(values))


class RemoteObj:
    """A deployed class known by name, with parameter values."""

    def __init__(self, app: str, name: str, parameters: str) -> None:
        self._app, self._name, self._parameters = app, name, parameters

    def __getattr__(self, method: str) -> AnyFunction:
        if method.startswith("_"):
            raise AttributeError(method)
        return AnyFunction(Address(self._app, self._name, method, self._parameters), None, RetryPolicy())


# -- reading a class -------------------------------------------------------------------------------------------


def _attributes(raw: type) -> dict[str, Any]:
    """Attributes as seen from the class, bases first, in order of definition."""
    found: dict[str, Any] = {}
    for base in reversed(raw.__mro__):
        found.update(vars(base))
    return found


def _collect_methods(raw: type) -> dict[str, Method]:
    methods = {name: value for name, value in _attributes(raw).items() if isinstance(value, Method)}
    if not methods:
        raise BadSpec(f"class {raw.__name__} has no remote method; decorate at least one with @sllm.method.")
    return methods


def _collect_hooks(raw: type, kind: str) -> tuple[Callable[..., Any], ...]:
    """Hooks in order: base classes first, then as written; an overridden one counts once, as overridden."""
    return tuple(value for value in _attributes(raw).values() if getattr(value, HOOK, None) == kind)


def _collect_parameters(raw: type) -> tuple[ParameterSpec, ...]:
    annotations: dict[str, Any] = {}
    for base in reversed(raw.__mro__):
        annotations.update(inspect.get_annotations(base) if base is not object else {})
    marks = {name: value for name, value in _attributes(raw).items() if isinstance(value, Parameter)}
    return tuple(parameter_spec(raw.__name__, name, annotations.get(name), mark) for name, mark in marks.items())


def _check_init(raw: type) -> None:
    init: Any = inspect.getattr_static(raw, "__init__")
    if init is inspect.getattr_static(object, "__init__"):
        return
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = list(inspect.signature(init).parameters.values())[1:]
    required = [one.name for one in taken if one.default is one.empty and one.kind not in optional]
    if required:
        raise BadSpec(
            f"class {raw.__name__} has an __init__ that needs {', '.join(required)}; allowed: no required arguments.",
            hint=f"Declare them in the class body: {required[0]}: str = sllm.parameter().",
        )
