"""One invocation's frames: order, batches, credit, one end; and the outbox that carries them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.runner.call import MAX_BATCH_BYTES, MAX_PENDING, Call, Parts
from sllm_invoker.runner.link import MAX_LOGS, MemoryLink

from sllm_faas.errors import BadRequest, to_info
from sllm_faas.wire.codec import Frame, decode
from sllm_faas.wire.header import NO_LIMIT, Header, Type
from sllm_faas.wire.messages import INLINE_LIMIT, Invoke, LogRecord


class Desk:
    """A link whose consumer runs when the test says so."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.frames: list[Frame] = []
        self.ended: list[Call] = []
        self.link = MemoryLink(self._deliver, self.due.append)

    def _deliver(self, parts: Parts) -> None:
        self.frames.append(decode(parts))

    def call(self, *, credit: int = NO_LIMIT, outputs: int = 0) -> Call:
        header = Header(Type.INVOKE, b"c" * 16, fence=3, credit=credit)
        return Call(header, Invoke("m", outputs=outputs), (), self.link, self.ended.append)

    def run(self) -> list[Frame]:
        while self.due:
            self.due.pop(0)()
        return self.frames


def items(frame: Frame) -> list[bytes]:
    buffers = iter(frame.buffers)
    return [item or next(buffers) for item in frame.body]


@given(
    st.lists(
        st.one_of(st.none(), st.sampled_from([1, 10, INLINE_LIMIT, INLINE_LIMIT + 1, MAX_BATCH_BYTES])), max_size=40
    )
)
def test_outputs_are_gap_free_bounded_and_before_the_end_whenever_the_link_wakes(script: list[int | None]) -> None:
    """None: the link's turn; a number: an output of so many bytes."""
    desk = Desk()
    call = desk.call()
    given_payloads = []
    for at, size in enumerate(script):
        if size is None:
            desk.run()
        else:
            given_payloads.append(bytes([at]) * size)
            call.output(given_payloads[-1])
    call.done()
    *outputs, end = desk.run()
    assert [item for frame in outputs for item in items(frame)] == given_payloads
    wanted = 0
    for frame in outputs:
        assert (frame.header.type, frame.header.fence, frame.header.seq) == (Type.OUTPUT, 3, wanted)
        assert frame.header.items == len(frame.body)
        assert len(frame.body) == 1 or sum(map(len, items(frame))) <= MAX_BATCH_BYTES
        wanted += frame.header.items
    assert (end.header.type, end.header.seq) == (Type.DONE, len(given_payloads))


def test_what_came_in_one_wake_up_is_one_frame_even_between_two_calls() -> None:
    desk = Desk()
    one, two = desk.call(), desk.call()
    for payload in (b"a", b"b", b"c"):
        one.output(payload)
        two.output(payload)
    assert [frame.body for frame in desk.run()] == [[b"a", b"b", b"c"]] * 2


def test_there_is_one_end() -> None:
    desk = Desk()
    call = desk.call()
    call.done(b"x")
    call.fail(to_info(BadRequest("late")))
    call.stopped()
    assert [frame.header.type for frame in desk.run()] == [Type.DONE]
    assert desk.ended == [call]


def test_ordinals_go_on_after_what_an_earlier_fence_delivered() -> None:
    desk = Desk()
    call = desk.call(credit=7, outputs=5)
    call.output(b"a")
    call.output(b"b")
    assert not call.room()
    call.done()
    outputs, end = desk.run()
    assert (outputs.header.seq, end.header.seq) == (5, 7)


def test_credit_is_absolute() -> None:
    call = Desk().call(credit=1)
    call.output(b"a")
    assert not call.room()
    call.allow(1)
    call.allow(0)
    assert not call.room()
    call.allow(2)
    assert call.room()


def test_bytes_that_wait_for_the_link_hold_the_producer_whatever_its_credit() -> None:
    desk = Desk()
    call = desk.call()
    call.output(bytes(MAX_PENDING))
    assert not call.room()
    desk.run()
    assert call.room()


def test_a_blocked_producer_is_woken_by_credit_and_by_cancellation() -> None:
    for wake, outcome in ((lambda call: call.allow(1), True), (lambda call: call.cancel(), False)):
        call = Desk().call(credit=0)
        answers: list[bool] = []
        thread = threading.Thread(target=lambda call=call, answers=answers: answers.append(call.wait()))
        thread.start()
        wake(call)
        thread.join(10)
        assert answers == [outcome]


async def test_a_waiting_task_is_woken_by_credit() -> None:
    call = Desk().call(credit=0)
    task = asyncio.create_task(call.wait_async())
    await asyncio.sleep(0)
    assert not task.done()
    call.allow(1)
    async with asyncio.timeout(10):
        await task


def test_a_large_result_is_out_of_band() -> None:
    desk = Desk()
    desk.call().done(bytes(INLINE_LIMIT + 1))
    (frame,) = desk.run()
    assert (frame.body.payload, frame.buffers) == (b"", (bytes(INLINE_LIMIT + 1),))


def test_a_large_argument_comes_out_of_its_buffer() -> None:
    header = Header(Type.INVOKE, b"c" * 16)
    call = Call(header, Invoke("m", resume=b"r"), (b"payload",), Desk().link, print)
    assert (call.payload, call.resume) == (b"payload", b"r")


def test_log_lines_are_bounded_counted_and_come_before_the_end() -> None:
    desk = Desk()
    call = desk.call()
    for _ in range(MAX_LOGS + 7):
        desk.link.log(LogRecord(0.0, "stdout", "line"))
    call.done()
    frames = desk.run()
    records = [record for frame in frames[:-1] for record in frame.body.records]
    assert sum(record.text == "line" for record in records) == MAX_LOGS
    assert [record.text for record in records if record.stream == "platform"] == ["dropped 7 lines"]
    assert frames[-1].header.type is Type.DONE


def test_the_consumer_is_woken_once_for_much() -> None:
    desk = Desk()
    call = desk.call()
    for _ in range(100):
        call.output(b"x")
    assert len(desk.due) == 1
