"""What a gateway and a language-model instance say to each other, inside Invoke and Output payloads.

The gateway parses and validates OpenAI's JSON into `LlmRequest`; the instance answers with `LlmOutput`s, which
the gateway renders as OpenAI chunks. All of it MessagePack. The methods of an `llm` function are `chat`,
`complete` and `embed`. One invocation carries all `n` choices, so a stream has one order and one replay window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """A generation. Exactly one of `messages` (chat) and `prompts` (complete, embed) is given.

    Ranges are checked by the gateway. `seed` is always set (the gateway draws one if the client did not);
    choice i uses `choice_seed(seed, i)`. A prompt is text or token ids. With several prompts, choice
    i of prompt p has index p * n + i, as OpenAI defines. `max_tokens` None: up to the model's context.
    `logprobs` None: none wanted; k: the drawn token's and the k best. `adapter` is one of the function's, or empty.
    """

    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class LlmLogprob:
    """`token` is the token's text, `bytes` its UTF-8 (which a partial character's text cannot show)."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top: tuple[tuple[str, float, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class LlmOutput:
    """Something new of one choice: token ids drawn, the text they released, perhaps the end.

    `tokens` are the resume state: prompt plus all tokens so far continue the choice elsewhere. Text may lag
    behind tokens (a partial character, a possible stop string); it is never taken back.
    """

    choice: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[LlmLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class LlmUsage:
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LlmEmbeddings:
    """Result of `embed`: one vector per prompt, float32 little-endian bytes each."""

    vectors: tuple[bytes, ...]
    usage: LlmUsage = field(default_factory=LlmUsage)


@dataclass(frozen=True, slots=True)
class LlmResume:
    """Resume state of `chat` and `complete` (`Invoke.resume`), by choice: the tokens delivered under earlier
    fences, and how the choice ended if it had. Their text is not sent again. The last choices may be left out when
    they have said nothing."""

    tokens: tuple[tuple[int, ...], ...]
    finish: tuple[FinishReason | None, ...]


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a choice: `seed` itself for the first, splitmix64 of both for the others (Steele, Lea,
    Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). 63 bits."""
    if choice == 0:
        return seed
    mask = 0xFFFFFFFFFFFFFFFF
    z = (seed + choice * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


_encoder = msgspec.msgpack.Encoder()
_output_decoder = msgspec.msgpack.Decoder(LlmOutput)
encode = _encoder.encode
decode_output = _output_decoder.decode
