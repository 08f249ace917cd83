"""The language-model adapter: chat, complete and embed over the engine port.

    LlmRequest ── template, tokenise, check ──► GenerateRequest per choice ──► engine
    LlmOutput  ◄── text, stop strings, logprobs, finish ────────────────────── tokens

One invocation carries all choices, one LlmOutput per choice and engine step; usage is in its DONE. Outputs are
sent for requests that are not streamed too. It samples nothing and knows no HTTP; the life of a generation is
`generation`'s.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_faas.errors import BadRequest, ContextTooLong, NoCapacity, SllmError, UnsupportedParameter, WireError, to_info
from sllm_faas.spec import FunctionSpec
from sllm_faas.wire.codec import unpack_as
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.llm import LlmEmbeddings, LlmRequest, LlmUsage, encode
from sllm_invoker.checkpoints.object import open_object
from sllm_invoker.runner import engines, template
from sllm_invoker.runner.call import Call, Parts
from sllm_invoker.runner.engines.base import Engine
from sllm_invoker.runner.generation import Generation
from sllm_invoker.runner.moving import answer
from sllm_invoker.runner.tasks import Tasks
from sllm_invoker.runner.tokens import TextCodec

if TYPE_CHECKING:
    from sllm_invoker.runner.device_weights import Stage
    from sllm_invoker.runner.weights import Weights

MIN_CACHE_BYTES = 512 * 1024 * 1024
DEVICE_SHARE = 0.85
"""Of the memory a device has beside the weights, for keys and values; the rest is for what a forward pass makes."""
CACHE_SHARE = 0.75
"""Of the memory an instance was promised, for keys and values."""


class LanguageModel:
    """An engine and its text codec, as methods of an invocation. Runs on one loop; `close` ends the engine."""

    def __init__(self, engine: Engine, codec: TextCodec | None, attached: str = "") -> None:
        self._engine = engine
        self._codec = codec
        self._generations: dict[Call, Generation] = {}
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

    @property
    def context(self) -> int:
        """Tokens in the contexts of what runs and of what is held, those of a prompt included."""
        return self._engine.stats().cache_tokens

    def close(self) -> None:
        self._engine.close()

    async def _generate(self, call: Call, request: LlmRequest) -> None:
        if request.echo and request.logprobs is not None:
            raise UnsupportedParameter("echo cannot be combined with logprobs.", param="echo")
        prompts = self._prompts(call, request)
        generation = self._generations[call] = Generation(self._engine, self._text_codec(), call, request, prompts)
        try:
            await generation.run()
        finally:
            del self._generations[call]

    def ask(self, call: Call, kind: Type) -> None:
        """SNAPSHOT, PAUSE or CONTINUE of a call. On the loop."""
        generation = self._generations.get(call)
        if generation is not None:
            generation.ask(kind)
        else:  # it has not begun, and knows what it came with
            answer(call, kind)

    # -- embedding ---------------------------------------------------------------------------------------------

    async def _embed(self, call: Call, request: LlmRequest) -> None:
        if request.adapter:
            raise UnsupportedParameter("embeddings are of the model alone, not of an adapter.", param="model")
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


CONTEXT_INTERVAL = 1.0
SMALL = 64 * 1024 * 1024
"""Bytes of weights under which a step is over before a second thread has woken."""


def open_model(spec: FunctionSpec, object_dir: str, channel: int = -1, kept: int = -1) -> LanguageModel:
    """The model of a checkpoint object, attached; through `channel`, one to the checkpoint store, unless it is -1, and
    `kept`, one to what instances before left on the GPU.

    Raises CheckpointError, BadSpec; where the function asks for a GPU, Unavailable without one and NoCapacity on one
    that is too small."""
    stage, weights = _to_device(spec, object_dir, channel, kept) if spec.gpus else (None, None)
    skeleton = template.take_skeleton(spec, object_dir)
    skeleton.channel, skeleton.stage, skeleton.begun = channel, stage, weights
    manifest = skeleton.checkpoint.manifest
    per_token, context = manifest.kv_bytes_per_token, manifest.max_context
    if stage is not None:
        sequences, tokens = device_cache(stage.device.memory().free, per_token, context, spec.concurrency)
    else:
        sequences, tokens = spec.concurrency, cache_tokens(spec, per_token, context)
    engine = engines.create(skeleton, cache_tokens=tokens, max_sequences=sequences)
    report = engine.attach(Path(object_dir))
    if report.bytes < SMALL:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
    stages = " ".join(f"{name}={seconds * 1e3:.1f}ms" for name, seconds in report.stages.items())
    attached = f"{report.tensors} tensors, {report.bytes / 1e6:.1f} MB mapped: {stages}"
    if weights is not None and weights.tier == "gpu":
        attached = f"tier=gpu {attached}"
    return LanguageModel(engine, skeleton.codec, attached)


def _to_device(spec: FunctionSpec, object_dir: str, channel: int, kept: int) -> tuple[Stage, Weights]:
    """The weights are on their way to the GPU when this returns: the skeleton, which no template has made, is built
    beside that."""
    from sllm_invoker.runner import attach, cuda
    from sllm_invoker.runner.device_weights import DeviceWeights
    from sllm_invoker.runner.kept import Kept

    stage, checkpoint = cuda.open_stage(), open_object(Path(object_dir))
    manifest = checkpoint.manifest
    room = manifest.total_bytes + device_room(manifest.kv_bytes_per_token, manifest.max_context, spec.concurrency)
    weights = attach.begin(checkpoint, channel, None)
    return stage, DeviceWeights(weights, stage, Kept(kept, room) if kept >= 0 else None)


class Contexts:
    """Tells the invoker how long contexts have become: what a move of them would cost. On the loop."""

    def __init__(self, model: LanguageModel, send: Callable[[Parts], None], loop: asyncio.AbstractEventLoop) -> None:
        self._model = model
        self._send = send
        self._loop = loop
        self._told = 0

    def tell(self) -> None:
        """Now, if it has changed, and every second from here on."""
        tokens = self._model.context
        if tokens != self._told:
            self._told = tokens
            self._send([Header(Type.CONTEXT, seq=tokens).pack()])
        self._loop.call_later(CONTEXT_INTERVAL, self.tell)


class Generations(Tasks):
    """Calls of a language model: held ones are computed, and any may be asked for its state."""

    holds = True

    def __init__(self, model: LanguageModel, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        super().__init__(loop, model.serve, limit)
        self._model = model
        self._own_loop = loop

    def ask(self, call: Call, kind: Type) -> None:
        self._own_loop.call_soon_threadsafe(self._model.ask, call, kind)


def executors(model: LanguageModel, loop: asyncio.AbstractEventLoop, concurrency: int) -> dict[str, Generations]:
    """The executors of a language model's methods: its invocations share one limit."""
    return dict.fromkeys(("chat", "complete", "embed"), Generations(model, loop, concurrency))


def cache_tokens(spec: FunctionSpec, bytes_per_token: int, max_context: int) -> int | None:
    """Tokens of cache for all sequences: from the memory promised to the instance, at least 512 MiB, and no
    more than `concurrency` whole contexts. None where a token costs nothing that grows."""
    if bytes_per_token <= 0:
        return None
    share = max(MIN_CACHE_BYTES, int(spec.memory_mb * CACHE_SHARE) * 1024 * 1024)
    return max(1, min(share // bytes_per_token, spec.concurrency * max_context))


def device_room(bytes_per_token: int, max_context: int, concurrency: int) -> int:
    """Bytes of a device that an instance can use beside its weights: `device_cache`'s `room` for all it is asked to
    serve at once. What others left there is worth less than that."""
    return int(max(MIN_CACHE_BYTES, bytes_per_token * max_context * concurrency) / DEVICE_SHARE)


def device_cache(room: int, bytes_per_token: int, max_context: int, concurrency: int) -> tuple[int, int | None]:
    """Sequences at once, and tokens of cache for all of them, where `room` bytes of a device are left beside the
    weights: as many whole contexts as fit, else one that is shorter; None where a token costs nothing that grows.
    Raises NoCapacity."""
    if bytes_per_token <= 0:
        return concurrency, None
    fit = int(room * DEVICE_SHARE) // bytes_per_token
    if fit < 1:
        raise NoCapacity(
            f"{max(0, room)} bytes of GPU memory are left beside the weights; a token's cache takes {bytes_per_token}.",
            hint="Use a smaller model, or a GPU with more memory.",
        )
    sequences = max(1, min(concurrency, fit // max_context))
    return sequences, min(fit, sequences * max_context)


def _decode(call: Call) -> LlmRequest:
    try:
        return unpack_as(LlmRequest, call.payload)
    except WireError as error:
        raise BadRequest(error.message) from None
