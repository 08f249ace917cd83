"""A language model behind an in-memory link, and calls on it as its invoker makes them.

    rig = Rig(engine, codec)
    call = rig.invoke(request, "complete")
    end = await call.end()
    call.outputs, call.text()

The same methods speak for a real engine and for a scripted one. Waiting is always for a frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sllm_invoker.runner import llm
from sllm_invoker.runner.engines.base import Engine
from sllm_invoker.runner.instance import Instance
from sllm_invoker.runner.link import MemoryLink
from sllm_invoker.runner.tokens import TextCodec

from sllm_faas.spec import CheckpointSpec, FunctionSpec
from sllm_faas.wire.codec import Frame, decode, encode, pack
from sllm_faas.wire.header import NO_LIMIT, Header, Type
from sllm_faas.wire.llm import LlmLogprob, LlmOutput, LlmRequest, LlmResume, decode_output
from sllm_faas.wire.messages import Invoke

SPEC = FunctionSpec("model", "llm", checkpoint=CheckpointSpec("somewhere"))
TERMINAL = (Type.DONE, Type.FAILED, Type.CANCELLED)


class Rig:
    def __init__(self, engine: Engine, codec: TextCodec, concurrency: int = 8) -> None:
        loop = asyncio.get_running_loop()
        self.engine = engine
        self.codec = codec
        self.calls: dict[bytes, Call] = {}
        executors = llm.executors(llm.LanguageModel(engine, codec), loop, concurrency)
        self.instance = Instance(SPEC, executors, MemoryLink(self._deliver, loop.call_soon_threadsafe))

    def _deliver(self, parts: list[bytes]) -> None:
        frame = decode(parts)
        call = self.calls[frame.header.id]
        call.frames.append(frame)
        call.news.set()

    def call(self, request: LlmRequest, method: str = "complete") -> Call:
        call = Call(self, (len(self.calls) + 1).to_bytes(16, "big"), request, method)
        self.calls[call.id] = call
        return call

    def invoke(self, request: LlmRequest, method: str = "complete", **fields: Any) -> Call:
        call = self.call(request, method)
        call.invoke(**fields)
        return call

    async def run(self, request: LlmRequest, method: str = "complete", **fields: Any) -> Call:
        call = self.invoke(request, method, **fields)
        await call.end()
        return call


class Call:
    """One invocation. `fence` is that of the frames it sends."""

    def __init__(self, rig: Rig, identity: bytes, request: LlmRequest, method: str) -> None:
        self.id = identity
        self.request = request
        self.method = method
        self.fence = 1
        self.frames: list[Frame] = []
        self.news = asyncio.Event()
        self._rig = rig

    def send(self, kind: Type, body: Any = None, **fields: int) -> None:
        self._rig.instance.receive(encode(Header(kind, self.id, self.fence, **fields), body))

    def invoke(self, *, kind: Type = Type.INVOKE, credit: int = NO_LIMIT, **fields: Any) -> None:
        body = Invoke(self.method, stream=True, payload=pack(self.request), **fields)
        self.send(kind, body, credit=credit)

    async def until(self, condition: Callable[[], Any]) -> Any:
        try:
            async with asyncio.timeout(20):
                while not (value := condition()):
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise AssertionError(f"nothing more came after {self.frames}") from None
        return value

    async def frame(self, kind: Type, count: int = 1) -> Frame:
        """The `count`th frame of a kind."""
        found: list[Frame] = await self.until(lambda: (f := self.of(kind))[count - 1 :] and f)
        return found[count - 1]

    async def end(self) -> Frame:
        frame: Frame = await self.until(lambda: next((f for f in self.frames if f.header.type in TERMINAL), None))
        return frame

    def of(self, kind: Type) -> list[Frame]:
        return [frame for frame in self.frames if frame.header.type is kind]

    @property
    def ended(self) -> bool:
        return any(frame.header.type in TERMINAL for frame in self.frames)

    @property
    def outputs(self) -> list[LlmOutput]:
        """Checked to be gap-free from the first on."""
        found: list[LlmOutput] = []
        frames = self.of(Type.OUTPUT)
        for frame in frames:
            assert frame.header.seq == frames[0].header.seq + len(found)
            found += [decode_output(item) for item in frame.body]
        return found

    def text(self, choice: int = 0) -> str:
        return "".join(output.text for output in self.outputs if output.choice == choice)


def resume_of(outputs: list[LlmOutput], choices: int) -> LlmResume:
    """What has to be known of `outputs` to go on after them."""
    tokens: list[tuple[int, ...]] = [()] * choices
    finish: list[Any] = [None] * choices
    for output in outputs:
        tokens[output.choice] += output.tokens
        finish[output.choice] = output.finish or finish[output.choice]
    return LlmResume(tuple(tokens), tuple(finish))


def by_choice(outputs: list[LlmOutput]) -> dict[int, tuple[tuple[int, ...], str, str | None]]:
    """(tokens, text, finish) of every choice."""
    found: dict[int, tuple[tuple[int, ...], str, str | None]] = {}
    for output in outputs:
        tokens, text, finish = found.get(output.choice, ((), "", None))
        assert finish is None, "nothing follows the end of a choice"
        found[output.choice] = (tokens + output.tokens, text + output.text, output.finish)
    return found


def logprobs(outputs: list[LlmOutput], choice: int = 0) -> list[LlmLogprob]:
    return [one for output in outputs if output.choice == choice for one in output.logprobs]
