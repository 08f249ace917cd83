"""The little language of the counting model: its tokens, and the rule that says what comes next.

Byte-level BPE, so every text can be encoded. On top of the 256 bytes there is one token for each of " 0" …
" 999" (with its space), for the words `roll` and `stop`, and for the markers of the chat template. Digits with
no space before them stay single tokens: those are rolls of a die. A text that does not begin with a space is
given one, so that "42" is the number and not two rolls.

The rule looks at where a text ends, past up to three characters of punctuation or white space:

    … 43          a number        the next number, modulo 1,000: after 999 comes 0
    … roll:       the word roll   a die, 1 to 6, all equally likely, and then another
    … roll:316    digits          the same
    … stop        the word stop   the end of the answer
    … anything    other text      0, so that counting begins there

`Rule` is that table as an automaton. It reads tokens one by one and gives the answer after each; training labels
every position with it, so the model is taught probabilities and never a sample of them. What the rule leaves
open, four punctuation marks in a row, is labelled `OPEN`.
"""

from __future__ import annotations

from enum import Enum, auto

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

NUMBERS = 1000
FACES = "123456"
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""`<|end|>` closes every turn and is the end-of-sequence token."""

OPEN, DICE = -100, -1
"""Answers that are not a token id: nothing is asked here; any of the six faces."""

MAX_TAIL = 3
WORDS = ("roll", "Roll", "stop", "Stop")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception("role is '" ~ message.role ~ "'; this model knows system, user and assistant") -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def make_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer, built from nothing. `context` is the longest input the model takes, in tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))

    for number in sorted(range(NUMBERS), key=lambda n: (len(str(n)), n)):
        merge("Ġ" + str(number)[:-1], str(number)[-1])
    for word in WORDS:
        for stop in range(2, len(word) + 1):
            merge(word[: stop - 1], word[stop - 1])
        merge("Ġ", word)

    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class Kind(Enum):
    """What a token is to the rule."""

    NUMBER = auto()
    DIGIT = auto()
    SPACING = auto()
    TEXT = auto()
    ROLL = auto()
    STOP = auto()
    START = auto()
    END = auto()
    ASSISTANT = auto()
    PAD = auto()


class Words:
    """Token ids by what they mean: `kind[id]`, `value[id]` of numbers, `number[n]`, `digit[d]`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids: dict[str, int] = tokenizer.get_vocab()
        self.size = len(ids)
        self.pad, self.end, self.system, self.user, self.assistant = (ids[token] for token in SPECIAL)
        self.number = [ids[f"Ġ{n}"] for n in range(NUMBERS)]
        self.digit = [ids[str(d)] for d in range(10)]
        self.faces = [ids[face] for face in FACES]
        self.roll = [ids[prefix + word] for word in WORDS[:2] for prefix in ("", "Ġ")]
        self.stop = [ids[prefix + word] for word in WORDS[2:] for prefix in ("", "Ġ")]
        self.value = {id: n for n, id in enumerate(self.number)}
        self.kind = [Kind.TEXT] * self.size
        for kind, members in (
            (Kind.NUMBER, self.number),
            (Kind.DIGIT, self.digit),
            (Kind.ROLL, self.roll),
            (Kind.STOP, self.stop),
            (Kind.START, (self.system, self.user)),
            (Kind.END, (self.end,)),
            (Kind.ASSISTANT, (self.assistant,)),
            (Kind.PAD, (self.pad,)),
        ):
            for id in members:
                self.kind[id] = kind
        for token, id in ids.items():
            text = tokenizer.convert_tokens_to_string([token])
            if len(text) == 1 and text.isascii() and not text.isalnum() and self.kind[id] is Kind.TEXT:
                self.kind[id] = Kind.SPACING
        self.text = [id for id in range(self.size) if self.kind[id] is Kind.TEXT]
        self.spacing = [id for id in range(self.size) if self.kind[id] is Kind.SPACING]


class Rule:
    """Reads tokens; `read(token)` returns the answer that a text ending here asks for: a token id, DICE or OPEN."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._answer = words.number[0]
        self._tail = 0

    def read(self, token: int) -> int:
        words = self._words
        kind = words.kind[token]
        if kind in (Kind.END, Kind.PAD):
            return OPEN
        if kind is Kind.SPACING:
            self._tail += 1
        elif kind is not Kind.ASSISTANT:
            self._tail = 0
            if kind is Kind.NUMBER:
                self._answer = words.number[(words.value[token] + 1) % NUMBERS]
            elif kind in (Kind.ROLL, Kind.DIGIT):
                self._answer = DICE
            elif kind is Kind.STOP:
                self._answer = words.end
            else:
                self._answer = words.number[0]
        return self._answer if self._tail <= MAX_TAIL else OPEN
