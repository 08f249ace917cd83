"""Where two answers to one request part, and whether rounding is enough to explain it.

A model computes a context in one piece (a prefill) or token by token, and the scores differ by about 4e-6. Drawing is
a pure function of the scores, so this shows only where two of them are almost equal: the best two, or the two at the
border of what top-k or top-p leaves. `objection` draws again from the scores of the undisturbed context, moved by
MARGIN against each other in each of the ways that could have made the other token the winner.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MARGIN = 1e-4
_FIELDS = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")


class Referee:
    """`model` is a directory of a model whose every drawn token is one character of its text. Safe to share between
    threads; the model is loaded on first use."""

    def __init__(self, model: Path) -> None:
        self._path = model
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def objection(self, request: Mapping[str, Any], choice: int, expected: str, got: str) -> str:
        """Empty when rounding explains why they part, else the story. `request` is the body of a completion; texts are
        whole, with the stop string that ended them. Where no token differs, because they are equal or one is the
        beginning of the other, nothing is explained. Blocks."""
        at = next((i for i, (x, y) in enumerate(zip(expected, got, strict=False)) if x != y), -1)
        if at < 0:
            return f"no token differs: {len(expected)} and {len(got)} characters, {expected[-20:]!r}"
        from sllm_invoker.runner.engines.base import Sampling
        from sllm_invoker.runner.sampling import draw

        from sllm_faas.wire.llm import choice_seed

        prompt = request["prompt"]
        with self._lock:
            tokenizer, ids, logits = self._score(prompt + expected[:at])
            history = ids[len(tokenizer(prompt).input_ids) :]
            ours, theirs = (tokenizer(prompt + text[: at + 1]).input_ids[-1] for text in (expected, got))
        settings = {name: request[name] for name in _FIELDS if name in request}
        sampling = Sampling(**settings, seed=choice_seed(request["seed"], choice))

        def drawn(up: int | None, down: int | None) -> int:
            moved = logits.astype(np.float64)
            if up is not None:
                moved[up] += MARGIN
            if down is not None:
                moved[down] -= MARGIN
            return draw(moved[None], [sampling], [history])[0].token

        plain = drawn(None, None)
        excused = plain in (ours, theirs) and {ours, theirs} <= {
            plain, drawn(theirs, None), drawn(ours, None), drawn(None, ours), drawn(None, theirs), drawn(ours, theirs),
            drawn(theirs, ours),
        }  # fmt: skip
        if excused:
            return ""
        best = ", ".join(f"{tokenizer.decode([int(t)])!r} {logits[t]:.6f}" for t in np.argsort(-logits)[:7])
        names = {"expected": ours, "got": theirs, "drawn again": plain}
        words = ", ".join(f"{name} {tokenizer.decode([token])!r}" for name, token in names.items())
        return f"token {at}: {words}; scores {best}; {settings}"

    def _score(self, text: str) -> tuple[Any, list[int], Any]:
        """The tokenizer, the text's tokens, and the scores of what comes after them."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._loaded is None:
            self._loaded = AutoTokenizer.from_pretrained(self._path), AutoModelForCausalLM.from_pretrained(self._path)
        tokenizer, model = self._loaded
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float().numpy()
        return tokenizer, ids[0].tolist(), logits
