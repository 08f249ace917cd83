"""OpenAI's request bodies into `LlmRequest`. Pure.

Three tables per endpoint say what may be there: the struct's fields are honoured (ranges in their types); `NEUTRAL`
parameters are accepted with the values that change nothing; everything else is a 400 that names it, and `UNSUPPORTED`
ones say so rather than "unknown". Errors: `BadRequest`, `UnsupportedParameter`, with `param` set.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from sllm_faas.errors import BadRequest, UnsupportedParameter
from sllm_faas.wire.llm import LlmRequest

Choices = Annotated[int, Meta(ge=1, le=128)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Stop = str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=4)]
Input = str | list[str | TokenId | list[TokenId]]
"""One prompt as text or ids, or a list of prompts of one kind."""
MAX_PROMPTS = 2048
MAX_CHOICES = 2048

_ANY = object()
"""A neutral parameter whose value never matters."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted: padding of chunks is not offered, and its absence changes no answer."""


class _Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both generating endpoints take. `top_k` and `ignore_eos` are extensions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None


class ChatBody(_Sampling, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=100_000)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class CompletionBody(_Sampling, kw_only=True):
    prompt: Input
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Choices | None = None


class EmbeddingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: Input
    encoding_format: Literal["float", "base64"] | None = None


_COMMON: dict[str, Any] = {"user": _ANY, "safety_identifier": _ANY, "prompt_cache_key": _ANY}
NEUTRAL: dict[type, dict[str, Any]] = {
    ChatBody: {
        **_COMMON,
        "metadata": _ANY,  # kept only with store, which is refused
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "logit_bias": (None, {}),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),  # there are no tools to choose from
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "prompt_cache_retention": (None,),
    },
    CompletionBody: {**_COMMON, "suffix": (None, ""), "logit_bias": (None, {})},
    EmbeddingBody: {**_COMMON, "dimensions": (None,)},
}
B = TypeVar("B", ChatBody, CompletionBody, EmbeddingBody)
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def parse(fields: dict[str, Any], kind: type[B]) -> B:
    """The body as `kind`. Raises BadRequest or UnsupportedParameter, naming the parameter."""
    neutral: dict[str, Any] = NEUTRAL[kind]
    known: tuple[str, ...] = kind.__struct_fields__
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name not in neutral:
            near = difflib.get_close_matches(name, [*known, *neutral], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else ""
            raise BadRequest(f"Unknown parameter: {name[:100]!r}.", param=name[:100], hint=hint)
        elif neutral[name] is not _ANY and not _among(value, neutral[name]):
            raise UnsupportedParameter(f"{name!r} is not supported.", param=name, hint="Leave it out.")
    try:
        body = msgspec.convert(kept, kind)
    except msgspec.ValidationError as error:
        raise bad_value(error) from None
    if isinstance(body, _Sampling):
        _check_stream_options(body)
    return body


def _among(value: Any, allowed: Collection[Any]) -> bool:
    """Equality that does not take 0 for False."""
    return any(type(value) is type(other) and value == other for other in allowed)


def bad_value(error: msgspec.ValidationError) -> BadRequest:
    """What msgspec found, with the parameter it found it at."""
    text = str(error)
    at = _PATH.search(text)
    if at:
        return BadRequest(f"{at[1]}: {text[: at.start()]}.", param=at[1].partition("[")[0])
    missing = re.search(r"missing required field `(\w+)`", text)
    return BadRequest(f"{text}.", param=missing[1] if missing else "")


def _check_stream_options(body: _Sampling) -> None:
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed with stream=true.", param="stream_options")


def _stops(stop: Stop | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    if stop == "":
        raise BadRequest("stop is an empty string; allowed: one that is not.", param="stop")
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _sampling(body: _Sampling, draw: Callable[[], int]) -> dict[str, Any]:
    return {
        "n": 1 if body.n is None else body.n,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "seed": draw() if body.seed is None else body.seed & (2**63 - 1),
        "stop": _stops(body.stop),
        "ignore_eos": bool(body.ignore_eos),
    }


# -- chat ----------------------------------------------------------------------------------------------------

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse_chat(body: ChatBody, draw: Callable[[], int]) -> LlmRequest:
    """`draw` gives a seed when the client did not."""
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs is only allowed with logprobs=true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise BadRequest("max_tokens and max_completion_tokens contradict each other.", param="max_tokens")
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if limit == 0:
        raise BadRequest("max_tokens is 0; allowed: at least 1.", param="max_tokens")
    return LlmRequest(
        messages=tuple(_message(message, f"messages[{at}]") for at, message in enumerate(body.messages)),
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **_sampling(body, draw),
    )


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role in ("tool", "function"):
        raise UnsupportedParameter(f"{where}: tools are not supported.", param="messages")
    if not isinstance(role, str) or role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise BadRequest(f"{where}.role is {_shown(role)}; allowed: {allowed}.", param="messages")
    out: dict[str, Any] = {"role": _ROLES[role], "content": _content(message.get("content"), f"{where}.content")}
    for name, value in message.items():
        if name in ("role", "content"):
            continue
        if name == "name":
            if not isinstance(value, str):
                raise BadRequest(f"{where}.name is {_shown(value)}; allowed: a string.", param="messages")
            out["name"] = value
        elif name in ("tool_calls", "function_call", "refusal", "audio", "annotations"):
            if value not in (None, []):
                raise UnsupportedParameter(f"{where}.{name} is not supported.", param="messages")
        else:
            raise BadRequest(f"{where} has an unknown field {name[:100]!r}.", param="messages")
    return out


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{where} is {_shown(content)}; allowed: text, or a list of text parts.", param="messages")
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file", "refusal"):
            raise UnsupportedParameter(f"{where}[{at}]: {kind} parts are not supported.", param="messages")
        if kind != "text" or not isinstance(part.get("text"), str) or not part.keys() <= {"type", "text"}:
            raise BadRequest(f"{where}[{at}] is not a text part; allowed: type and text.", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def _shown(value: Any) -> str:
    """Never the value of a text: it may be a prompt."""
    if isinstance(value, str):
        return repr(value) if len(value) < 20 and value.isidentifier() else "another text"
    return {type(None): "missing", dict: "an object", list: "an array"}.get(type(value), type(value).__name__)


# -- completions and embeddings ------------------------------------------------------------------------------


def parse_completion(body: CompletionBody, draw: Callable[[], int]) -> LlmRequest:
    n = body.n or 1
    if body.best_of not in (None, n):
        raise UnsupportedParameter("best_of other than n is not supported.", param="best_of", hint="Leave it out.")
    prompts = parse_input(body.prompt, "prompt")
    if len(prompts) * n > MAX_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts × n={n}; allowed: {MAX_CHOICES} choices.", param="n")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens is 0 without echo: there would be no answer.", param="max_tokens")
    return LlmRequest(
        prompts=prompts, max_tokens=max_tokens, logprobs=body.logprobs, echo=bool(body.echo), **_sampling(body, draw)
    )


def parse_input(value: Input, param: str) -> tuple[str | tuple[int, ...], ...]:
    """The prompts of `value`: text, or token ids. Raises BadRequest for none, or an empty one of ids."""
    if isinstance(value, str):
        return (value,)
    if not value:
        raise BadRequest(f"{param} is an empty list; allowed: text, token ids, or a list of either.", param=param)
    ids = [one for one in value if isinstance(one, int)]
    if len(ids) == len(value):
        return (tuple(ids),)
    if len(value) > MAX_PROMPTS:
        raise BadRequest(f"{param} has {len(value)} entries; allowed: {MAX_PROMPTS}.", param=param)
    if len({type(one) for one in value}) > 1:
        raise BadRequest(f"{param} mixes kinds; allowed: all text, all ids, or all lists of ids.", param=param)
    prompts: list[str | tuple[int, ...]] = []
    for at, one in enumerate(value):
        if isinstance(one, str):
            prompts.append(one)
        elif isinstance(one, list) and one:
            prompts.append(tuple(one))
        else:
            raise BadRequest(f"{param}[{at}] has no token ids.", param=param)
    return tuple(prompts)
