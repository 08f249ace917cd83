"""Sharing keys and values between query heads changes no bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sllm_invoker.runner.engines.attention import shared_heads
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def tensors(rows: int, width: int, length: int, heads: int, fewer: int, dim: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(width)
    stores = [torch.randn(rows + 2, length + 40, fewer, dim, dtype=dtype)[:rows, :length] for _ in range(2)]
    query = torch.randn(rows, width, heads, dim, dtype=dtype).transpose(1, 2)
    return query, *(store.transpose(1, 2) for store in stores)


def causal(width: int, length: int) -> torch.Tensor:
    return torch.ones(1, 1, width, length).tril(length - width).bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 2, 50, 12, 4, 64), (1, 33, 700, 8, 2, 128), (2, 7, 300, 6, 3, 32), (1, 256, 1300, 4, 1, 80)]
)
@pytest.mark.parametrize("additive", [False, True])
def test_the_same_bits_as_with_repeated_heads(shape: tuple[int, ...], dtype: torch.dtype, additive: bool) -> None:
    rows, width, length, heads, fewer, dim = shape
    query, key, value = tensors(rows, width, length, heads, fewer, dim, dtype)
    mask = causal(width, length)
    if additive:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    module: Any = SimpleNamespace(num_key_value_groups=heads // fewer, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    found, _ = shared_heads(module, query, key, value, mask, scaling=0.2)
    assert torch.equal(found, expected)
    assert found.is_contiguous() and expected.shape == (rows, width, heads, dim)


@pytest.mark.parametrize(("width", "masked"), [(1, True), (1, False), (9, False)])
def test_otherwise_it_is_that_of_transformers(width: int, masked: bool) -> None:
    query, key, value = tensors(2, width, 9, 6, 2, 16, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    mask = causal(width, 9) if masked else None
    expected, _ = sdpa_attention_forward(module, query, key, value, mask)
    assert torch.equal(shared_heads(module, query, key, value, mask)[0], expected)


def test_what_is_added_to_the_scores_is_left_to_transformers() -> None:
    query, key, value = tensors(1, 5, 9, 6, 2, 16, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    mask, bias = causal(5, 9), torch.randn(1, 6, 5, 9)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, position_bias=bias)
    assert torch.equal(shared_heads(module, query, key, value, mask, position_bias=bias)[0], expected)
