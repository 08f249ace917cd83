"""The engine port: what a language-model instance must be able to do, whoever computes it.

An engine turns token ids into token ids. It knows nothing of HTTP, chat templates, stop *strings* or the
wire; the runner's language-model adapter owns those. Its invariant: **what a sequence draws is a pure
function of its logits, its token history, its prompt length, its seed and the position** — so a sequence
that was prefilled with the tokens drawn elsewhere goes on exactly as it would have there.

    attach(checkpoint)                     weights are in place, nothing on meta
    prefill(request)   -> Sequence         computed and held; silent
    extend(sequence, tokens)               tokens drawn elsewhere join the held sequence
    activate(sequence) -> async iterator   from here on it speaks
    pause(sequence), proceed(sequence)     a pair: held at a token boundary, and on again
    cancel(sequence)                       from any state; frees its cache
    generate(request)  =  activate(await prefill(request))

All but `attach` and `close` are called from one asyncio loop; the engine computes on a thread of its own and
hands results back to that loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Field meanings and ranges are those of the OpenAI API.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. Penalties count the tokens
    *after* the prompt (OpenAI's definition): logits[t] -= presence * (count[t] > 0) + frequency * count[t].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    """None: none wanted; k >= 0: the drawn token's log-probability and the k best beside it."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `tokens` are those already drawn elsewhere (resume, migration); `adapter` is one that
    the model was attached with, empty for the model alone."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One drawn token. `position` counts from 0 after the prompt. The end-of-sequence token itself is
    reported with `finish="stop"`; the token that exhausts `max_tokens` or the context with `"length"`."""

    token: int
    position: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class AttachReport:
    """What attach did: seconds per stage, bytes mapped, tensors assigned."""

    bytes: int
    tensors: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. `cache_tokens` and `cache_capacity` count tokens of KV cache, all sequences together."""

    running: int
    held: int
    waiting: int
    cache_tokens: int
    cache_capacity: int
    steps: int


class Sequence(Protocol):
    """A sequence the engine holds. `tokens` are those drawn or extended so far, without the prompt."""

    @property
    def request(self) -> GenerateRequest: ...
    @property
    def tokens(self) -> SequenceOf[int]: ...


class Engine(Protocol):
    @property
    def max_context(self) -> int:
        """Prompt plus output tokens that fit one sequence."""

    @property
    def vocabulary(self) -> int: ...

    def attach(self, checkpoint: Path) -> AttachReport:
        """Bind the weights of the object directory `checkpoint`. Never copies weights on CPU.

        Raises sllm_faas.errors.CheckpointCorrupt when a manifest or file is not what it says, and
        `CheckpointIncomplete` when a parameter or buffer would stay on meta.
        """

    async def prefill(self, request: GenerateRequest, *, patient: bool = False) -> Sequence:
        """Compute the cache of prompt + tokens and hold it. Waits for cache space. `patient`: behind those that
        run, in pieces that delay them by about a step; so are its extensions, until it is activated.

        Raises sllm_faas.errors.ContextTooLong when prompt + tokens leave no room for one more."""

    async def extend(self, sequence: Sequence, tokens: SequenceOf[int]) -> None: ...

    def activate(self, sequence: Sequence, tokens: SequenceOf[int] = ()) -> AsyncIterator[list[TokenOutput]]:
        """Tokens as they are drawn, in order, those of one wake-up together; ends after `finish`. `tokens` are a
        last extension, not spoken. Closing the iterator cancels the sequence."""

    async def pause(self, sequence: Sequence) -> None:
        """Stop an activated sequence at the next token boundary, its cache kept. When this returns, everything that
        was drawn is in `sequence.tokens` and on its way in the stream. One that has ended stays so."""

    def proceed(self, sequence: Sequence) -> None:
        """The pause is over. Idempotent."""

    def cancel(self, sequence: Sequence) -> None:
        """Idempotent. The cache is free when the current step ends."""

    async def embed(self, inputs: SequenceOf[SequenceOf[int]]) -> list[list[float]]:
        """One L2-normalised vector per input: the mean over its tokens of the last hidden layer."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop the compute thread; every sequence is cancelled."""
