"""What another instance needs to go on with an invocation, kept from the outputs its gateway believed. Pure.

    way        of                               resume state
    tokens     chat, complete of a model        `LlmResume`: each choice's tokens, and how it ended if it has
    output     a resumable generator            its last output, the bytes that were sent
    anew       embed of a model                 none: it says nothing before its end and changes nothing; run it again
    never      everything else                  -

The container of an invocation tells the same state in STATE, byte for byte. Invariant: a state depends on the outputs
taken and on nothing else, least of all on how they were batched.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sllm_faas.errors import WireError
from sllm_faas.spec import FunctionKind, MethodSpec
from sllm_faas.wire import codec
from sllm_faas.wire.llm import FinishReason, LlmResume

Way = Literal["never", "anew", "output", "tokens"]
_FOLD = 256
"""Outputs kept as they came before their tokens are taken out of them: off the path of a token, and bounded."""

MAX_CHOICES = 65_536


class Resume(Protocol):
    def take(self, outputs: Sequence[bytes]) -> None:
        """The outputs that follow those taken before. Never raises."""

    def state(self) -> bytes:
        """What another instance needs after them. Raises WireError when the outputs are not what they should be."""


def way_of(kind: FunctionKind, method: str, spec: MethodSpec | None) -> Way:
    """How calls of a method go on elsewhere. `spec` is None for the methods of a model."""
    if kind == "llm":
        return "anew" if method == "embed" else "tokens"
    return "output" if spec is not None and spec.resumable else "never"


def begin(way: Way, state: bytes = b"") -> Resume | None:
    """The resume state of a call that began from `state`; None when it cannot be resumed."""
    match way:
        case "tokens":
            return Tokens(state)
        case "output":
            return LastOutput(state)
        case "anew":
            return Anew()
        case "never":
            return None


class Anew:
    def take(self, outputs: Sequence[bytes]) -> None:
        """It has none."""

    def state(self) -> bytes:
        return b""


class LastOutput:
    """A resumable generator's."""

    def __init__(self, state: bytes = b"") -> None:
        self._state = state

    def take(self, outputs: Sequence[bytes]) -> None:
        if outputs:
            self._state = codec.pack(outputs[-1])

    def state(self) -> bytes:
        return self._state


def last_output(state: bytes) -> bytes | None:
    """The output in a generator's resume state; None when there was none yet. Raises WireError."""
    return codec.unpack_as(bytes, state) if state else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of an `LlmOutput`, what the state is made of; the rest is not decoded."""

    choice: int = 0
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None


class Tokens:
    """A generation's. Choices that have said nothing, behind the last that has, are left out."""

    def __init__(self, state: bytes = b"") -> None:
        self._begun = state
        self._pending: list[bytes] = []
        self._tokens: list[array[int]] = []
        self._finish: list[FinishReason | None] = []
        self._wrong = ""

    def take(self, outputs: Sequence[bytes]) -> None:
        self._pending.extend(outputs)
        if len(self._pending) >= _FOLD:
            self._fold()

    def state(self) -> bytes:
        self._fold()
        if self._wrong:
            raise WireError(f"the outputs of a generation cannot be read: {self._wrong}")
        return codec.pack(LlmResume(tuple(map(tuple, self._tokens)), tuple(self._finish)))

    def _fold(self) -> None:
        begun, self._begun = self._begun, b""
        pending, self._pending = self._pending, []
        if self._wrong:
            return
        try:
            if begun:
                resume = codec.unpack_as(LlmResume, begun)
                self._tokens = [array("I", tokens) for tokens in resume.tokens]
                self._finish = list(resume.finish)
            for output in pending:
                self._add(codec.unpack_as(_Piece, output))
        except (WireError, ValueError, OverflowError) as error:
            self._wrong = str(error)

    def _add(self, piece: _Piece) -> None:
        at = piece.choice
        if not 0 <= at < MAX_CHOICES:
            raise ValueError(f"choice {at}; allowed: 0 to {MAX_CHOICES - 1}")
        while len(self._tokens) <= at:
            self._tokens.append(array("I"))
            self._finish.append(None)
        self._tokens[at].extend(piece.tokens)
        self._finish[at] = piece.finish or self._finish[at]
