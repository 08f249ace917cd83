"""Calls over a fake backend: results, retries, streams and maps, and that nothing outlives its caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import sllm
from sllm import _backend, _calls
from sllm._backend import Call
from sllm._context import Invocation, serving

from sllm_faas.errors import BadRequest, NoCapacity, QueueFull, RemoteError, Unavailable, WorkerLost
from sllm_faas.spec import RetryPolicy
from sllm_faas.wire.payload import decode_call, encode, encode_result

app = sllm.App("calls")


@app.function
def double(x: int) -> int:
    return 2 * x


@app.function
def add(x: int, y: int = 0) -> int:
    return x + y


@app.function(retries=2)
async def flaky(x: int) -> int:
    return x


@app.function
def count(n: int) -> Iterator[int]:
    yield from range(n)


class Fake:
    """Runs functions on the loop thread. The inputs "block", "fail" and "slow" do what they say."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self.produced = 0
        self.failures: list[Exception] = []
        self.finished = 0
        self.release_after = 0
        self.released = asyncio.Event()
        self.blocked = threading.Event()
        self.stopped = threading.Event()

    async def call(self, call: Call) -> bytes:
        self.calls.append(call)
        args, kwargs = decode_call("msgpack", call.payload)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if self.failures:
                raise self.failures.pop(0)
            if args and args[0] == "block":
                self.blocked.set()
                await asyncio.Event().wait()
            if args and args[0] == "fail":
                raise ValueError("failed")
            if args and args[0] == "slow":
                await self.released.wait()
            functions: dict[str, Callable[..., Any]] = {"double": double.local, "add": add.local, "flaky": abs}
            result = encode_result("msgpack", functions[call.function](*args, **kwargs))
            self.finish()
            return result
        except asyncio.CancelledError:
            self.cancelled += 1
            self.stopped.set()
            raise
        finally:
            self.running -= 1

    def finish(self) -> None:
        self.finished += 1
        if self.finished == self.release_after:
            self.release()

    def release(self) -> None:
        """The slow inputs may go on. Safe from any thread."""
        _backend.loop_thread().loop.call_soon_threadsafe(self.released.set)

    async def stream(self, call: Call) -> AsyncGenerator[bytes, None]:
        self.calls.append(call)
        args, _ = decode_call("msgpack", call.payload)
        try:
            for i in range(args[0]):
                if self.failures:
                    raise self.failures.pop(0)
                self.produced += 1
                yield encode(i)
            if len(args) > 1:
                raise ValueError("after the outputs")
        finally:
            self.stopped.set()

    async def close(self) -> None: ...


@pytest.fixture
def fake() -> Iterator[Fake]:
    backend = Fake()
    with _backend.use(backend):
        yield backend


def test_a_blocking_call_returns_the_result(fake: Fake) -> None:
    assert double.remote(4) == 8
    assert (fake.calls[0].app, fake.calls[0].function, fake.calls[0].method) == ("calls", "double", "")


async def test_an_awaited_call_returns_the_result_and_blocking_works_inside_a_loop(fake: Fake) -> None:
    assert await double.remote.aio(4) == 8
    assert double.remote(5) == 10


def test_a_method_call_names_class_parameters_and_method(fake: Fake) -> None:
    handle = sllm.Cls.from_name("a", "C")(size=3)
    with pytest.raises(KeyError):
        handle.go.remote(1)
    assert fake.calls[0].parameters == '{"size":3}'
    assert fake.calls[0].label == "a/C.go"


def test_a_function_known_by_name_has_every_way_of_calling(fake: Fake) -> None:
    named = sllm.Function.from_name("calls", "double")
    assert named.remote(2) == 4
    assert list(named.map([1, 2])) == [2, 4]
    assert list(sllm.Function.from_name("calls", "count").stream(3)) == [0, 1, 2]
    with pytest.raises(BadRequest, match="source"):
        named.local(1)


def test_a_remote_exception_is_raised(fake: Fake) -> None:
    with pytest.raises(ValueError, match="failed"):
        double.remote("fail")  # type: ignore[arg-type]


def test_an_argument_that_cannot_be_sent_fails_before_anything_is_called(fake: Fake) -> None:
    with pytest.raises(BadRequest, match=r"\$\.args\[0\]"):
        double.remote(object())  # type: ignore[arg-type]
    assert fake.calls == []


def test_cancelling_an_awaited_call_cancels_the_invocation(fake: Fake) -> None:
    async def go() -> None:
        task = asyncio.ensure_future(double.remote.aio("block"))  # type: ignore[arg-type]
        await asyncio.to_thread(fake.blocked.wait, 10)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.stopped.wait, 10)

    asyncio.run(go())
    assert fake.cancelled == 1


def test_options_become_limits_of_the_call(fake: Fake) -> None:
    double.with_options(timeout=3).remote(1)
    double.with_options(timeout=sllm.Timeouts(queue=1, startup=None, idle=None, execution=9)).remote(1)
    double.remote(1)
    assert [call.timeouts for call in fake.calls] == [
        (("execution", 3.0),),
        (("queue", 1), ("execution", 9)),
        (),
    ]


def test_calls_within_an_invocation_name_their_caller(fake: Fake) -> None:
    with serving(Invocation("inv-1")):
        assert sllm.current_invocation() == Invocation("inv-1")
        double.remote(1)
    assert sllm.current_invocation() is None
    assert fake.calls[0].caller == "inv-1"


def test_a_cancelled_invocation_cancels_the_calls_it_waits_for(fake: Fake) -> None:
    outcome: list[BaseException] = []

    def user_code() -> None:
        with serving(Invocation("inv-2")):
            try:
                double.remote("block")  # type: ignore[arg-type]
            except BaseException as error:
                outcome.append(error)

    thread = threading.Thread(target=user_code)
    thread.start()
    assert fake.blocked.wait(10)
    assert _calls.cancel_calls("inv-2") == 1
    thread.join(10)
    assert isinstance(outcome[0], sllm.Cancelled)
    assert fake.stopped.wait(10)
    assert _calls.cancel_calls("inv-2") == 0


def test_a_blocking_call_in_the_sdks_own_loop_is_refused_and_not_a_deadlock(fake: Fake) -> None:
    async def inside() -> None:
        double.remote(1)

    with pytest.raises(RuntimeError, match=r"use \.aio"):
        _backend.wait(_backend.submit(inside()))


# -- retries -------------------------------------------------------------------------------------------------


class Slept:
    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def call(function: str, *args: Any) -> Call:
    return Call("calls", function, encode({"args": list(args), "kwargs": {}}))


POLICY = RetryPolicy(max_retries=3, initial_delay=1, backoff=2, max_delay=3)


async def test_retries_back_off_and_honour_retry_after() -> None:
    fake, slept = Fake(), Slept()
    fake.failures = [Unavailable("down"), QueueFull("full", retry_after=7), Unavailable("down")]
    result = await _calls.call(fake, call("double", 11), _calls.Retrying(POLICY), slept)
    assert result == encode(22)
    assert slept.seconds == [1, 7, 3]


async def test_retries_end() -> None:
    fake, slept = Fake(), Slept()
    fake.failures = [Unavailable("down")] * 9
    with pytest.raises(Unavailable):
        await _calls.call(fake, call("double", 1), _calls.Retrying(POLICY), slept)
    assert len(fake.calls) == 4


def remote_unavailable() -> Exception:
    error = Unavailable("of a nested call")
    error.remote_traceback = "…"  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error", [ValueError("x"), BadRequest("x"), RemoteError("x"), WorkerLost("x"), remote_unavailable()]
)
async def test_what_the_function_did_or_the_gateway_already_retried_is_not_retried(error: Exception) -> None:
    fake = Fake()
    fake.failures = [error]
    with pytest.raises(type(error)):
        await _calls.call(fake, call("double", 1), _calls.Retrying(POLICY), Slept())
    assert len(fake.calls) == 1


async def test_a_caller_who_asks_for_retries_gets_them_for_lost_workers_too() -> None:
    fake = Fake()
    fake.failures = [WorkerLost("x"), NoCapacity("x")]
    await _calls.call(fake, call("double", 11), _calls.Retrying(POLICY, lost=True), Slept())
    assert len(fake.calls) == 3


def test_the_functions_own_policy_and_with_options_reach_the_call(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[_calls.Retrying] = []
    original = _calls.call

    def spy(backend: Any, call: Call, retrying: _calls.Retrying) -> Any:
        seen.append(retrying)
        return original(backend, call, retrying)

    monkeypatch.setattr(_calls, "call", spy)
    flaky.remote(1)
    flaky.with_options(retries=5).remote(1)
    assert [(one.policy.max_retries, one.lost) for one in seen] == [(2, False), (5, True)]


async def test_a_stream_is_retried_before_its_first_output_and_never_after() -> None:
    fake, slept = Fake(), Slept()
    fake.failures = [Unavailable("down")]
    outputs = _calls.stream(fake, call("count", 2), _calls.Retrying(POLICY), slept)
    assert [output async for output in outputs] == [encode(0), encode(1)]
    assert slept.seconds == [1]

    class Breaks(Fake):
        async def stream(self, call: Call) -> AsyncGenerator[bytes, None]:
            self.calls.append(call)
            yield encode(0)
            raise Unavailable("cut")

    breaks = Breaks()
    with pytest.raises(Unavailable):
        async for _ in _calls.stream(breaks, call("count", 2), _calls.Retrying(POLICY), slept):
            pass
    assert len(breaks.calls) == 1


# -- streams -------------------------------------------------------------------------------------------------


def test_a_stream_gives_every_output_in_order(fake: Fake) -> None:
    assert list(count.stream(1000)) == list(range(1000))


async def test_a_stream_gives_every_output_in_order_to_an_event_loop(fake: Fake) -> None:
    assert [item async for item in count.stream.aio(1000)] == list(range(1000))


def test_a_slow_consumer_holds_the_producer_back(fake: Fake) -> None:
    outputs = count.stream(10_000)
    assert next(outputs) == 0
    held = _backend.submit(asyncio.sleep(0))
    held.result()
    assert fake.produced <= 1 + _calls.STREAM_WINDOW + 1
    outputs.close()
    assert fake.stopped.wait(10)
    assert fake.produced < 10_000


async def test_leaving_a_stream_early_closes_it(fake: Fake) -> None:
    outputs = count.stream.aio(10_000)
    async for item in outputs:
        if item == 3:
            break
    await outputs.aclose()
    assert await asyncio.to_thread(fake.stopped.wait, 10)
    assert fake.produced < 10_000


def test_dropping_a_stream_closes_it(fake: Fake) -> None:
    outputs = count.stream(10_000)
    next(outputs)
    del outputs
    assert fake.stopped.wait(10)


def test_an_error_comes_after_the_outputs_before_it(fake: Fake) -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="after the outputs"):
        for item in count.stream(3, "then fail"):  # type: ignore[call-arg]
            seen.append(item)
    assert seen == [0, 1, 2]


def test_a_stream_that_was_never_read_calls_nothing(fake: Fake) -> None:
    count.stream(3)
    assert fake.calls == []


def test_a_cancelled_invocation_ends_the_streams_it_reads(fake: Fake) -> None:
    with serving(Invocation("inv-3")):
        outputs = count.stream(10_000)
        next(outputs)
        assert _calls.cancel_calls("inv-3") == 1
        with pytest.raises(sllm.Cancelled):
            list(outputs)


# -- maps ----------------------------------------------------------------------------------------------------


def test_a_map_keeps_the_order_of_its_inputs(fake: Fake) -> None:
    assert list(double.map(range(50), max_in_flight=7)) == [2 * x for x in range(50)]
    assert fake.most <= 7


def test_an_unordered_map_gives_each_result_once_as_it_finishes(fake: Fake) -> None:
    results: Iterator[Any] = double.map(["slow", 1, 2, 3], order_outputs=False)
    assert sorted(next(results) for _ in range(3)) == [2, 4, 6]
    fake.release()
    assert list(results) == ["slowslow"]


def test_an_ordered_map_runs_others_while_it_waits_for_the_first(fake: Fake) -> None:
    fake.release_after = 3
    assert list(double.map(["slow", 1, 2, 3], max_in_flight=4)) == ["slowslow", 2, 4, 6]


async def test_maps_work_in_an_event_loop(fake: Fake) -> None:
    async def source() -> AsyncIterator[int]:
        for i in range(20):
            yield i

    assert [r async for r in double.map.aio(source(), max_in_flight=3)] == [2 * x for x in range(20)]
    assert fake.most <= 3
    unordered: AsyncIterator[Any] = double.map.aio(["slow", 1, 2, 3], order_outputs=False)
    assert sorted([await anext(unordered) for _ in range(3)]) == [2, 4, 6]
    fake.release()
    assert [r async for r in unordered] == ["slowslow"]
    assert [r async for r in add.starmap.aio([(1, 2), (3, 4)])] == [3, 7]
    assert [r async for r in add.map.aio([1, 2], source())] == [1, 3]


def test_a_map_takes_several_inputs_and_common_keywords(fake: Fake) -> None:
    assert list(add.map([1, 2, 3], [10, 20])) == [11, 22]
    assert list(add.map([1, 2], kwargs={"y": 5})) == [6, 7]
    assert list(add.starmap([(1, 2), (3, 4)])) == [3, 7]
    assert list(double.map([])) == []


@pytest.mark.parametrize("order_outputs", [True, False])
def test_an_endless_input_is_read_only_as_far_as_results_are_taken(fake: Fake, order_outputs: bool) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = double.map(endless(), order_outputs=order_outputs, max_in_flight=4)
    for _ in range(10):
        next(results)
    assert taken <= 14


def test_failed_calls_are_raised_or_returned_in_their_place(fake: Fake) -> None:
    inputs = [1, "fail", 3]
    with pytest.raises(ValueError, match="failed"):
        list(double.map(inputs))
    results = list(double.map(inputs, return_exceptions=True))
    assert results[0] == 2
    assert isinstance(results[1], ValueError)
    assert results[2] == 6


def test_an_input_that_cannot_be_sent_fails_in_its_place(fake: Fake) -> None:
    results = list(double.map([1, object(), 3], return_exceptions=True))
    assert isinstance(results[1], BadRequest)
    assert [results[0], results[2]] == [2, 6]


def test_what_is_in_flight_is_cancelled_when_a_map_fails_or_is_left(fake: Fake) -> None:
    with pytest.raises(ValueError, match="failed"):
        list(double.map(["fail", "block"]))
    assert fake.stopped.wait(10)
    fake.stopped.clear()
    fake.blocked.clear()
    results: Any = double.map([100, "block"])
    assert next(results) == 200
    assert fake.blocked.wait(10)
    results.close()
    assert fake.stopped.wait(10)
    assert fake.cancelled == 2


def test_a_failing_input_iterator_is_the_callers_own_error(fake: Fake) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise LookupError("input")

    with pytest.raises(LookupError, match="input"):
        list(double.map(source(), return_exceptions=True))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, 10**9])
def test_a_wrong_bound_is_refused(fake: Fake, size: Any) -> None:
    with pytest.raises(BadRequest, match="allowed: 1 to"):
        double.map([1], max_in_flight=size)


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_calls_work_in_a_forked_child_and_still_in_the_parent(fake: Fake) -> None:
    assert double.remote(1) == 2
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if double.remote(21) == 42 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert double.remote(2) == 4
