"""A batch: several calls of one method made into one call over lists, and its results given back one by one.

It does not decide when a batch is complete and runs no user code; executors do. Invariant: every call that was
given ends, whatever the function returned.
"""

from __future__ import annotations

from typing import Any

from sllm_faas.errors import ErrorInfo, FunctionError, SllmError, to_info
from sllm_faas.wire.exceptions import exception_to_info
from sllm_invoker.runner.call import Call
from sllm_invoker.runner.method import Method, close_quietly


class Batch:
    """The calls of `calls` whose arguments fit; the others have ended when it exists.

    `columns` are the function's arguments: for each parameter the list of the calls' values, in order.
    """

    def __init__(self, method: Method, calls: list[Call]) -> None:
        self._method = method
        self.calls: list[Call] = []
        self.interrupted = False
        rows: list[dict[str, Any]] = []
        for call in calls:
            try:
                rows.append(method.bind(method.arguments(call)))
            except SllmError as error:
                call.fail(to_info(error))
            else:
                self.calls.append(call)
        self.columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    @property
    def cancelled(self) -> bool:
        """All of its calls are: one of them cannot be stopped without the others."""
        return all(call.cancelled for call in self.calls)

    def finish(self, results: Any) -> None:
        """Hand out the results: a list as long as the batch; an exception in it fails its call alone."""
        if not isinstance(results, list | tuple) or len(results) != len(self.calls):
            got = f"{len(results)} results" if isinstance(results, list | tuple) else f"a {type(results).__name__}"
            close_quietly(results)
            wrong = FunctionError(
                f"batched {self._method.spec.name!r} returned {got} for {len(self.calls)} calls.",
                hint="A batched function takes lists and returns a list of the same length.",
            )
            self.fail(to_info(wrong))
            return
        for call, result in zip(self.calls, results, strict=True):
            if isinstance(result, BaseException):
                call.fail(exception_to_info(result, self._method.root))
                continue
            try:
                call.done(self._method.encode(call, result))
            except SllmError as error:
                call.fail(to_info(error))

    def fail(self, error: ErrorInfo) -> None:
        for call in self.calls:
            call.fail(error)

    def stopped(self) -> None:
        for call in self.calls:
            call.stopped()
