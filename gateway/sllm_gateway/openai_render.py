"""`LlmOutput`s as OpenAI's answers: whole, or chunk by chunk. Pure.

The `id:` of an output's last chunk is its ordinal, so `Last-Event-ID` finds the place again; the role, usage and
`[DONE]` events have none. Text is only ever appended, so a stream's chunks joined are the whole answer's text.
"""

from __future__ import annotations

import base64
import math
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sllm_faas.errors import ErrorInfo, PlatformError
from sllm_faas.wire.llm import LlmEmbeddings, LlmLogprob, LlmOutput, LlmUsage, decode_output
from sllm_gateway.errors import shape
from sllm_gateway.exchange import Exchange
from sllm_gateway.handle import Ended
from sllm_gateway.note import Note
from sllm_gateway.sse import DONE, EVENT_STREAM, PING, json_event

_LOWEST = -9999.0
"""OpenAI's stand-in for a probability of zero, which JSON cannot say the logarithm of."""


def decode(data: bytes) -> LlmOutput:
    """Raises PlatformError: an instance answered what is none."""
    try:
        return decode_output(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PlatformError(f"The model's instance answered something else than text: {error}.") from None


def usage(counts: dict[str, int]) -> dict[str, int]:
    prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _log(value: float) -> float:
    return max(_LOWEST, value) if not math.isnan(value) else _LOWEST


def _chat_logprobs(logprobs: tuple[LlmLogprob, ...]) -> list[dict[str, Any]]:
    return [
        {
            "token": each.token,
            "logprob": _log(each.logprob),
            "bytes": list(each.bytes),
            "top_logprobs": [
                {"token": token, "logprob": _log(logprob), "bytes": list(raw)} for token, logprob, raw in each.top
            ],
        }
        for each in logprobs
    ]


@dataclass(slots=True)
class _Offsets:
    """Where each choice's tokens begin in its text, characters."""

    at: dict[int, int] = field(default_factory=dict)

    def logprobs(self, choice: int, logprobs: tuple[LlmLogprob, ...]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self.at.get(choice, 0)
        for each in logprobs:
            out["tokens"].append(each.token)
            # The first token of an echoed prompt follows nothing: it has no probability.
            out["token_logprobs"].append(None if math.isnan(each.logprob) else _log(each.logprob))
            out["top_logprobs"].append({token: _log(logprob) for token, logprob, _ in each.top})
            out["text_offset"].append(offset)
            offset += len(each.token)
        self.at[choice] = offset
        return out


# -- streams -------------------------------------------------------------------------------------------------


class _ChunkWriter(ABC):
    content_type = EVENT_STREAM
    ping = PING
    object = ""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._head = {
            "id": note.id,
            "object": self.object,
            "created": note.created,
            "model": note.model,
            "system_fingerprint": note.fingerprint,
        }

    def outputs(self, first: int, outputs: list[bytes]) -> bytes:
        return b"".join(self._chunks(first + at, decode(data)) for at, data in enumerate(outputs))

    @abstractmethod
    def _chunks(self, ordinal: int, output: LlmOutput) -> bytes: ...

    def _chunk(self, choice: dict[str, Any], ordinal: int | None) -> bytes:
        chunk = {**self._head, "choices": [choice]}
        if self._note.usage:
            chunk["usage"] = None
        return json_event(chunk, ordinal=ordinal)

    def done(self, ended: Ended) -> bytes:
        last = b""
        if self._note.usage:
            last = json_event({**self._head, "choices": [], "usage": usage(ended.usage)})
        return last + DONE

    def error(self, info: ErrorInfo, exchange: Exchange) -> bytes:
        return json_event(shape(exchange.shown(info), exchange.request_id, owner=exchange.owner)) + DONE


class ChatWriter(_ChunkWriter):
    object = "chat.completion.chunk"

    def __init__(self, note: Note, *, resumed: bool = False) -> None:
        super().__init__(note)
        self._resumed = resumed
        self._greeted: set[int] = set()

    def _chunks(self, ordinal: int, output: LlmOutput) -> bytes:
        index = output.choice
        out = b""
        if index not in self._greeted and not self._resumed:
            self._greeted.add(index)
            delta = {"role": "assistant", "content": "", "refusal": None}
            out = self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, None)
        logprobs = {"content": _chat_logprobs(output.logprobs), "refusal": None} if output.logprobs else None
        if output.text or logprobs:
            choice = {"index": index, "delta": {"content": output.text}, "logprobs": logprobs, "finish_reason": None}
            out += self._chunk(choice, ordinal if output.finish is None else None)
        if output.finish is not None:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": output.finish}
            out += self._chunk(choice, ordinal)
        return out


class CompletionWriter(_ChunkWriter):
    object = "text_completion"

    def __init__(self, note: Note) -> None:
        super().__init__(note)
        self._offsets = _Offsets()

    def _chunks(self, ordinal: int, output: LlmOutput) -> bytes:
        if not output.text and not output.logprobs and output.finish is None:
            return b""  # tokens whose text is not certain yet
        logprobs = self._offsets.logprobs(output.choice, output.logprobs) if output.logprobs else None
        choice = {"index": output.choice, "text": output.text, "logprobs": logprobs, "finish_reason": output.finish}
        return self._chunk(choice, ordinal)


def writer_of(note: Note, *, resumed: bool = False) -> ChatWriter | CompletionWriter:
    """`resumed`: the client has had the role chunks."""
    return ChatWriter(note, resumed=resumed) if note.kind == "chat" else CompletionWriter(note)


# -- whole answers -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[LlmLogprob] = field(default_factory=list)
    finish: str | None = None


class Whole:
    """Gathers the outputs of one request."""

    def __init__(self, note: Note, choices: int) -> None:
        self._note = note
        self._choices = [_Choice() for _ in range(choices)]

    def take(self, outputs: list[bytes]) -> None:
        """Raises PlatformError for what is no output of this request."""
        for data in outputs:
            output = decode(data)
            if not 0 <= output.choice < len(self._choices):
                raise PlatformError(f"The model's instance answered choice {output.choice} of {len(self._choices)}.")
            choice = self._choices[output.choice]
            choice.text.append(output.text)
            choice.logprobs += output.logprobs
            choice.finish = output.finish or choice.finish

    def answer(self, ended: Ended) -> dict[str, Any]:
        chat = self._note.kind == "chat"
        render = self._chat if chat else self._completion
        return {
            "id": self._note.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": self._note.created,
            "model": self._note.model,
            "system_fingerprint": self._note.fingerprint,
            "choices": [render(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage(ended.usage),
        }

    def _chat(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = None
        if self._note.logprobs:
            logprobs = {"content": _chat_logprobs(tuple(choice.logprobs)), "refusal": None}
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish or "stop",
        }

    def _completion(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = _Offsets().logprobs(index, tuple(choice.logprobs)) if self._note.logprobs else None
        text = "".join(choice.text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish or "stop"}


def embeddings(data: bytes, model: str, coded: bool) -> dict[str, Any]:
    """The answer of /v1/embeddings. Raises PlatformError when `data` is no LlmEmbeddings."""
    try:
        result = msgspec.msgpack.decode(data, type=LlmEmbeddings)
        vectors = [_vector(vector, coded) for vector in result.vectors]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PlatformError(f"The model's instance answered no embeddings: {error}.") from None
    counts: LlmUsage = result.usage
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)],
        "model": model,
        "usage": {"prompt_tokens": counts.prompt_tokens, "total_tokens": counts.prompt_tokens},
    }


def _vector(data: bytes, coded: bool) -> str | list[float]:
    if coded:
        return base64.b64encode(data).decode()
    values = array("f")
    values.frombytes(data)
    return values.tolist()
