"""The engine port over transformers models, with a step loop of its own.

    loop thread:    prefill, extend, activate, cancel, embed ──commands──►┐
                                                                          ▼
    step thread:    take commands → admit → prefill a budget of tokens, draw for who speaks → patient ones' chunk
                    → step all running sequences by one
                                                                          │
    loop thread:    futures resolved, streams fed  ◄──one call per step───┘

Theory. A sequence is waiting (no cache), filling (its prompt and tokens are being computed), held (computed,
silent) or running. Only the step thread touches the model, the cache and these states; the loop sends commands
and reads what comes back, so there is nothing to lock but the inbox. The thread sleeps on a condition while
there is nothing to do.

A recompute for somebody who is served elsewhere (`patient`) must not stall who is served here: between two steps it
gets one small chunk, which costs about what a step costs, and only when everybody who may speak has spoken. A
sequence that is paused keeps its place and its cache. What somebody waits for, a draw as much as the word that a
sequence is held or rests, leaves before the next forward begins: a hand-over is made of such waits.

Cache is admitted by tokens actually held. When running sequences outgrow it, the youngest gives its cache back
and waits to be computed again; since drawing is positional, its stream goes on as if nothing had happened.

Why not transformers' continuous batching (5.23), measured on the counting model, float32, one thread: it takes
4.0-4.5 ms per step for one stream and 5.0 for eight; this loop takes 1.5 and 2.2, where a bare forward loop
takes 1.3. And a held sequence exists there only as a side effect of a first, thrown-away request that leaves its
blocks in the prefix cache. Holding and extending are the point of this port; here they are two states.

Invariant: what a sequence draws depends on nothing but its own tokens, seed and position (see `sampling`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sllm_faas.errors import (
    BadRequest,
    Cancelled,
    ContextTooLong,
    PlatformError,
    SllmError,
    UnsupportedParameter,
)
from sllm_invoker.runner import attach as attaching
from sllm_invoker.runner.arriving import arriving
from sllm_invoker.runner.attach import Skeleton
from sllm_invoker.runner.engines.base import (
    AttachReport,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Sequence,
    TokenOutput,
)
from sllm_invoker.runner.engines.compute import Compute
from sllm_invoker.runner.engines.rows import Rows
from sllm_invoker.runner.engines.sequence import Embedding, State, TokenSequence
from sllm_invoker.runner.engines.solo import Solo
from sllm_invoker.runner.sampling import draw

DEFAULT_CACHE_BYTES = 1 << 30
DEFAULT_CACHE_TOKENS = 65536
STEP_TOKENS = 512
"""Prompt tokens computed between two steps of the running sequences, at most."""
HEADROOM = 64
"""Tokens a sequence must have room to grow by when it is placed, so that it is not thrown out again at once."""

_News = tuple[list[tuple[TokenSequence, TokenOutput]], list[Callable[[], None]]]


class TransformersEngine:
    """`base.Engine`; see the module."""

    def __init__(self, skeleton: Skeleton, *, cache_tokens: int | None, max_sequences: int) -> None:
        manifest = skeleton.checkpoint.manifest
        if cache_tokens is None:
            per_token = manifest.kv_bytes_per_token
            cache_tokens = DEFAULT_CACHE_BYTES // per_token if per_token else DEFAULT_CACHE_TOKENS
        self._skeleton = skeleton
        self._model = skeleton.model
        self._eos = skeleton.eos
        self._max_sequences = max(1, max_sequences)
        self._max_context = min(manifest.max_context, cache_tokens)
        self._capacity = cache_tokens
        self._vocabulary = manifest.vocabulary
        self._generates = manifest.generates
        self._compute: Compute
        if manifest.batched or not manifest.generates:
            self._compute = Rows(
                self._model,
                rows=self._max_sequences,
                capacity=self._max_context,
                adapters=skeleton.adapters,
                device=skeleton.device,
            )
        else:
            self._compute = Solo(self._model, skeleton.adapters, skeleton.device)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        # The step thread's own:
        self._sequences: list[TokenSequence] = []  # by arrival; those done are taken out
        self._embeddings: deque[Embedding] = deque()
        self._outputs: list[tuple[TokenSequence, TokenOutput]] = []
        self._posts: list[Callable[[], None]] = []
        self._steps = 0
        self._stats = EngineStats(0, 0, 0, 0, self._capacity, 0)

    # -- the port, on the loop thread ------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def attach(self, checkpoint: Path) -> AttachReport:
        return attaching.attach(self._skeleton, checkpoint)

    async def prefill(self, request: GenerateRequest, *, patient: bool = False) -> TokenSequence:
        self._check(request)
        sequence = TokenSequence(request=request, drawn=list(request.tokens), patient=patient)
        await self._ask(sequence, lambda: self._sequences.append(sequence))
        return sequence

    async def extend(self, sequence: Sequence, tokens: SequenceOf[int]) -> None:
        sequence = _own(sequence)
        if sequence.activated:
            raise BadRequest(f"a sequence that was activated cannot be extended: {sequence!r}.")
        await self._ask(sequence, self._joining(sequence, tokens))

    def activate(self, sequence: Sequence, tokens: SequenceOf[int] = ()) -> AsyncIterator[list[TokenOutput]]:
        sequence = _own(sequence)
        if sequence.activated:
            raise BadRequest(f"a sequence can be activated once: {sequence!r}.")
        join = self._joining(sequence, tokens)
        sequence.activated = True

        def begin() -> None:
            join()
            sequence.speaks, sequence.patient = True, False

        self._send(begin)
        return self._listen(sequence)

    def _joining(self, sequence: TokenSequence, tokens: SequenceOf[int]) -> Callable[[], None]:
        """The command that lets `tokens`, which are checked here, join a silent sequence."""
        added = list(tokens)
        self._check_ids(added, "tokens")
        self._check_room(sequence.request, len(sequence.drawn) + len(added))

        def join() -> None:
            sequence.drawn.extend(added)
            if sequence.state == "held" and added:
                sequence.state = "filling"

        return join

    async def pause(self, sequence: Sequence) -> None:
        sequence = _own(sequence)
        sequence.paused = True
        with contextlib.suppress(SllmError):  # its stream says so
            await self._answered(sequence, lambda: None)

    def proceed(self, sequence: Sequence) -> None:
        sequence = _own(sequence)
        sequence.paused = False
        self._send(lambda: None)

    async def _listen(self, sequence: TokenSequence) -> AsyncIterator[list[TokenOutput]]:
        stream = sequence.stream
        try:
            while True:
                await stream.wake.wait()
                stream.wake.clear()
                outputs, stream.pending = stream.pending, []
                ended, error = stream.ended, stream.error
                if error is not None:
                    raise error
                if outputs:
                    yield outputs
                if ended:
                    return
        finally:
            self.cancel(sequence)

    def cancel(self, sequence: Sequence) -> None:
        sequence = _own(sequence)
        if not sequence.stream.ended:
            sequence.stream.end(Cancelled("the sequence was cancelled."))
            sequence.cancelled = True  # seen between steps and between pieces of a prefill
            if not self._closing:
                self._send(lambda: None)

    async def embed(self, inputs: SequenceOf[SequenceOf[int]]) -> list[list[float]]:
        for ids in inputs:
            self._check_ids(ids, "input")
            if not ids:
                raise BadRequest("an input has no tokens.", param="input")
            if len(ids) > self._max_context:
                raise ContextTooLong(
                    f"an input has {len(ids)} tokens; the model takes {self._max_context}.", param="input"
                )
        future: asyncio.Future[list[list[float]]] = asyncio.get_running_loop().create_future()
        self._send(lambda: self._embeddings.append(Embedding(inputs, future)))
        return await future

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._inbox:
            self._inbox.popleft()()
        for sequence in list(self._sequences):
            self._forget(sequence, Cancelled("the engine was closed."))
        for embedding in self._embeddings:
            embedding.future.cancel()
        self._embeddings.clear()
        self._deliver(self._take_news())

    def _check(self, request: GenerateRequest) -> None:
        if not self._generates:
            architecture = self._skeleton.checkpoint.manifest.architecture
            raise UnsupportedParameter(f"{architecture} computes embeddings only; it cannot generate.", param="model")
        names = self._skeleton.adapters.names if self._skeleton.adapters is not None else ()
        if request.adapter and request.adapter not in names:
            raise BadRequest(f"there is no adapter {request.adapter!r}; there are: {', '.join(names) or 'none'}.")
        if not request.prompt:
            raise BadRequest("the prompt has no tokens; at least one is needed.", param="prompt")
        self._check_ids(request.prompt, "prompt")
        self._check_ids(request.tokens, "tokens")
        if request.max_tokens < 1:
            raise BadRequest(f"max_tokens is {request.max_tokens}; it must be at least 1.", param="max_tokens")
        self._check_room(request, len(request.tokens))

    def _check_room(self, request: GenerateRequest, drawn: int) -> None:
        if len(request.prompt) + drawn >= self._max_context:
            raise ContextTooLong(
                f"{len(request.prompt)} prompt tokens and {drawn} generated ones leave no room for one more in a "
                f"context of {self._max_context}.",
                hint="Shorten the prompt.",
                param="prompt",
            )
        if drawn >= request.max_tokens:
            raise BadRequest(f"{drawn} tokens are there already and max_tokens is {request.max_tokens}.")

    def _check_ids(self, tokens: SequenceOf[int], param: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._vocabulary):
            raise BadRequest(f"a token id is outside 0 to {self._vocabulary - 1}.", param=param)

    async def _ask(self, sequence: TokenSequence, command: Callable[[], None]) -> None:
        """`_answered` for who owns the sequence: when the waiter is cancelled, the sequence is."""
        try:
            await self._answered(sequence, command)
        except asyncio.CancelledError:
            self.cancel(sequence)
            raise

    async def _answered(self, sequence: TokenSequence, command: Callable[[], None]) -> None:
        """Run `command` on the step thread and wait until all of the sequence is computed, or it rests."""
        if sequence.stream.ended:
            raise Cancelled("the sequence has ended.")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def register() -> None:
            command()
            if sequence.state == "done":
                self._posts.append(partial(_fail, future, Cancelled("the sequence has ended.")))
            else:
                sequence.ready.append(future)

        self._send(register)
        await future

    def _send(self, command: Callable[[], None]) -> None:
        if self._closing:
            raise Cancelled("the engine was closed.")
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    # -- the step thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._take():
                self._post()
                with arriving(self._skeleton.weights):
                    self._guard(self._fill, ("waiting", "filling"))
                    self._guard(self._draw_fresh, ("running",))
                    self._guard(self._fill_patient, ("waiting", "filling"))
                    self._post()
                    self._guard(self._step, ("running",))
                    self._embed_some()
                self._post()

    def _take(self) -> bool:
        """Wait for something to do, run the commands, forget what was cancelled. False: closing."""
        with self._wake:
            while not (self._inbox or self._closing or self._busy()):
                self._wake.wait()
            if self._closing:
                return False
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()
        for sequence in list(self._sequences):
            if sequence.cancelled:
                self._forget(sequence, Cancelled("the sequence was cancelled."))
            elif sequence.paused and sequence.speaks:
                self._rest(sequence)
            elif sequence.state == "held":
                self._settle(sequence)
        return True

    def _busy(self) -> bool:
        active = any(s.state in ("filling", "running") for s in self._sequences)
        return active or bool(self._embeddings) or self._admissible() is not None

    def _guard(self, work: Callable[[], None], states: tuple[State, ...]) -> None:
        """A failing forward ends the sequences it was for; the engine goes on."""
        try:
            work()
        except Exception as error:
            failure = _failure(error)
            for sequence in [s for s in self._sequences if s.state in states and s.handle is not None]:
                self._forget(sequence, failure)

    def _admissible(self) -> TokenSequence | None:
        """The next sequence to be placed, if there is a place: first come, first served."""
        waiting = next((s for s in self._sequences if s.state == "waiting"), None)
        placed = sum(s.handle is not None for s in self._sequences)
        if waiting is None or placed >= self._max_sequences:
            return None
        ahead = min(waiting.request.max_tokens - len(waiting.drawn), HEADROOM)
        return waiting if placed == 0 or self._room() >= waiting.length + ahead else None

    def _room(self) -> int:
        """Tokens of cache that no placed sequence holds or is about to."""
        return self._capacity - sum(s.length for s in self._sequences if s.handle is not None)

    def _fill(self) -> None:
        """Place who may be placed, then compute a budget of prompt tokens, in order of arrival."""
        while (sequence := self._admissible()) is not None:
            handle = self._compute.open(sequence.request.adapter)
            sequence.handle, sequence.fed, sequence.state = handle, 0, "filling"
        self._feed([s for s in self._filling() if not s.patient], STEP_TOKENS, self._compute.chunk)

    def _fill_patient(self) -> None:
        """The others' turn: all of the budget while nobody speaks here or is about to, else one small chunk."""
        filling = self._filling()
        patient = [s for s in filling if s.patient]
        if self._running() or len(filling) > len(patient):
            self._feed(patient, 1, self._compute.small_chunk)
        else:
            self._feed(patient, STEP_TOKENS, self._compute.chunk)

    def _filling(self) -> list[TokenSequence]:
        return [s for s in self._sequences if s.state == "filling"]

    def _feed(self, sequences: list[TokenSequence], budget: int, chunk: int) -> None:
        """Compute what they lack, in pieces of `chunk` tokens until `budget` is used up."""
        for sequence in sequences:
            while budget > 0 and sequence.fed < sequence.length and not sequence.cancelled:
                piece = sequence.slice(sequence.fed, chunk)
                sequence.logits = self._compute.feed(_placed(sequence), piece)
                sequence.fed += len(piece)
                budget -= len(piece)
            if sequence.fed == sequence.length:
                self._settle(sequence)

    def _settle(self, sequence: TokenSequence) -> None:
        """All known tokens are computed: from here it is held, or speaks."""
        sequence.state = "running" if sequence.speaks and not sequence.paused else "held"
        self._answer(sequence)

    def _rest(self, sequence: TokenSequence) -> None:
        """Between two steps every sequence is at a token boundary: a paused one stays there."""
        if sequence.state == "running":
            sequence.state = "held"
        self._answer(sequence)

    def _answer(self, sequence: TokenSequence) -> None:
        waiters, sequence.ready = sequence.ready, []
        for future in waiters:
            self._posts.append(partial(_resolve, future, None))

    def _draw_fresh(self) -> None:
        """Draw for those just filled."""
        fresh = [s for s in self._running() if s.logits is not None]
        if fresh:
            self._draw(fresh, torch.stack([s.logits for s in fresh if s.logits is not None]))
            self._post()

    def _step(self) -> None:
        """Compute and draw one more token for every running sequence."""
        self._make_room()
        running = {_placed(s): s for s in self._running()}
        if running:
            order, logits = self._compute.step({handle: s.drawn[-1] for handle, s in running.items()})
            stepped = [running[handle] for handle in order]
            for sequence in stepped:
                sequence.fed += 1
            self._steps += 1
            self._draw(stepped, logits)

    def _running(self) -> list[TokenSequence]:
        return [s for s in self._sequences if s.state == "running" and not s.cancelled]

    def _draw(self, sequences: list[TokenSequence], logits: torch.Tensor) -> None:
        for sequence in sequences:
            sequence.logits = None
        rows = logits.float().cpu().numpy()
        sound = np.isfinite(rows.max(axis=1))
        if not sound.all():
            for sequence in [s for s, good in zip(sequences, sound, strict=True) if not good]:
                self._forget(sequence, PlatformError("the model's logits are not numbers."))
            sequences, rows = [s for s, good in zip(sequences, sound, strict=True) if good], rows[sound]
        drawn = draw(rows, [s.request.sampling for s in sequences], [s.drawn for s in sequences])
        for sequence, choice in zip(sequences, drawn, strict=True):
            position = len(sequence.drawn)
            sequence.drawn.append(choice.token)
            finish = self._finish(sequence, choice.token)
            output = TokenOutput(choice.token, position, choice.logprob, choice.top, finish)
            self._outputs.append((sequence, output))
            if finish is not None:
                self._remove(sequence)

    def _finish(self, sequence: TokenSequence, token: int) -> FinishReason | None:
        request = sequence.request
        if token in self._eos and not request.ignore_eos:
            return "stop"
        if len(sequence.drawn) >= request.max_tokens or sequence.length >= self._max_context:
            return "length"
        return None

    def _make_room(self) -> None:
        """While more is held than there is cache, the youngest that is not held for somebody gives its up."""
        while self._room() < 0:
            movable = [s for s in self._sequences if s.state in ("running", "filling") and s.handle is not None]
            if not movable:
                return
            youngest = movable[-1]
            self._compute.close(_placed(youngest))
            youngest.handle, youngest.fed, youngest.logits, youngest.state = None, 0, None, "waiting"

    def _remove(self, sequence: TokenSequence) -> None:
        if sequence.handle is not None:
            self._compute.close(sequence.handle)
        sequence.handle, sequence.logits, sequence.state = None, None, "done"
        if sequence in self._sequences:
            self._sequences.remove(sequence)

    def _forget(self, sequence: TokenSequence, error: Exception) -> None:
        self._remove(sequence)
        waiters, sequence.ready = sequence.ready, []
        for future in waiters:
            self._posts.append(partial(_fail, future, error))
        self._posts.append(partial(sequence.stream.end, error))

    def _embed_some(self) -> None:
        budget = STEP_TOKENS
        while self._embeddings and budget > 0:
            embedding = self._embeddings[0]
            try:
                if not embedding.future.cancelled() and len(embedding.vectors) < len(embedding.inputs):
                    ids = embedding.inputs[len(embedding.vectors)]
                    budget -= len(ids)
                    embedding.vectors.append(self._vector(ids))
            except Exception as error:
                failure = _failure(error)
                self._posts.append(partial(_fail, embedding.future, failure))
                self._embeddings.popleft()
                continue
            if embedding.future.cancelled() or len(embedding.vectors) == len(embedding.inputs):
                self._embeddings.popleft()
                self._posts.append(partial(_resolve, embedding.future, embedding.vectors))

    def _vector(self, ids: SequenceOf[int]) -> list[float]:
        """The mean over tokens of the last hidden layer, scaled to length one."""
        if self._skeleton.adapters is not None:
            self._skeleton.adapters.use(())
        body = self._model.base_model
        extra = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
        inputs = torch.tensor([list(ids)], device=self._skeleton.device)
        hidden = body(input_ids=inputs, **extra).last_hidden_state[0].float()
        vector: list[float] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).tolist()
        return vector

    # -- from the step thread to the loop ----------------------------------------------------------------------

    def _post(self) -> None:
        placed = [s for s in self._sequences if s.handle is not None]
        self._stats = EngineStats(
            running=sum(s.state == "running" for s in placed),
            held=sum(s.state == "held" for s in placed),
            waiting=sum(s.state in ("waiting", "filling") for s in self._sequences),
            cache_tokens=sum(s.fed for s in placed),
            cache_capacity=self._capacity,
            steps=self._steps,
        )
        if (self._outputs or self._posts) and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver, self._take_news())

    def _take_news(self) -> _News:
        news = (self._outputs, self._posts)
        self._outputs, self._posts = [], []
        return news

    def _deliver(self, news: _News) -> None:
        outputs, posts = news
        for sequence, output in outputs:
            stream = sequence.stream
            if not stream.ended:
                stream.pending.append(output)
                stream.wake.set()
                if output.finish is not None:
                    stream.end(None)
        for post in posts:
            post()


def _placed(sequence: TokenSequence) -> int:
    if sequence.handle is None:
        raise PlatformError(f"{sequence!r} has no place in the cache.")
    return sequence.handle


def _own(sequence: Sequence) -> TokenSequence:
    if not isinstance(sequence, TokenSequence):
        raise BadRequest(f"{sequence!r} is not a sequence of this engine.")
    return sequence


def _failure(error: Exception) -> SllmError:
    """What the requests are told: weights that did not arrive say so themselves."""
    if isinstance(error, SllmError):
        return error
    return PlatformError(f"the model failed: {type(error).__name__}: {error}")


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
