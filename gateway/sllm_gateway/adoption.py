"""Taking over invocations whose gateway died: ADOPT to every invoker, ADOPTED back, then outputs from where asked.

An invoker keeps a lost gateway's invocations for `orphan_grace`. It may not have noticed the loss yet (three missed
heartbeats): "owned" is therefore asked again for a while. Several may have it, when it was resumed or moved: the one
under the highest fence is the one, and the others are told to stop. Which that is shows when all have answered; what
they say until then waits, or the end of one that was moved away would be taken for the end of the answer. An invoker
that still has every output since its INVOKE replays them all: what the client has seen is not delivered again, but
makes the resume state whole.

Invariant: at most one handle per invocation comes of it, registered before what its invoker says of it is looked at.
"""

from __future__ import annotations

import asyncio

from sllm_faas.dispatch import resume
from sllm_faas.dispatch.invocation import State
from sllm_faas.dispatch.resume import Way, way_of
from sllm_faas.errors import Conflict, Gone, NotFound, SllmError, Unavailable, WireError
from sllm_faas.spec import Target, Timeouts
from sllm_faas.wire import codec
from sllm_faas.wire.header import Header, Type
from sllm_faas.wire.messages import Adopted, Invoke
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.handle import Call, Handle

ANSWER = 2.0
"""Seconds invokers have to answer."""
AGAIN = 0.5
PATIENCE = 5.0
"""Seconds for which "owned" is asked again: a little more than it takes to notice a lost gateway."""


class _Search:
    """One adoption in progress."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.asked: set[str] = set()
        self.answers: dict[str, str] = {}
        self.unlinked: set[str] = set()
        """Nodes that could not be asked."""
        self.found: dict[str, codec.Frame] = {}
        self.owned = 0
        """The highest fence under which somebody has it who is taken to live."""
        self.early: list[tuple[str, codec.Frame]] = []
        """What those who have it said before all had answered."""
        self.handle: Handle | None = None
        self.done = asyncio.Event()


class Adoptions:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._searches: dict[bytes, _Search] = {}
        dispatcher.adoptions = self

    async def adopt(self, identity: bytes, first: int) -> Handle:
        """The invocation, from its output `first` on.

        Raises NotFound (no invoker has it), Gone (those outputs are no longer kept), Conflict (its gateway lives, or
        somebody else adopts it now), Unavailable (an invoker that may have it is not
        connected, or silent).
        """
        if self._dispatcher.handle(identity) is not None or identity in self._searches:
            raise Conflict("This invocation has a caller already.", hint="Its stream can be read by one client only.")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while True:
            search = self._searches[identity] = _Search(first)
            wanted = False
            try:
                await self._ask(identity, search)
                wanted = True
            finally:
                del self._searches[identity]
                self._choose(search, wanted)
            if search.handle is not None:
                return search.handle
            error = _verdict(search)
            if not isinstance(error, Conflict) or loop.time() > deadline:
                raise error
            await asyncio.sleep(AGAIN)

    async def _ask(self, identity: bytes, search: _Search) -> None:
        search.asked = set(self._dispatcher.linked())
        search.unlinked = set(self._dispatcher.routes.nodes) - search.asked
        if not search.asked:
            raise Unavailable("No invoker is connected yet.", hint="Try again shortly.", retry_after=1.0)
        credit = self._credit(search.first)
        for node in search.asked:
            self._dispatcher.send_to(node, [Header(Type.ADOPT, identity, seq=search.first, credit=credit).pack()])
        try:
            async with asyncio.timeout(ANSWER):
                await search.done.wait()
        except TimeoutError:
            pass

    def _credit(self, first: int) -> int:
        """The lost gateway's client may have been a window ahead of where it re-attaches, and its credit another."""
        return first + 2 * self._dispatcher.window

    def on_adopted(self, node: str, frame: codec.Frame) -> None:
        header, body = frame.header, frame.body
        assert isinstance(body, Adopted)
        search = self._searches.get(header.id)
        if search is None or node not in search.asked or node in search.answers:
            self._dispatcher.drops["unasked_adopted"] += 1
            return
        search.answers[node] = body.status
        if body.status == "found":
            search.found[node] = frame
        elif body.status == "owned":
            search.owned = max(search.owned, header.fence)
        if len(search.answers) == len(search.asked):
            search.done.set()

    def early(self, node: str, frame: codec.Frame) -> bool:
        """A frame of an invocation without a handle: whether it is kept until it is clear who has it."""
        search = self._searches.get(frame.header.id)
        adopted = search.found.get(node) if search is not None else None
        if search is None or adopted is None or adopted.header.fence != frame.header.fence:
            return False
        search.early.append((node, frame))
        return True

    def _choose(self, search: _Search, wanted: bool) -> None:
        """The one under the highest fence is taken over, with what it has said; the others are not the one. None is if
        nobody wants it any more, or if the one is still somebody's."""
        for node in sorted(search.found, key=lambda node: search.found[node].header.fence, reverse=True):
            if wanted and search.handle is None and search.found[node].header.fence >= search.owned:
                search.handle = self._take(node, search.found[node], search.first)
            else:
                self._dispatcher.disown(node, search.found[node].header)
        for node, frame in search.early:
            self._dispatcher.on_invocation_frame(node, frame)

    def _take(self, node: str, frame: codec.Frame, first: int) -> Handle | None:
        dispatcher, header, body = self._dispatcher, frame.header, frame.body
        try:
            invoke = codec.unpack_as(Invoke, body.invoke)
        except WireError:
            dispatcher.drops["bad_frame"] += 1
            return None
        if body.target is None or header.seq > first:
            dispatcher.drops["bad_frame"] += 1
            return None
        call = self._call(header.id, body.target, invoke, frame.buffers)
        now = dispatcher.clock()
        inv = call.begin(now, dispatcher.window)
        inv.fence = header.fence
        inv.state = State.STREAMING if header.seq else State.DISPATCHED
        inv.wanted = inv.consumed = header.seq
        inv.credit = self._credit(first)
        inv.adopt(now)
        slot = next((one for one in dispatcher.slots.of(body.target) if one.instance == body.instance), None)
        whole = header.seq == invoke.outputs
        kept = resume.begin(call.way, invoke.resume) if whole else None
        return dispatcher.adopt(node, inv, call, slot, kept, first - header.seq)

    def _call(self, identity: bytes, target: Target, invoke: Invoke, buffers: tuple[bytes, ...]) -> Call:
        """What was asked of the lost gateway, as far as its invoker knows it."""
        route = self._dispatcher.routes.functions.get((target.app, target.function))
        spec = route.spec if route is not None and route.version == target.version else None
        payload = invoke.payload or (buffers[0] if buffers else b"")
        way: Way = "never"
        if payload and spec is not None:
            way = way_of(spec.kind, invoke.method, spec.method(invoke.method))
        return Call(
            identity,
            target,
            invoke.method,
            payload,
            invoke.encoding,
            invoke.stream,
            spec.timeouts if spec is not None else Timeouts(),
            caller=invoke.caller,
            context=invoke.context,
            way=way,
        )


def _verdict(search: _Search) -> SllmError:
    answers = set(search.answers.values())
    if "gone" in answers:
        return Gone(
            f"Output {search.first} of this invocation is no longer kept.",
            hint="Re-attach earlier, or raise stream_window.",
        )
    if "owned" in answers:
        return Conflict("This invocation belongs to a gateway that lives.", hint="Its client is still connected there.")
    if len(search.answers) < len(search.asked):
        silent = ", ".join(sorted(search.asked - set(search.answers)))
        return Unavailable(f"{silent} did not answer.", hint="Try again shortly.", retry_after=1.0)
    if search.unlinked:
        missing = ", ".join(sorted(search.unlinked))
        return Unavailable(f"{missing} could not be asked.", hint="Try again shortly.", retry_after=1.0)
    return NotFound("No invoker has this invocation.", hint="It has ended, or was not taken over in time.")
