"""Text to token ids and back, for the language-model adapter.

    TextCodec      encode text or chat messages; decode ids
    Detokenizer    ids as they are drawn → text as it becomes certain
    StopMatcher    text → text up to a stop string
    TextStream     the two together, which is what a stream of an LLM goes through

It reads `tokenizer.json` with the tokenizers library and renders chat templates in jinja2's sandbox with what
transformers offers a template, so it imports no torch; only a model without `tokenizer.json` needs
transformers. Invariant: what was shown after n tokens is a function of these n tokens alone, however they
arrived; so after a hand-over the state is rebuilt by feeding them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from sllm_faas.errors import BadRequest, CheckpointCorrupt, UnsupportedParameter

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are not (yet) a character


class _Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextCodec:
    """A model's tokenizer and chat template. `load` makes one."""

    def __init__(self, tokenizer: _Tokenizer, template: str | None, specials: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._specials = dict(specials)
        try:
            self._template = _compile(template) if template is not None else None
        except ValueError as error:
            raise CheckpointCorrupt(f"the chat template is not valid: {error}.") from error

    @classmethod
    def load(cls, directory: Path) -> TextCodec:
        """From the tokenizer files of a checkpoint object. Raises CheckpointCorrupt."""
        config = _read_json(directory / "tokenizer_config.json")
        tokenizer: _Tokenizer
        if (directory / "tokenizer.json").is_file():
            tokenizer = _Fast(directory / "tokenizer.json")
        else:
            tokenizer = _Slow(directory)
        return cls(tokenizer, _template_of(directory, config), _special_tokens(config))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with what the model expects around it (a begin token, say)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None) -> list[int]:
        """The ids of a conversation up to where the assistant speaks. `template` overrides the model's own.

        Messages are OpenAI's: `role`, and `content` as text or a list of text parts. Raises BadRequest when
        there is no template or it refuses the messages, UnsupportedParameter for parts that are not text.
        """
        return self._encode(self.render_chat(messages, template=template), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None) -> str:
        from jinja2 import TemplateError

        try:
            compiled = _compile(template) if template is not None else self._template
        except ValueError as error:
            raise BadRequest(f"the chat template is not valid: {error}.", param="chat_template") from error
        if compiled is None:
            raise BadRequest(
                "this model has no chat template.",
                hint="Use /v1/completions, or deploy it with a chat_template.jinja beside its config.json.",
                param="messages",
            )
        plain = [_plain(message, index) for index, message in enumerate(messages)]
        try:
            return str(
                compiled.render(
                    messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._specials
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}.", param="messages") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(ids)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text has half of a surrogate pair in it; it is not valid Unicode.") from None
        return self._tokenizer.encode(text, add_special_tokens)


class Detokenizer:
    """Text as it becomes certain: characters whose bytes are still coming are withheld.

    Ids are decoded in a window that starts with the ids last shown, because what a decoder makes of an id
    depends on the one before it (a leading space, say). Where bytes never make a character the text may differ
    from decoding all ids at once, as some decoders then change their mind about earlier bytes; how ids arrive
    makes no difference even there."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._context: list[int] = []
        self._shown = 0  # characters of the decoded context
        self._new: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` make certain."""
        return "".join(self._push(token) for token in ids)

    def finish(self) -> str:
        """What was withheld: the bytes of a character that never came, as replacement characters."""
        text = self._codec.decode([*self._context, *self._new])[self._shown :]
        self._context, self._new, self._shown = [], [], 0
        return text

    def _push(self, token: int) -> str:
        self._new.append(token)
        text = self._codec.decode([*self._context, *self._new])
        if len(text) <= self._shown or text.endswith(_UNFINISHED):
            return ""
        certain = text[self._shown :]
        self._context, self._new = self._new, []
        self._shown = len(self._codec.decode(self._context))
        return certain


class StopMatcher:
    """Text up to the first stop string to be completed; the stop string itself is never let through.

    A tail that could be the beginning of one is withheld until it is known not to be. Of several that are
    completed by the same character, the longest counts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What may be shown now. After a match: nothing."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The withheld tail, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Drawn ids in, text to show out. Do not feed the end-of-sequence token.

        stream = TextStream(codec, stops=["\\n\\n"], tokens=drawn_elsewhere)
        text = stream.feed(ids)       # stream.stopped: stop generating
        text = stream.finish()        # at the end, unless stopped

    `tokens` are ids whose text somebody else has shown already; it is not shown again, `stream.text_shown`
    counts it."""

    def __init__(self, codec: TextCodec, stops: Sequence[str] = (), tokens: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(codec)
        self._matcher = StopMatcher(stops)
        self.text_shown = 0
        self.feed(tokens)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._matcher.matched

    def feed(self, ids: Sequence[int]) -> str:
        shown = []
        for token in ids:
            if self.stopped is not None:
                break
            shown.append(self._matcher.feed(self._detokenizer.feed([token])))
        return self._count("".join(shown))

    def finish(self) -> str:
        if self.stopped is not None:
            return ""
        return self._count(self._matcher.feed(self._detokenizer.finish()) + self._matcher.finish())

    def _count(self, text: str) -> str:
        self.text_shown += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest tail of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


# -- tokenizers ----------------------------------------------------------------------------------------------


class _Fast:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointCorrupt(f"{path} is not a tokenizer: {str(error)[:200]}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class _Slow:
    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # broken or missing files: many types
            raise CheckpointCorrupt(f"the tokenizer in {directory} cannot be loaded: {str(error)[:200]}.") from error

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


# -- chat templates ------------------------------------------------------------------------------------------


def _compile(template: str) -> Any:
    """Raises ValueError when it is no template."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise ValueError(str(error)) from error


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is one string, as nearly all templates expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedParameter(
                f"messages[{index}].content has a part that is not text.", param=f"messages[{index}].content"
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def _template_of(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    value = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, by the names templates use."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{path} is missing: the checkpoint has no tokenizer.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} is not a JSON object.")
    return value
