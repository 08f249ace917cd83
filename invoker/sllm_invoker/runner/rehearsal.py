"""A first pass ahead of need: through a model of one layer of the same shapes, whose weights are zeros.

The first pass of a forked process costs more than the next ones: kernels are chosen and made, and every page that it
shares with its template and writes to, be it to count a reference, is copied. A template makes the small model and runs
it once, a process that waits to become an instance once more. The skeleton stays as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from sllm_faas.errors import BadSpec
from sllm_invoker.runner import attach
from sllm_invoker.runner.attach import Skeleton
from sllm_invoker.runner.engines.compute import Compute
from sllm_invoker.runner.engines.rows import Rows
from sllm_invoker.runner.engines.solo import Solo
from sllm_invoker.runner.llm import SMALL

LARGEST = 1 << 30
"""Bytes of weights of the small model at most: more would take longer than what it is for."""
PROMPT = 16
VOCABULARY = 64
"""Tokens that the small model knows: the last layer of a large one would take as long as many others."""


def threads(skeleton: Skeleton) -> int:
    """With how many an instance of it computes."""
    return 1 if skeleton.checkpoint.manifest.total_bytes < SMALL else len(os.sched_getaffinity(0))


def small(skeleton: Skeleton) -> Any:
    """The skeleton's model with one layer and few tokens, all zeros. Raises BadSpec where there is no such model."""
    if skeleton.packed:
        raise BadSpec("its kernels take packed weights, not zeros.")
    config = attach.with_layers(skeleton.model.config, 1)
    text = config.get_text_config()
    text.vocab_size = VOCABULARY
    config.pad_token_id = text.pad_token_id = None
    model = attach.build_skeleton(config, skeleton.checkpoint.manifest.architecture)
    model.eval()
    weights = next(place.dtype for place in skeleton.places if place.parameter)
    size = sum(tensor.numel() for tensor in model.parameters()) * weights.itemsize
    if size > LARGEST:
        raise BadSpec(f"one layer of it has {size} bytes, more than {LARGEST}.")
    for name, kind, tensor, holder in attach.tensor_places(model):
        if kind == "parameter":
            zeros = torch.zeros(tensor.shape, dtype=weights)
            holder[name.rpartition(".")[2]] = torch.nn.Parameter(zeros, requires_grad=False)
        else:
            holder[name.rpartition(".")[2]] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return model


def run(skeleton: Skeleton, model: Any) -> None:
    """Tokenise, compute a prompt and a step of the small model."""
    manifest = skeleton.checkpoint.manifest
    if skeleton.codec is not None:
        skeleton.codec.encode("1 2 3")
    prompt = [number % VOCABULARY for number in range(PROMPT)]
    with torch.inference_mode():
        if not manifest.generates:
            model(input_ids=torch.tensor([prompt]))
            return
        compute: Compute = Rows(model, rows=1, capacity=2 * PROMPT) if manifest.batched else Solo(model)
        handle = compute.open()
        compute.feed(handle, prompt)
        compute.step({handle: prompt[0]})
        compute.close(handle)
