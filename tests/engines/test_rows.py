"""The row cache against the model's own forward, and what it gives back."""

from __future__ import annotations

import pytest
import torch
from sllm_invoker.runner.engines.rows import Rows
from sllm_invoker.runner.engines.solo import Solo

TEXTS = [[3, 4, 5, 6, 2], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def last_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def test_the_row_cache_is_chosen_where_it_is_exact(architecture, case):
    assert case(architecture).checkpoint.manifest.batched == (architecture not in {"bloom", "mamba"})


@pytest.mark.parametrize("kind", ["rows", "solo"])
def test_fed_and_stepped_sequences_have_the_logits_of_a_plain_forward(architecture, case, kind):
    if kind == "rows" and not case(architecture).checkpoint.manifest.batched:
        pytest.skip("runs one by one")
    model = case(architecture).model
    compute = Rows(model, rows=4, capacity=64) if kind == "rows" else Solo(model)
    handles = [compute.open() for _ in TEXTS]
    for handle, text in zip(handles, TEXTS, strict=True):
        compute.feed(handle, text[:2])
        fed = compute.feed(handle, text[2:-2])
        assert torch.allclose(fed, last_logits(model, text[:-2]), atol=1e-4)
    for back in (2, 1):
        order, logits = compute.step({h: text[-back] for h, text in zip(handles, TEXTS, strict=True)})
        for handle, text in zip(handles, TEXTS, strict=True):
            expected = last_logits(model, text[: len(text) - back + 1])
            assert torch.allclose(logits[order.index(handle)], expected, atol=1e-4)


def test_sequences_keep_their_cache_while_rows_move(case):
    """Steps over changing subsets, with one closed and another opened between them."""
    model = case("llama").model
    rows = Rows(model, rows=4, capacity=64)
    texts = {rows.open(): list(text) for text in [*TEXTS, [9, 9]]}
    for handle, text in texts.items():
        rows.feed(handle, text)
    for turn, subset in enumerate([(2,), (0, 3), (3, 1), (0, 1, 2, 3), (2, 0)]):
        if turn == 3:
            gone = next(iter(texts))
            rows.close(gone)
            del texts[gone]
            fresh = rows.open()
            texts = {fresh: [8, 7, 6, 5], **texts}
            rows.feed(fresh, texts[fresh])
        handles = [list(texts)[i] for i in subset]
        tokens = {handle: 20 + turn + handle for handle in handles}
        order, logits = rows.step(tokens)
        assert sorted(order) == sorted(handles)
        for handle in handles:
            texts[handle].append(tokens[handle])
            assert torch.allclose(logits[order.index(handle)], last_logits(model, texts[handle]), atol=1e-4)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_reserved_rows_cost_nothing_and_freed_ones_give_their_pages_back(case):
    model = case("llama").model
    rows = Rows(model, rows=64, capacity=1 << 22)  # 64 GiB of address space at 256 bytes a token
    handle = rows.open()
    before = _resident_bytes()
    rows.feed(handle, [5] * 3)
    assert rows.token_bytes == case("llama").checkpoint.manifest.kv_bytes_per_token
    assert _resident_bytes() - before < 32 << 20
    layer = rows._cache.layers[0]
    layer.keys[0] = 1.0  # as if four million tokens had been there
    full = _resident_bytes()
    rows.close(handle)
    assert full - _resident_bytes() > 200 << 20
