"""What running a loaded model once tells about it, for its manifest.

Run at ingest, before anybody waits for a token but while somebody waits for the model: the whole of it runs once, and
what many passes are needed for is asked of its first layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from sllm_faas.errors import BadSpec
from sllm_invoker.checkpoints.object import first_line
from sllm_invoker.runner import quantized
from sllm_invoker.runner.attach import build_skeleton, layer_lists, tensor_places, with_layers
from sllm_invoker.runner.engines.compute import Forward
from sllm_invoker.runner.engines.rows import supports_rows

FEWEST = 2
"""Layers of `first_layers`, at least."""


@dataclass(frozen=True, slots=True)
class Traits:
    """When each module first ran, by name; bytes of keys and values a token costs, 0 where nothing grows; the width of
    its logits; whether it generates; whether the row cache is exact for it."""

    order: dict[str, int]
    kv_bytes_per_token: int
    vocabulary: int
    generates: bool
    batched: bool


def probe(model: Any) -> Traits:
    """Raises BadSpec when it does not run."""
    order: dict[str, int] = {}

    def note(name: str) -> Any:
        def ran(_module: Any, _args: Any) -> None:
            order.setdefault(name, len(order))

        return ran

    vocabulary = int(model.config.get_text_config().vocab_size)
    generates = bool(model.can_generate())
    ids = torch.arange(1, 9).remainder(vocabulary)[None]
    cache = _growing_cache(model) if generates else None
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        with torch.inference_mode():
            if cache is not None:
                vocabulary = Forward(model)(ids, cache).shape[-1]
            else:
                out = model(input_ids=ids, **({"use_cache": False} if generates else {}))
                vocabulary = out.logits.shape[-1] if generates else vocabulary
    except Exception as error:  # whatever a model wants beside token ids
        raise BadSpec(f"{type(model).__name__} does not run on token ids alone: {first_line(error)}.") from error
    finally:
        for hook in hooks:
            hook.remove()
    return Traits(
        order=order,
        kv_bytes_per_token=_bytes_per_token(cache) if cache is not None else 0,
        vocabulary=int(vocabulary),
        generates=generates,
        batched=generates and supports_rows(first_layers(model)),
    )


def _growing_cache(model: Any) -> DynamicCache | None:
    """The model's own, empty; None where nothing grows with the text."""
    cache = DynamicCache(config=model.config)
    return cache if not cache.layers or any(hasattr(layer, "keys") for layer in cache.layers) else None


def _bytes_per_token(cache: DynamicCache) -> int:
    """Measured on what a forward left in it: keys and values of shape [rows, heads, tokens, width]."""
    stored = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(store.nbytes // store.shape[-2] for store in stored if store is not None)


def first_layers(model: Any) -> Any:
    """A model of its first layers, `FEWEST` and one of each kind at least, with the very tensors of the whole; the
    model itself where there is no such model, or no fewer layers."""
    text = model.config.get_text_config()
    count = max([FEWEST, *(1 + max(value.index(kind) for kind in value) for value in layer_lists(text).values())])
    if count >= text.num_hidden_layers or quantized.method(model.config):
        return model
    held = {name: tensor for name, _, tensor, _ in tensor_places(model)}
    try:
        first = build_skeleton(with_layers(model.config, count), type(model).__name__)
        for name, _, tensor, holder in tensor_places(first):
            if held[name].shape != tensor.shape:
                return model
            holder[name.rpartition(".")[2]] = held[name]
    except (BadSpec, AttributeError, KeyError, TypeError, ValueError):
        return model
    return first.eval()
