"""sllm: decorate Python functions, deploy them, call them.

    import sllm

    app = sllm.App("demo")

    @app.function
    def square(x: int) -> int:
        return x * x

    square.remote(3)

Importing this costs a few milliseconds: the HTTP client, asyncio and the codec come with the first call.
"""

from __future__ import annotations

from typing import Any

from sllm._app import App, FunctionDecorator, Llm
from sllm._cls import Cls, Parameters, method
from sllm._code import batched, concurrent, enter, exit, parameter
from sllm._context import Cancelled, Invocation, current_invocation, resumed
from sllm._function import AnyFunction, Function, StreamFunction
from sllm._options import Checkpoint, Retries, Secret
from sllm_faas import errors
from sllm_faas.errors import RemoteError, SllmError
from sllm_faas.spec import Timeouts

__all__ = [
    "AnyFunction",
    "App",
    "Cancelled",
    "Checkpoint",
    "Cls",
    "Function",
    "FunctionDecorator",
    "Invocation",
    "Llm",
    "Parameters",
    "RemoteError",
    "Retries",
    "Secret",
    "SllmError",
    "StreamFunction",
    "Timeouts",
    "batched",
    "concurrent",
    "current_invocation",
    "enter",
    "errors",
    "exit",
    "method",
    "parameter",
    "resumed",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # imported on first use
        import importlib

        return importlib.import_module("sllm.testing")
    raise AttributeError(f"module 'sllm' has no attribute {name!r}")
