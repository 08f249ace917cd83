"""Computing while the weights are still on their way: an operation waits for the bytes of its own arguments.

    with arriving(weights):
        model(ids)             embed ─ waits for its rows ─► layer 0 ─ waits for layer 0 ─► …

The file is in execution order, so the forward pass follows the reader through it. The wait is at the dispatcher, under
every module, hook and kernel: whoever touches a weight waits for it, in whatever order, and no model needs to be known
for it. It costs microseconds per operation, and nothing once every byte is there. Invariant: no operation reads a byte
that was not checked. Numbers are not changed: the operation that would have run is the one that runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sllm_invoker.runner.weights import Weights

_LINEAR = torch.ops.aten.linear.default


def arriving(weights: Weights | None) -> contextlib.AbstractContextManager[object]:
    """For the calling thread. What `Weights.wait` raises comes out of the operation that needed the bytes."""
    return contextlib.nullcontext() if weights is None or weights.arrived else _Arriving(weights)


class _Arriving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._weights.arrived:
            self._await(args)
            if kwargs:
                self._await(kwargs.values())
        if func is _LINEAR and args[0].dim() > 2 and (len(args) < 3 or args[2] is None):
            # What it does by itself for a weight that wants a gradient (see `attach`), which down here none does: else
            # an input that is a slice has the whole weight copied.
            return func(args[0].flatten(0, -2), args[1]).unflatten(0, args[0].shape[:-1])
        return func(*args, **(kwargs or {}))

    def _await(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                end = self._weights.end_of(storage.data_ptr(), storage.nbytes())
                if end is not None:
                    self._weights.wait(end)
            elif isinstance(value, (list, tuple)):
                self._await(value)
