"""What the step loop asks of a model: feed a sequence tokens, step several sequences by one.

Two implementations: `rows.Rows` computes all sequences of a step in one forward; `solo.Solo` keeps a cache of
the model's own kind per sequence and runs them one by one, for models whose state is not a plain attention
cache. Handles are small ints. Nothing here knows of sampling, requests or threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from sllm_invoker.runner.engines import attention

SMALL_CHUNK = 32
"""Tokens whose forward costs about what a step costs (on a CPU, 32 of a 100M Llama cost 1.1 steps)."""

CPU = torch.device("cpu")


class Compute(Protocol):
    """The cache of several sequences and the forward passes over it. Not thread-safe."""

    chunk: int
    """At most so many tokens in one `feed`, so that others need not wait long."""

    small_chunk: int
    """The same where the others are to be delayed by about a step."""

    def open(self, adapter: str = "") -> int:
        """A handle for an empty sequence, computed with that adapter of the model, or none; the caller keeps within the
        number of sequences agreed."""

    def feed(self, handle: int, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens to a sequence. Returns the logits after the last one, shape [vocabulary]."""

    def step(self, tokens: Mapping[int, int]) -> tuple[list[int], torch.Tensor]:
        """Append one token to each of several sequences. Returns the handles in the order of the rows of
        the second value, the logits, shape [sequences, vocabulary]."""

    def close(self, handle: int) -> None:
        """Forget a sequence and give back its memory."""


class Forward:
    """A causal model's forward, told apart by what its signature takes."""

    def __init__(self, model: Any) -> None:
        attention.install()
        names = inspect.signature(model.forward).parameters
        self._model = model
        self._fixed: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in names:
            self._fixed["logits_to_keep"] = 1
        self._cache = "cache_params" if "cache_params" in names else "past_key_values"
        self.takes_positions = "position_ids" in names

    def __call__(self, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
        """Logits after the last position of each row, shape [rows, vocabulary]."""
        more[self._cache] = cache
        logits: torch.Tensor = self._model(input_ids=ids, **self._fixed, **more).logits
        return logits[:, -1]
