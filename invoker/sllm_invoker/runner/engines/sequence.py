"""What the transformers engine keeps of a sequence, on both of its threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import torch

from sllm_invoker.runner.engines.base import GenerateRequest, TokenOutput

State = Literal["waiting", "filling", "held", "running", "done"]
"""waiting: no cache. filling: what is known of it is being computed. held: computed and silent, or paused."""


@dataclass(slots=True, eq=False)
class Stream:
    """What the loop thread knows of a sequence: outputs not yet taken, and the end."""

    pending: list[TokenOutput] = field(default_factory=list)
    error: Exception | None = None
    ended: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, error: Exception | None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self.wake.set()


@dataclass(slots=True, eq=False, repr=False)
class TokenSequence:
    """A sequence of this engine. `request` is fixed; `activated`, `paused`, `cancelled`, `stream` are the loop
    thread's to write, everything else is the step thread's. `fed` counts tokens in the cache."""

    request: GenerateRequest
    drawn: list[int]
    stream: Stream = field(default_factory=Stream)
    patient: bool = False
    activated: bool = False
    speaks: bool = False
    paused: bool = False
    cancelled: bool = False
    state: State = "waiting"
    handle: int | None = None
    fed: int = 0
    logits: torch.Tensor | None = None
    ready: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def tokens(self) -> SequenceOf[int]:
        return self.drawn

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.drawn)

    def slice(self, start: int, count: int) -> list[int]:
        """Tokens [start, start + count) of the prompt and the drawn ones together."""
        prompt, after = self.request.prompt, len(self.request.prompt)
        return [*prompt[start : start + count], *self.drawn[max(0, start - after) : max(0, start + count - after)]]

    def __repr__(self) -> str:
        return f"<sequence {self.state} {len(self.request.prompt)}+{len(self.drawn)} tokens, {self.fed} computed>"


@dataclass(slots=True, eq=False)
class Embedding:
    """Inputs to embed, done one by one between steps."""

    inputs: SequenceOf[SequenceOf[int]]
    future: asyncio.Future[list[list[float]]]
    vectors: list[list[float]] = field(default_factory=list)
