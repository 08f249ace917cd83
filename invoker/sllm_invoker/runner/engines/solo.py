"""Sequences run one by one, each with the cache that the model itself would make.

For models with recurrent or convolution state, position biases built from a padding mask, or anything else the
row cache was not proved for. A step over n sequences costs n forwards; the engine above does not notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sllm_invoker.runner.adapters import Adapters
from sllm_invoker.runner.engines.compute import CPU, SMALL_CHUNK, Forward


class Solo:
    """`Compute` with one private cache per sequence."""

    def __init__(self, model: Any, adapters: Adapters | None = None, device: torch.device = CPU) -> None:
        self._device = device
        self._adapters = adapters
        self._adapter_of: dict[int, str] = {}
        self._config = model.config
        self._forward = Forward(model)
        self._handles = count()
        self._caches: dict[int, Any] = {}
        self._fed: set[int] = set()
        # A recurrent layer takes several tokens at once only when it starts: later ones go one by one.
        self._recurrent = not attention_only(DynamicCache(config=model.config))
        self.chunk = 1 << 30 if self._recurrent else 256
        self.small_chunk = self.chunk if self._recurrent else SMALL_CHUNK

    def open(self, adapter: str = "") -> int:
        handle = next(self._handles)
        self._adapter_of[handle] = adapter
        self._caches[handle] = DynamicCache(config=self._config)
        return handle

    def feed(self, handle: int, tokens: Sequence[int]) -> torch.Tensor:
        if self._adapters is not None:
            self._adapters.use([self._adapter_of[handle]])
        one_by_one = self._recurrent and handle in self._fed
        self._fed.add(handle)
        for piece in [[token] for token in tokens] if one_by_one else [list(tokens)]:
            logits = self._forward(torch.tensor([piece], device=self._device), self._caches[handle])
        return logits[0]

    def step(self, tokens: Mapping[int, int]) -> tuple[list[int], torch.Tensor]:
        return list(tokens), torch.stack([self.feed(handle, [token]) for handle, token in tokens.items()])

    def close(self, handle: int) -> None:
        self._caches.pop(handle, None)
        self._fed.discard(handle)
        self._adapter_of.pop(handle, None)


def attention_only(cache: DynamicCache) -> bool:
    """True when every layer keeps plain keys and values, with or without a window."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
