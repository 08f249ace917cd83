"""Engines behind one port (`base.Engine`); `create` finds one by name.

An engine's module is imported when it is asked for, so that one that is not installed costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm_faas.errors import BadSpec
from sllm_invoker.runner.engines.base import Engine

if TYPE_CHECKING:
    from sllm_invoker.runner.attach import Skeleton

ENGINES = ("transformers",)


def create(
    skeleton: Skeleton,
    *,
    name: str = "transformers",
    cache_tokens: int | None = None,
    max_sequences: int = 32,
) -> Engine:
    """An engine for a prepared skeleton; `attach` it next.

    `cache_tokens` is the KV cache of all sequences together, in tokens; None takes a default number of bytes.
    `max_sequences` bounds sequences held or running at once; more wait. Raises BadSpec for an unknown name.
    """
    if name == "transformers":
        from sllm_invoker.runner.engines.transformers import TransformersEngine

        return TransformersEngine(skeleton, cache_tokens=cache_tokens, max_sequences=max_sequences)
    raise BadSpec(f"engine {name!r} is not one of {', '.join(ENGINES)}.", param="engine")
