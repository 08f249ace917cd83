"""Functions as their callers see them: `.remote`, `.stream`, `.map`, `.starmap`, `.local`, `.with_options`.

The types say what the code says, without generated stubs: `P` are the parameters, `R` the result (awaited, if
the code is async), `Y` what a generator yields, `L` what a local call gives. A `Function` has no `.stream` and a
`StreamFunction` no `.remote`, so a type checker refuses the wrong one; at run time the message says which.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, ParamSpec, Self, TypeVar, overload

from sllm import _backend
from sllm._code import Code
from sllm._context import current_invocation
from sllm._options import as_retries, as_timeouts
from sllm_faas.errors import BadRequest
from sllm_faas.spec import Phase, RetryPolicy, Timeouts

if TYPE_CHECKING:
    from concurrent.futures import Future

P = ParamSpec("P")
R = TypeVar("R")
Y = TypeVar("Y")
L = TypeVar("L")

_PHASES: tuple[Phase, ...] = ("queue", "startup", "first_output", "idle", "execution")


@dataclass(frozen=True, slots=True)
class Address:
    """Whom a call is for. `parameters` is the canonical JSON of a class's parameter values."""

    app: str
    function: str
    method: str = ""
    parameters: str = ""


class Remote(Generic[P, R]):
    """`f.remote(…)` blocks for the result; `await f.remote.aio(…)` does not block the event loop."""

    def __init__(self, function: _Callable[P, Any]) -> None:
        self._function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        from sllm import _calls

        result: R = _decode(_calls.wait(self._function._begin(args, kwargs)))
        return result

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = _decode(await _backend.wait_async(self._function._begin(args, kwargs)))
        return result


class Stream(Generic[P, Y]):
    """`for y in f.stream(…)`; `async for y in f.stream.aio(…)`. The call starts with the first item asked for;
    closing the iterator early cancels it."""

    def __init__(self, function: _Callable[P, Any]) -> None:
        self._function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Generator[Y, None, None]:
        from sllm import _calls

        return _calls.stream_sync(self._function._outputs(args, kwargs), _decode)

    def aio(self, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Y, None]:
        from sllm import _calls

        return _calls.stream_async(self._function._outputs(args, kwargs), _decode)


class _MapBase(Generic[R]):
    def __init__(self, function: _Callable[..., Any]) -> None:
        self._function = function

    def _sync(self, inputs: Iterator[Any], kwargs: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
        from sllm import _calls

        _check_window(options["max_in_flight"])
        results = _calls.map_sync(lambda args: self._function._begin(tuple(args), kwargs or {}), inputs, **options)
        return _decoded(results)

    def _async(self, inputs: AsyncIterator[Any], kwargs: dict[str, Any] | None, **options: Any) -> AsyncIterator[Any]:
        from sllm import _calls

        _check_window(options["max_in_flight"])
        results = _calls.map_async(lambda args: self._function._begin(tuple(args), kwargs or {}), inputs, **options)
        return _decoded_async(results)


class Map(_MapBase[R]):
    """`f.map(xs)`, or `f.map(xs, ys)` for two arguments, like the builtin; `kwargs` go to every call.

    At most `max_in_flight` inputs are taken beyond the results already given out, so an endless input is fine.
    `order_outputs=False` gives results as they finish; `return_exceptions=True` gives a failed call's exception
    in its place, else the first failure is raised and what is still running is cancelled.
    """

    @overload
    def __call__(
        self,
        *inputs: Iterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[False] = False,
        max_in_flight: int = 32,
    ) -> Iterator[R]: ...
    @overload
    def __call__(
        self,
        *inputs: Iterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[True],
        max_in_flight: int = 32,
    ) -> Iterator[R | Exception]: ...
    def __call__(
        self,
        *inputs: Iterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        max_in_flight: int = 32,
    ) -> Iterator[Any]:
        return self._sync(
            zip(*inputs, strict=False),
            kwargs,
            ordered=order_outputs,
            return_exceptions=return_exceptions,
            max_in_flight=max_in_flight,
        )

    @overload
    def aio(
        self,
        *inputs: Iterable[Any] | AsyncIterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[False] = False,
        max_in_flight: int = 32,
    ) -> AsyncIterator[R]: ...
    @overload
    def aio(
        self,
        *inputs: Iterable[Any] | AsyncIterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[True],
        max_in_flight: int = 32,
    ) -> AsyncIterator[R | Exception]: ...
    def aio(
        self,
        *inputs: Iterable[Any] | AsyncIterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        max_in_flight: int = 32,
    ) -> AsyncIterator[Any]:
        return self._async(
            _zip_async(inputs),
            kwargs,
            ordered=order_outputs,
            return_exceptions=return_exceptions,
            max_in_flight=max_in_flight,
        )


class Starmap(_MapBase[R]):
    """`f.starmap([(1, 2), (3, 4)])`: each input holds the positional arguments of one call. Otherwise like `map`."""

    @overload
    def __call__(
        self,
        inputs: Iterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[False] = False,
        max_in_flight: int = 32,
    ) -> Iterator[R]: ...
    @overload
    def __call__(
        self,
        inputs: Iterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[True],
        max_in_flight: int = 32,
    ) -> Iterator[R | Exception]: ...
    def __call__(
        self,
        inputs: Iterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        max_in_flight: int = 32,
    ) -> Iterator[Any]:
        return self._sync(
            iter(inputs),
            kwargs,
            ordered=order_outputs,
            return_exceptions=return_exceptions,
            max_in_flight=max_in_flight,
        )

    @overload
    def aio(
        self,
        inputs: Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[False] = False,
        max_in_flight: int = 32,
    ) -> AsyncIterator[R]: ...
    @overload
    def aio(
        self,
        inputs: Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: Literal[True],
        max_in_flight: int = 32,
    ) -> AsyncIterator[R | Exception]: ...
    def aio(
        self,
        inputs: Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        max_in_flight: int = 32,
    ) -> AsyncIterator[Any]:
        return self._async(
            _as_async(inputs),
            kwargs,
            ordered=order_outputs,
            return_exceptions=return_exceptions,
            max_in_flight=max_in_flight,
        )


class _Callable(Generic[P, L]):
    """What a plain function and a generator share."""

    __sllm_registered__ = True
    _elsewhere: dict[str, str] = {}  # noqa: RUF012 - a constant
    """Attributes this kind of function lacks -> what to write instead."""

    def __init__(
        self, address: Address, code: Code | None, retries: RetryPolicy, local: Callable[..., Any] | None = None
    ) -> None:
        self._address = address
        self._code = code
        self._retries = retries
        self._retry_lost = False
        self._limits: tuple[tuple[Phase, float], ...] = ()
        self._local = local if local is not None or code is None else code.call
        self.__doc__ = code.raw.__doc__ if code else None

    @property
    def name(self) -> str:
        return self._address.method or self._address.function

    @property
    def raw(self) -> Callable[..., Any]:
        """The undecorated code. Raises BadRequest for a function known by name only."""
        if self._code is None:
            raise BadRequest(f"the source of {self!r} is not here; allowed: remote calls.")
        return self._code.raw

    @property
    def code(self) -> Code | None:
        return self._code

    def local(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the code here, in this process, without the platform."""
        if self._local is None:
            raise BadRequest(f"the source of {self!r} is not here; allowed: remote calls.")
        result: L = self._local(*args, **kwargs)
        return result

    def with_options(
        self, *, timeout: float | Timeouts | None = None, retries: int | RetryPolicy | None = None
    ) -> Self:
        """The same function with other limits for calls made through it. Limits can only be lowered: the
        function's own hold too."""
        changed = copy.copy(self)
        if isinstance(timeout, Timeouts):
            limits = ((phase, getattr(timeout, phase)) for phase in _PHASES)
            changed._limits = tuple((phase, limit) for phase, limit in limits if limit is not None)
        elif timeout is not None:
            changed._limits = (("execution", as_timeouts(timeout).execution or 0.0),)
        if retries is not None:
            changed._retries, changed._retry_lost = as_retries(retries), True
        return changed

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _backend.Call:
        from sllm_faas.wire.payload import encode_call

        invocation = current_invocation()
        return _backend.Call(
            self._address.app,
            self._address.function,
            encode_call(args, kwargs),
            self._address.method,
            self._address.parameters,
            self._limits,
            invocation.id if invocation else "",
        )

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[bytes]:
        from sllm import _calls

        retrying = _calls.Retrying(self._retries, self._retry_lost)
        return _calls.start(_calls.call(_backend.current(), self._call(args, kwargs), retrying))

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        from sllm import _calls

        retrying = _calls.Retrying(self._retries, self._retry_lost)
        return _calls.stream(_backend.current(), self._call(args, kwargs), retrying)

    def __repr__(self) -> str:
        method = f".{self._address.method}" if self._address.method else ""
        return f"<sllm.{type(self).__name__} {self._address.app}/{self._address.function}{method}>"

    if not TYPE_CHECKING:

        def __call__(self, *_: object, **__: object) -> NoReturn:
            how = "stream" if hasattr(type(self), "stream") else "remote"
            raise TypeError(f"{self.name!r} is a function of an app: call {self.name}.{how}(…) or {self.name}.local(…)")

        def __getattr__(self, name: str) -> NoReturn:
            instead = type(self)._elsewhere.get(name, "")
            address = self.__dict__.get("_address")
            if instead and address is not None:
                raise AttributeError(f"{self.name!r} {instead}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class Function(_Callable[P, L], Generic[P, R, L]):
    """A function with one result."""

    _elsewhere = {"stream": "is not a generator: call .remote(…)"}  # noqa: RUF012

    @property
    def remote(self) -> Remote[P, R]:
        return Remote(self)

    @property
    def map(self) -> Map[R]:
        return Map(self)

    @property
    def starmap(self) -> Starmap[R]:
        return Starmap(self)

    @staticmethod
    def from_name(app: str, name: str) -> AnyFunction:
        """A deployed function for callers without its source. Checked by the server when called."""
        return AnyFunction(Address(app, name), None, RetryPolicy())


class StreamFunction(_Callable[P, L], Generic[P, Y, L]):
    """A generator: its outputs are streamed."""

    _elsewhere = dict.fromkeys(("remote", "map", "starmap"), "is a generator: call .stream(…)")

    @property
    def stream(self) -> Stream[P, Y]:
        return Stream(self)


class AnyFunction(Function[..., Any, Any], StreamFunction[..., Any, Any]):
    """A function known by name only, so with every way of calling it."""

    _elsewhere = {}  # noqa: RUF012


def make(
    address: Address, code: Code, retries: RetryPolicy, local: Callable[..., Any] | None = None
) -> Function[..., Any, Any] | StreamFunction[..., Any, Any]:
    """The handle that fits the code."""
    kind = StreamFunction if code.stream else Function
    return kind(address, code, retries, local)


def _decode(data: bytes) -> Any:
    from sllm_faas.wire.payload import decode_result

    return decode_result("msgpack", data)


def _check_window(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 100_000:
        raise BadRequest(f"max_in_flight is {size!r}; allowed: 1 to 100000.", param="max_in_flight")


def _decoded(results: Generator[bytes | Exception, None, None]) -> Generator[Any, None, None]:
    try:
        for result in results:
            yield result if isinstance(result, Exception) else _decode(result)
    finally:
        results.close()


async def _decoded_async(results: AsyncGenerator[bytes | Exception, None]) -> AsyncGenerator[Any, None]:
    try:
        async for result in results:
            yield result if isinstance(result, Exception) else _decode(result)
    finally:
        await results.aclose()


async def _as_async(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(inputs, AsyncIterable):
        async for item in inputs:
            yield item
    else:
        for item in inputs:
            yield item


async def _zip_async(inputs: tuple[Iterable[Any] | AsyncIterable[Any], ...]) -> AsyncGenerator[Any, None]:
    iterators = [_as_async(one) for one in inputs]
    try:
        while iterators:
            try:
                yield [await anext(one) for one in iterators]
            except StopAsyncIteration:
                return
    finally:
        for one in iterators:
            await one.aclose()
