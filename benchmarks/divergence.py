"""Where two answers to one request part, and whether rounding is enough to explain it.

A model computes a context in one piece (a prefill) or token by token, and the scores differ by about 4e-6. Drawing is
a pure function of the scores, so this shows only where two of them are almost equal: the best two, or the two at the
border of what top-k or top-p leaves. `explain` draws again from the scores of the undisturbed context, moved by MARGIN
against each other in each of the ways that could have made the other token the winner.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARGIN = 1e-4
_FIELDS = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class Divergence:
    at: int
    """Tokens after the prompt that the two have in common."""
    excused: bool
    story: str


class Referee:
    """`model` is a directory of a model whose every drawn token is one character of its text. Safe to share between
    threads; the model is loaded on first use."""

    def __init__(self, model: Path) -> None:
        self._path = model
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def explain(self, request: Mapping[str, Any], choice: int, expected: str, got: str) -> Divergence:
        """`request` is the body of a completion; texts are whole, with the stop string that ended them. Raises
        ValueError when the texts are equal, or one is the beginning of the other."""
        at = next((i for i, (x, y) in enumerate(zip(expected, got, strict=False)) if x != y), -1)
        if at < 0:
            raise ValueError(f"no token differs: {len(expected)} and {len(got)} characters, {expected[-20:]!r}")
        from sllm_invoker.runner.engines.base import Sampling
        from sllm_invoker.runner.sampling import draw

        from sllm_faas.wire.llm import choice_seed

        with self._lock:
            tokenizer, logits = self._score(request["prompt"] + expected[:at])
            history = tokenizer(request["prompt"] + expected[:at]).input_ids[
                len(tokenizer(request["prompt"]).input_ids) :
            ]
            ours, theirs = (tokenizer(request["prompt"] + text[: at + 1]).input_ids[-1] for text in (expected, got))
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
        best = ", ".join(f"{tokenizer.decode([int(t)])!r} {logits[t]:.6f}" for t in np.argsort(-logits)[:7])
        names = {"expected": ours, "got": theirs, "drawn again": plain}
        words = ", ".join(f"{name} {tokenizer.decode([token])!r}" for name, token in names.items())
        return Divergence(at, excused, f"token {at}: {words}; scores {best}; {settings}")

    def _score(self, text: str) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._loaded is None:
            self._loaded = AutoTokenizer.from_pretrained(self._path), AutoModelForCausalLM.from_pretrained(self._path)
        tokenizer, model = self._loaded
        with torch.no_grad():
            logits = model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1].float().numpy()
        return tokenizer, logits
