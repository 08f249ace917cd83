"""One callable of a function: payload to arguments, result to payload, and whose fault a failure is.

It runs nothing by itself: executors call `arguments`, then the function, then `encode`, or `report` when
something was raised. Invariant: what the caller did wrong is a BadRequest, what user code did wrong a
FunctionError with the user's traceback; nothing of it is an internal error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sllm._runtime import Invocation, bind_arguments, serving

from sllm_faas.errors import BadRequest, BadResult, ErrorInfo, to_info
from sllm_faas.spec import MethodSpec
from sllm_faas.wire.codec import unpack_as
from sllm_faas.wire.exceptions import exception_to_info
from sllm_faas.wire.payload import Resolve, decode_call, decode_result, encode_result
from sllm_invoker.runner.call import Call

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Method:
    """A user's function, or a bound method of the user's object. `root` is the source directory; `place` says
    where it runs (an Invocation without an id)."""

    spec: MethodSpec
    function: Callable[..., Any]
    resolve: Resolve
    root: str
    place: Invocation

    def serving(self, call: Call) -> AbstractContextManager[None]:
        """Code within the block serves `call`: what it prints and calls is attributed to it."""
        place = self.place
        return serving(
            Invocation(
                f"inv-{call.id.hex()}",
                place.app, place.function, self.spec.name, place.version, place.instance, place.node,
            ),
            partial(self._resumed, call),
        )  # fmt: skip

    def _resumed(self, call: Call) -> Any:
        """What a resumable generator delivered last, under an earlier fence; None if nothing."""
        if not call.resume:
            return None
        return decode_result(call.invoke.encoding, unpack_as(bytes, call.resume), self.resolve)

    def arguments(self, call: Call) -> Arguments:
        """Raises BadRequest when the payload is not a call. Whether it fits the signature shows in the call."""
        args, kwargs = decode_call(call.invoke.encoding, call.payload, self.resolve)
        call.payload = b""
        return args, kwargs

    def bind(self, arguments: Arguments) -> dict[str, Any]:
        """Values by parameter, defaults filled in. Raises BadRequest naming the argument that does not fit."""
        args, kwargs = arguments
        bind_arguments(self.function, args, kwargs)
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def encode(self, call: Call, value: Any) -> bytes:
        """A result or an output as bytes. Raises BadResult."""
        try:
            return encode_result(call.invoke.encoding, value)
        except BadResult as error:
            raise _misused(self.spec.name, value) or error from None
        except Exception as error:  # a model's own serializer may raise anything
            raise BadResult(f"the result cannot be encoded: {type(error).__name__}: {error}.") from error

    def report(self, error: BaseException, arguments: Arguments | None = None) -> ErrorInfo:
        """What to say of `error`, which user code raised; `arguments` if it was in the call of the function."""
        if arguments is not None and isinstance(error, TypeError) and _raised_here(error):
            # The call itself failed, not something inside of it: binding again tells what did not fit.
            try:
                bind_arguments(self.function, *arguments)
            except BadRequest as mismatch:
                return to_info(mismatch)
        return exception_to_info(error, self.root)


class Raised(Exception):
    """What user code raised, so that it is never mistaken for an error of the platform's own code."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def close_quietly(value: Any) -> None:
    """Close a coroutine nobody will await, so that Python does not complain about it later."""
    if inspect.iscoroutine(value):
        value.close()


def _raised_here(error: TypeError) -> bool:
    """No frame of user code has been entered: the innermost frame is the platform's own."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb is not None and str(tb.tb_frame.f_globals.get("__name__", "")).startswith("sllm_invoker.")


def _misused(name: str, value: Any) -> BadResult | None:
    """A result that hints at a function of another kind than was registered."""
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        return BadResult(
            f"{name!r} returned a generator, which is not a value.",
            hint="Yield from the function itself to stream, or return a list.",
        )
    if inspect.isawaitable(value):
        close_quietly(value)
        return BadResult(
            f"{name!r} returned a coroutine that was never awaited.",
            hint="Declare the function with `async def`, or await inside of it.",
        )
    return None
