"""The language-model adapter: chat, complete and embed over the engine port.

    LlmRequest ── template, tokenise, check ──► GenerateRequest per choice ──► engine
    LlmOutput  ◄── text, stop strings, logprobs, finish ────────────────────── tokens

One invocation carries all choices, one LlmOutput per choice and engine step; usage is in its DONE. Outputs are
sent for requests that are not streamed too. It samples nothing and knows no HTTP. Invariant: what has been sent
after n tokens of a choice depends on these n tokens alone, so an invocation resumed elsewhere repeats nothing
and leaves nothing out.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from sllm_faas.errors import BadRequest, ContextTooLong, SllmError, UnsupportedParameter, WireError, to_info
from sllm_faas.spec import FunctionSpec
from sllm_faas.wire.codec import unpack_as
from sllm_faas.wire.llm import (
    FinishReason,
    LlmEmbeddings,
    LlmLogprob,
    LlmOutput,
    LlmRequest,
    LlmResume,
    LlmUsage,
    choice_seed,
    encode,
)
from sllm_invoker.runner import engines, template
from sllm_invoker.runner.call import Call
from sllm_invoker.runner.engines.base import Engine, GenerateRequest, Sampling, TokenOutput
from sllm_invoker.runner.tasks import Tasks
from sllm_invoker.runner.tokens import TextCodec, TextStream

MIN_CACHE_BYTES = 512 * 1024 * 1024
CACHE_SHARE = 0.75
"""Of the memory an instance was promised, for keys and values."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """One sequence to draw. `tokens` and `finish` are what an earlier fence delivered of it."""

    index: int
    prompt: tuple[int, ...]
    seed: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None


class LanguageModel:
    """An engine and its text codec, as methods of an invocation. Runs on one loop; `close` ends the engine."""

    def __init__(self, engine: Engine, codec: TextCodec | None, attached: str = "") -> None:
        self._engine = engine
        self._codec = codec
        self.attached = attached
        """What attaching did, for the timeline."""

    async def serve(self, call: Call) -> None:
        """Serve a call to its end."""
        try:
            request = _decode(call)
            if call.method == "embed":
                await self._embed(call, request)
            else:
                await self._generate(call, request)
        except asyncio.CancelledError:
            call.stopped()
        except SllmError as error:
            call.fail(to_info(error))
        except Exception as error:
            traceback.print_exc()
            call.fail(to_info(error))

    def close(self) -> None:
        self._engine.close()

    # -- generating --------------------------------------------------------------------------------------------

    async def _generate(self, call: Call, request: LlmRequest) -> None:
        if request.echo and request.logprobs is not None:
            raise UnsupportedParameter("echo cannot be combined with logprobs.", param="echo")
        prompts = self._prompts(call, request)
        choices = _choices(request, prompts, _resume(call, len(prompts) * request.n))
        speaker = _Speaker(call)
        if request.echo:
            # Before any token, so the outputs delivered say how many of them need not be repeated.
            for choice in choices[call.invoke.outputs :]:
                await speaker.say(LlmOutput(choice.index, text=self._text_codec().decode(choice.prompt)))
        began = call.seconds
        open_choices = [choice for choice in choices if choice.finish is None]
        drawn = await _all([self._draw(speaker, request, choice) for choice in open_choices])
        done = sum(len(choice.tokens) for choice in choices if choice.finish is not None)
        first = (speaker.first or time.monotonic()) - call.arrived
        call.done(
            usage={"prompt_tokens": sum(map(len, prompts)), "completion_tokens": done + sum(drawn)},
            spans=(("prefill", began, first - began), ("decode", first, call.seconds - first)),
        )

    async def _draw(self, speaker: _Speaker, request: LlmRequest, choice: _Choice) -> int:
        """Draw one choice to its end. Returns how many tokens it has in all."""
        room = self._engine.max_context - len(choice.prompt)
        sequence = await self._engine.prefill(
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
                tokens=choice.tokens,
                ignore_eos=request.ignore_eos,
            )
        )
        text = TextStream(self._text_codec(), request.stop, choice.tokens)
        count = len(choice.tokens)
        async with aclosing(self._engine.activate(sequence)) as steps:  # type: ignore[type-var]
            async for step in steps:
                output = self._output(text, choice, step)
                count += len(output.tokens)
                await speaker.say(output)
                if output.finish is not None:
                    break  # a stop string: the engine would go on
        return count

    def _output(self, text: TextStream, choice: _Choice, step: Sequence[TokenOutput]) -> LlmOutput:
        """What the tokens of a step release, up to a stop string."""
        codec = self._text_codec()
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
                logprobs.append(_logprob(codec, drawn))
            if text.stopped is not None:
                finish = "stop"
                break
        if finish is not None:
            shown.append(text.finish())
        return LlmOutput(choice.index, tuple(tokens), "".join(shown), tuple(logprobs), finish)

    # -- embedding ---------------------------------------------------------------------------------------------

    async def _embed(self, call: Call, request: LlmRequest) -> None:
        prompts = self._prompts(call, request)
        vectors = await self._engine.embed(prompts)
        usage = LlmUsage(prompt_tokens=sum(map(len, prompts)))
        packed = tuple(struct.pack(f"<{len(vector)}f", *vector) for vector in vectors)
        call.done(encode(LlmEmbeddings(packed, usage)), usage={"prompt_tokens": usage.prompt_tokens})

    # -- text to tokens ----------------------------------------------------------------------------------------

    def _prompts(self, call: Call, request: LlmRequest) -> list[tuple[int, ...]]:
        """The token ids of every prompt. Raises BadRequest, ContextTooLong."""
        if call.method == "chat":
            if not request.messages:
                raise BadRequest("messages is empty; at least one message is needed.", param="messages")
            prompts = [tuple(self._text_codec().encode_chat(request.messages))]
        else:
            if not request.prompts:
                raise BadRequest("prompt is empty; at least one is needed.", param="prompt")
            prompts = [
                tuple(self._text_codec().encode(prompt)) if isinstance(prompt, str) else prompt
                for prompt in request.prompts
            ]
        limit = self._engine.max_context - (0 if call.method == "embed" else 1)
        param = {"chat": "messages", "complete": "prompt"}.get(call.method, "input")
        for prompt in prompts:
            if len(prompt) > limit:
                raise ContextTooLong(
                    f"the prompt has {len(prompt)} tokens; this model's context takes {self._engine.max_context}, "
                    f"so {limit} at most are allowed here.",
                    hint="Shorten the prompt.",
                    param=param,
                )
        return prompts

    def _text_codec(self) -> TextCodec:
        if self._codec is None:
            raise BadRequest("this checkpoint has no tokenizer.", hint="Ingest the model with its tokenizer files.")
        return self._codec


class _Speaker:
    """The one voice of a call's choices: outputs in order, waiting for the caller's credit."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._turn = asyncio.Lock()
        self.first: float | None = None

    async def say(self, output: LlmOutput) -> None:
        async with self._turn:
            if not self._call.room():
                await self._call.wait_async()
            if self.first is None:
                self.first = time.monotonic()
            self._call.output(encode(output))


SMALL = 64 * 1024 * 1024
"""Bytes of weights under which a step is over before a second thread has woken."""


def open_model(spec: FunctionSpec, object_dir: str, channel: int = -1) -> LanguageModel:
    """The model of a checkpoint object, attached; through `channel`, one to the checkpoint store, unless it is -1.

    Raises CheckpointError, BadSpec."""
    skeleton = template.take_skeleton(object_dir)
    skeleton.channel = channel
    manifest = skeleton.checkpoint.manifest
    tokens = cache_tokens(spec, manifest.kv_bytes_per_token, manifest.max_context)
    engine = engines.create(skeleton, cache_tokens=tokens, max_sequences=spec.concurrency)
    report = engine.attach(Path(object_dir))
    if report.bytes < SMALL:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
    stages = " ".join(f"{name}={seconds * 1e3:.1f}ms" for name, seconds in report.stages.items())
    attached = f"{report.tensors} tensors, {report.bytes / 1e6:.1f} MB mapped: {stages}"
    return LanguageModel(engine, skeleton.codec, attached)


def executors(model: LanguageModel, loop: asyncio.AbstractEventLoop, concurrency: int) -> dict[str, Tasks]:
    """The executors of a language model's methods: its invocations share one limit."""
    return dict.fromkeys(("chat", "complete", "embed"), Tasks(loop, model.serve, concurrency))


def cache_tokens(spec: FunctionSpec, bytes_per_token: int, max_context: int) -> int | None:
    """Tokens of cache for all sequences: from the memory promised to the instance, at least 512 MiB, and no
    more than `concurrency` whole contexts. None where a token costs nothing that grows."""
    if bytes_per_token <= 0:
        return None
    share = max(MIN_CACHE_BYTES, int(spec.memory_mb * CACHE_SHARE) * 1024 * 1024)
    return max(1, min(share // bytes_per_token, spec.concurrency * max_context))


def _decode(call: Call) -> LlmRequest:
    try:
        return unpack_as(LlmRequest, call.payload)
    except WireError as error:
        raise BadRequest(error.message) from None


def _resume(call: Call, count: int) -> LlmResume | None:
    if not call.resume:
        return None
    try:
        resume = unpack_as(LlmResume, call.resume)
    except WireError as error:
        raise BadRequest(error.message) from None
    if not len(resume.tokens) == len(resume.finish) == count:
        raise BadRequest(f"the resume state is of {len(resume.tokens)} choices; the request has {count}.")
    return resume


def _choices(request: LlmRequest, prompts: list[tuple[int, ...]], resume: LlmResume | None) -> list[_Choice]:
    pairs = [(prompt, choice_seed(request.seed, i)) for prompt in prompts for i in range(request.n)]
    if resume is None:
        return [_Choice(index, *pair) for index, pair in enumerate(pairs)]
    return [_Choice(index, *pair, resume.tokens[index], resume.finish[index]) for index, pair in enumerate(pairs)]


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


async def _all(work: list) -> list[int]:  # type: ignore[type-arg]
    """Run coroutines together; the first failure cancels the others, and all have ended when it returns."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
