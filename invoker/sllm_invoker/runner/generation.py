"""One `chat` or `complete` while it lasts: its choices, what was said of them, and how it moves.

    INVOKE ───────────────────────────────► draw every choice to its end, saying each step
    HOLD ──► compute, silently ──► HELD ─┬─► HOLD: extend ──► HELD
                                         └─► ACTIVATE: draw on
    SNAPSHOT ──► STATE of what was said          PAUSE ──► stop at the next token boundary, say what was drawn, STATE

`told` is what the caller knows of a choice; it changes in the same breath as the call's outputs are counted, so the
state that goes with an ordinal is always at hand. Everything here runs on the engine's loop. Invariant: what is said
after n tokens of a choice depends on these n tokens alone, so a generation that goes on elsewhere repeats nothing and
leaves nothing out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from sllm_faas.errors import BadRequest, SllmError, WireError
from sllm_faas.wire.codec import pack, unpack_as
from sllm_faas.wire.header import Type
from sllm_faas.wire.llm import FinishReason, LlmLogprob, LlmOutput, LlmRequest, LlmResume, choice_seed, encode
from sllm_invoker.runner.call import Call
from sllm_invoker.runner.engines import base
from sllm_invoker.runner.engines.base import Engine, GenerateRequest, Sampling, TokenOutput
from sllm_invoker.runner.tokens import TextCodec, TextStream

FEED = 256
"""Tokens of a silent one whose text is worked out before others get their turn."""


@dataclass(slots=True, eq=False)
class _Choice:
    """One sequence to draw. `told` and `finish` are what the caller has, from here or from elsewhere."""

    index: int
    prompt: tuple[int, ...]
    seed: int
    told: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    sequence: base.Sequence | None = None
    text: TextStream | None = None
    behind: tuple[int, ...] = ()
    """Told elsewhere since the sequence was last extended."""
    speaks: bool = False


class Generation:
    """`run` serves the call to its end; `ask` answers SNAPSHOT, PAUSE and CONTINUE meanwhile."""

    def __init__(
        self, engine: Engine, codec: TextCodec, call: Call, request: LlmRequest, prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._call = call
        self._request = request
        pairs = [(prompt, choice_seed(request.seed, i)) for prompt in prompts for i in range(request.n)]
        self._choices = [_Choice(index, prompt, seed) for index, (prompt, seed) in enumerate(pairs)]
        self._turn = asyncio.Lock()
        self._said = asyncio.Event()
        self._pausing: asyncio.Task[None] | None = None
        self._first: float | None = None
        self._learn(call.position()[2])

    async def run(self) -> None:
        call = self._call
        try:
            if call.held:
                await self._hold()
            began = call.seconds
            await self._echo()
            await together([self._draw(choice) for choice in self._open()])
        finally:
            if self._pausing is not None:
                self._pausing.cancel()
            for choice in self._choices:
                if choice.sequence is not None:
                    self._engine.cancel(choice.sequence)
        first = (self._first or time.monotonic()) - call.arrived
        prompts = self._choices[:: self._request.n]
        call.done(
            usage={
                "prompt_tokens": sum(len(choice.prompt) for choice in prompts),
                "completion_tokens": sum(len(choice.told) for choice in self._choices),
            },
            spans=(("prefill", began, first - began), ("decode", first, call.seconds - first)),
        )

    def ask(self, kind: Type) -> None:
        if kind is Type.SNAPSHOT or (kind is Type.PAUSE and self._call.paused):
            self._tell()
        elif kind is Type.PAUSE:
            if self._pausing is None or self._pausing.done():
                self._pausing = asyncio.ensure_future(self._pause())
        elif kind is Type.CONTINUE:
            self._proceed()

    def _open(self) -> list[_Choice]:
        return [choice for choice in self._choices if choice.finish is None]

    # -- drawing and saying ------------------------------------------------------------------------------------

    async def _echo(self) -> None:
        """Before any token, so the outputs delivered say how many prompts need not be repeated."""
        if self._request.echo:
            for choice in self._choices[self._call.emitted :]:
                await self._say(choice, LlmOutput(choice.index, text=self._codec.decode(choice.prompt)))

    async def _draw(self, choice: _Choice) -> None:
        """Draw one choice to its end, saying each step."""
        if choice.sequence is None or choice.text is None:
            await self._compute(choice)
        assert choice.sequence is not None and choice.text is not None
        choice.speaks = True
        steps: AsyncIterator[list[TokenOutput]] = self._engine.activate(choice.sequence, choice.behind)
        async with aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                output = self._output(choice.text, choice.index, step)
                await self._say(choice, output)
                if output.finish is not None:
                    break  # a stop string: the engine would go on

    async def _compute(self, choice: _Choice, *, patient: bool = False) -> None:
        """Have the cache of all that is known of a choice computed and held, and its text ready to be gone on with."""
        request, room = self._request, self._engine.max_context - len(choice.prompt)
        known = tuple(choice.told)
        choice.sequence = await self._engine.prefill(
            GenerateRequest(
                prompt=choice.prompt,
                max_tokens=min(room, request.max_tokens) if request.max_tokens is not None else room,
                sampling=Sampling(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                    seed=choice.seed,
                    logprobs=request.logprobs,
                ),
                tokens=known,
                ignore_eos=request.ignore_eos,
                adapter=request.adapter,
            ),
            patient=patient,
        )
        choice.text = TextStream(self._codec, request.stop)
        for at in range(0, len(known), FEED):
            choice.text.feed(known[at : at + FEED])
            if at + FEED < len(known):
                await asyncio.sleep(0)

    def _output(self, text: TextStream, index: int, step: Sequence[TokenOutput]) -> LlmOutput:
        """What the tokens of a step release, up to a stop string."""
        tokens: list[int] = []
        shown: list[str] = []
        logprobs: list[LlmLogprob] = []
        finish: FinishReason | None = None
        for drawn in step:
            tokens.append(drawn.token)
            finish = drawn.finish
            if finish == "stop":
                break  # the end-of-sequence token: it has no text
            shown.append(text.feed([drawn.token]))
            if drawn.logprob is not None:
                logprobs.append(_logprob(self._codec, drawn))
            if text.stopped is not None:
                finish = "stop"
                break
        if finish is not None:
            shown.append(text.finish())
        return LlmOutput(index, tuple(tokens), "".join(shown), tuple(logprobs), finish)

    async def _say(self, choice: _Choice, output: LlmOutput) -> None:
        """The choices share one voice: outputs in order, waiting for the caller's credit."""
        async with self._turn:
            payload = encode(output)
            while not self._call.output(payload):
                self._said.set()  # nothing more can be said for now
                await self._call.wait_async()
            choice.told.extend(output.tokens)
            choice.finish = output.finish
            if self._first is None:
                self._first = time.monotonic()
            self._said.set()

    # -- moving away -------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        told = LlmResume(
            tuple(tuple(choice.told) for choice in self._choices), tuple(choice.finish for choice in self._choices)
        )
        tokens = sum(len(choice.prompt) + len(choice.told) for choice in self._choices)
        self._call.tell(self._call.emitted, pack(told), tokens)

    async def _pause(self) -> None:
        speaking = [choice for choice in self._open() if choice.speaks and choice.sequence is not None]
        await asyncio.gather(*(self._engine.pause(choice.sequence) for choice in speaking if choice.sequence))
        while not all(self._quiet(choice) for choice in speaking):
            self._said.clear()
            await self._said.wait()
        if self._open():  # else it ends now, and nothing is left to be gone on with
            self._call.pause()
            self._tell()

    def _quiet(self, choice: _Choice) -> bool:
        """Everything drawn of a paused choice has been said, or cannot be for want of credit."""
        assert choice.sequence is not None
        return choice.finish is not None or len(choice.told) >= len(choice.sequence.tokens) or not self._call.room()

    def _proceed(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
        self._call.proceed()
        for choice in self._choices:
            if choice.sequence is not None:
                with suppress(SllmError):  # the engine is closing
                    self._engine.proceed(choice.sequence)

    # -- arriving ----------------------------------------------------------------------------------------------

    async def _hold(self) -> None:
        """Compute what is known elsewhere, again and again, until ACTIVATE."""
        call, loop = self._call, asyncio.get_running_loop()
        news = asyncio.Event()
        call.news = lambda: _wake(loop, news)
        await together([self._compute(choice, patient=True) for choice in self._open()])
        while True:
            held, outputs, resume = call.position()
            added = self._learn(resume)
            if not held:
                for choice, tokens in added:
                    choice.behind = tokens
                return
            await together([self._extend(choice, tokens) for choice, tokens in added])
            if call.position()[1] == outputs:
                call.tell_held(outputs)
                await news.wait()
            news.clear()

    async def _extend(self, choice: _Choice, tokens: tuple[int, ...]) -> None:
        assert choice.sequence is not None
        await self._engine.extend(choice.sequence, tokens)

    def _learn(self, state: bytes) -> list[tuple[_Choice, tuple[int, ...]]]:
        """Take in a resume state that follows the one known. Returns what it adds to choices that go on.

        Raises BadRequest when it is not of this request, or does not follow."""
        added = []
        resume = _decode(state, len(self._choices))
        for choice, tokens, finish in zip(self._choices, resume.tokens, resume.finish, strict=False):
            known = len(choice.told)
            if choice.told != list(tokens[:known]):
                raise BadRequest(f"the resume state of choice {choice.index} does not follow the one before it.")
            new = tokens[known:]
            choice.told.extend(new)
            choice.finish = finish
            if finish is not None and choice.sequence is not None:
                self._engine.cancel(choice.sequence)
            elif finish is None and new and choice.sequence is not None and choice.text is not None:
                choice.text.feed(new)
                added.append((choice, new))
        return added


def _decode(state: bytes, choices: int) -> LlmResume:
    if not state:
        return LlmResume((), ())
    try:
        resume = unpack_as(LlmResume, state)
    except WireError as error:
        raise BadRequest(error.message) from None
    if len(resume.tokens) != len(resume.finish) or len(resume.tokens) > choices:
        raise BadRequest(f"the resume state is of {len(resume.tokens)} choices; the request has {choices}.")
    return resume


def _logprob(codec: TextCodec, drawn: TokenOutput) -> LlmLogprob:
    def shown(token: int) -> tuple[str, tuple[int, ...]]:
        text = codec.decode([token])
        return text, tuple(text.encode())

    text, raw = shown(drawn.token)
    top = []
    for other in drawn.top:
        other_text, other_raw = shown(other.token)
        top.append((other_text, other.logprob, other_raw))
    return LlmLogprob(text, drawn.logprob or 0.0, raw, tuple(top))


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines together; the first failure cancels the others, and all have ended when it returns."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
