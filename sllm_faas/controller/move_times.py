"""How long the move of a running invocation takes: `a * tokens + b`, learned per function. Pure.

`tokens` are those of its context, which the destination computes anew (Fu et al., ServerlessLLM, OSDI'24, §5); `b` is
what every move costs. Both come from exponentially weighted means of tokens, seconds, tokens² and tokens·seconds: the
least-squares line through what was seen lately. They live in the estimator's book, under `move|app/function|…`.
"""

from __future__ import annotations

from collections.abc import Mapping

WEIGHT = 0.2
"""Of a new observation."""
PER_TOKEN, BASE = 250e-6, 0.1
"""Guesses until some were seen: seconds per token, seconds."""
SPREAD = 0.01
"""Relative variance of the tokens seen below which no slope can be read from them."""


def constants(book: Mapping[str, float], function: str) -> tuple[float, float]:
    """(a, b) in seconds per token and seconds; `function`: `app/function`."""
    key = f"move|{function}|"
    if f"{key}n" not in book:
        return PER_TOKEN, BASE
    tokens, seconds = book[f"{key}t"], book[f"{key}s"]
    spread = book[f"{key}tt"] - tokens * tokens
    if spread <= SPREAD * max(1.0, tokens * tokens):
        # All alike: the slope stays a guess, unless it alone would be more than what was seen.
        slope = min(PER_TOKEN, seconds / tokens) if tokens else PER_TOKEN
    else:
        slope = max(0.0, (book[f"{key}ts"] - tokens * seconds) / spread)
    return slope, max(0.0, seconds - slope * tokens)


def seconds(book: Mapping[str, float], function: str, tokens: int) -> float:
    """The estimate for a context of so many tokens, to an instance that is ready."""
    slope, base = constants(book, function)
    return slope * tokens + base


def learn(book: dict[str, float], function: str, tokens: int, took: float) -> None:
    """Take in a move that was made."""
    key = f"move|{function}|"
    seen = book.get(f"{key}n", 0.0)
    weight = max(WEIGHT, 1.0 / (seen + 1.0))  # the plain mean at first
    for name, value in (("t", tokens), ("s", took), ("tt", tokens * tokens), ("ts", tokens * took)):
        before = book.get(key + name, 0.0)
        book[key + name] = before + weight * (value - before)
    book[f"{key}n"] = seen + 1.0
