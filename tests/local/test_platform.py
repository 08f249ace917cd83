"""The platform in one process behaves as deployed: limits, timeouts, cancellation, errors, encoding, scaling."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sllm
import sllm.testing
from sllm import _backend, errors

from sllm_faas.local import LocalPlatform
from sllm_faas.wire.messages import Stop

_spec = importlib.util.spec_from_file_location("shop", Path(__file__).with_name("shop.py"))
assert _spec is not None
assert _spec.loader is not None
shop: Any = importlib.util.module_from_spec(_spec)
sys.modules["shop"] = shop
_spec.loader.exec_module(shop)


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    shop.seen.clear()
    shop.gate.clear()
    shop.left.clear()
    shop.meet.reset()
    with sllm.testing.run(shop.app) as platform:
        yield platform
        shop.gate.set()
        validate(platform)


def validate(platform: LocalPlatform) -> None:
    """Every part's invariants hold."""

    async def check() -> None:
        platform.dispatcher.validate()
        platform.node.core.validate()
        platform.control.machine.validate()

    _backend.wait(_backend.submit(check()))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads bring about; no event of theirs can be waited for."""
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen within 10 s")


def idle(platform: LocalPlatform) -> bool:
    return not len(platform.dispatcher) and not platform.node.core.flights


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
        shop.gate.set()


# -- calls ---------------------------------------------------------------------------------------------------


def test_functions_generators_and_maps_give_what_they_give_deployed(platform: LocalPlatform) -> None:
    assert shop.square.remote(3) == 9
    assert list(shop.count.stream(4)) == [0, 1, 2, 3]
    assert list(shop.acount.stream(3)) == [0, 1, 2]
    assert list(shop.square.map(range(20))) == [x * x for x in range(20)]


async def test_the_asynchronous_forms_work_in_any_loop(platform: LocalPlatform) -> None:
    assert await shop.square.remote.aio(4) == 16
    assert [x async for x in shop.acount.stream.aio(3)] == [0, 1, 2]
    assert await asyncio.gather(*(shop.square.remote.aio(x) for x in range(5))) == [0, 1, 4, 9, 16]


def test_values_go_through_the_encoding_so_nothing_is_shared(platform: LocalPlatform) -> None:
    item = shop.Item("cup", bytes(range(256)))
    wrapped = shop.wrap.remote(item)
    assert wrapped == shop.Item("cup!", bytes(range(256)))
    assert item.name == "cup"


def test_large_payloads_travel_out_of_band_both_ways(platform: LocalPlatform) -> None:
    data = bytes(1_000_000)
    assert shop.wrap.remote(shop.Item("big", data)).data == data


def test_a_stream_longer_than_its_window_is_complete_and_in_order(platform: LocalPlatform) -> None:
    assert list(shop.count.stream(5000)) == list(range(5000))
    assert list(shop.acount.stream(3000)) == list(range(3000))


def test_a_resumable_generator_goes_on_behind_its_last_value_when_its_instance_is_stopped(
    platform: LocalPlatform,
) -> None:
    item = shop.Item("tea", b"green")
    outputs = shop.steps.stream(item, 5)
    assert [next(outputs), next(outputs)] == [(0, item), (1, item)]

    async def stop_all() -> None:
        for instance in list(platform.node.core.instances.values()):
            platform.node.stop(Stop(instance.name, drain=0.0))

    _backend.wait(_backend.submit(stop_all()))
    assert list(outputs) == [(2, item), (3, item), (4, item)]
    assert platform.dispatcher.resumes == {"stopped": 1}


def test_nothing_is_resumed_where_nothing_was_lost() -> None:
    assert sllm.resumed() is None


def test_functions_call_functions_of_other_apps(platform: LocalPlatform) -> None:
    platform.deploy(shop.other)
    assert shop.cube.remote(3) == 27


def test_classes_enter_once_serve_and_exit_when_idle(platform: LocalPlatform) -> None:
    greeter = shop.Greeter(language="de")
    assert greeter.hello.remote("you") == "de: you"
    assert shop.left.wait(10.0), "an idle instance with scaledown_window 0 is stopped"
    assert shop.seen == ["enter de", "exit de"]
    assert list(greeter.spell.stream("abc")) == ["a", "b", "c"]
    assert shop.seen[2] == "enter de"


def test_parameters_keep_instances_apart(platform: LocalPlatform) -> None:
    assert shop.Greeter(language="fr").hello.remote("a") == "fr: a"
    assert shop.Greeter().hello.remote("a") == "en: a"


# -- errors --------------------------------------------------------------------------------------------------


def test_a_users_exception_is_raised_as_its_own_type_with_the_traceback(platform: LocalPlatform) -> None:
    with pytest.raises(shop.OutOfStock) as raised:
        shop.sell.remote("cup")
    assert raised.value.args == ("cup", 3)
    assert raised.value.left == 3
    assert 'File "shop.py"' in raised.value.remote_traceback


def test_leaving_the_process_ends_the_call_only(platform: LocalPlatform) -> None:
    with pytest.raises(errors.FunctionError, match="SystemExit"):
        shop.leave.remote()
    assert shop.square.remote(2) == 4


def test_a_result_that_cannot_be_encoded_is_the_functions_error(platform: LocalPlatform) -> None:
    with pytest.raises(errors.BadResult, match="object"):
        shop.strange.remote()


def test_arguments_that_do_not_fit_are_the_callers_error(platform: LocalPlatform) -> None:
    with pytest.raises(errors.CallerError, match="missing a required argument: 'x'"):
        shop.square.remote()


def test_an_enter_hook_that_raises_is_reported_with_its_error(platform: LocalPlatform) -> None:
    with pytest.raises(Exception, match="no licence") as raised:
        shop.Broken().hello.remote()
    assert 'File "shop.py"' in raised.value.remote_traceback
    assert shop.square.remote(2) == 4


def test_an_unknown_function_names_the_nearest(platform: LocalPlatform) -> None:
    with pytest.raises(errors.NotFound, match="Did you mean 'square'"):
        sllm.Function.from_name("shop", "sqare").remote(1)
    with pytest.raises(errors.NotFound, match="There is no app 'shup'"):
        sllm.Function.from_name("shup", "square").remote(1)


def test_a_deleted_app_is_gone(platform: LocalPlatform) -> None:
    platform.delete("shop")
    with pytest.raises(errors.NotFound):
        shop.square.remote(1)
    with pytest.raises(errors.NotFound):
        platform.delete("shop")


def test_failed_calls_are_tried_again_as_often_as_allowed(platform: LocalPlatform) -> None:
    assert shop.flaky.remote(2) == 3
    shop.seen.clear()
    with pytest.raises(ValueError, match="not yet"):
        shop.flaky.remote(100)
    assert len(shop.seen) == 4


# -- limits --------------------------------------------------------------------------------------------------


def test_one_instance_runs_as_many_at_once_as_it_has_slots(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    assert sorted(pool.map(shop.pair.remote, [5.0, 5.0])) == [0, 1]
    assert len(platform.node.core.instances) == 1


def test_instances_are_added_up_to_the_maximum(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    both = [pool.submit(shop.two.remote) for _ in range(2)]
    assert sorted(one.result(10) for one in both) == [0, 1]
    assert len(platform.node.core.instances) == 2


def test_without_a_free_slot_calls_wait_their_turn(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    first = pool.submit(shop.hold.remote, "first")
    until(lambda: shop.seen == ["first"])
    second = pool.submit(shop.hold.remote, "second")
    until(lambda: platform.dispatcher.waiting() == 1)
    assert shop.seen == ["first"]
    shop.gate.set()
    assert (first.result(10), second.result(10)) == ("first", "second")


def test_a_full_queue_refuses_at_once(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    calls: list[Future[Any]] = [pool.submit(shop.narrow.remote)]
    until(lambda: bool(platform.node.core.flights))
    calls.append(pool.submit(shop.narrow.remote))
    until(lambda: platform.dispatcher.waiting() == 1)
    with pytest.raises(errors.QueueFull) as raised:
        shop.narrow.remote()
    assert raised.value.status == 429
    shop.gate.set()
    for call in calls:
        call.result(10)


def test_batched_calls_meet_in_one(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    assert sorted(pool.map(shop.double.remote, range(4))) == [0, 2, 4, 6]
    assert shop.seen == [4]


@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("execution", lambda: shop.too_long.remote()),
        ("first_output", lambda: list(shop.silent.stream())),
        ("idle", lambda: list(shop.stalls.stream())),
        ("startup", lambda: shop.SlowStart().hello.remote()),
    ],
)
def test_each_timeout_has_its_one_meaning(platform: LocalPlatform, phase: str, call: Callable[[], Any]) -> None:
    with pytest.raises(errors.DeadlineExceeded) as raised:
        call()
    assert raised.value.phase == phase
    until(lambda: idle(platform))
    assert shop.square.remote(2) == 4


def test_the_queue_timeout_counts_while_all_slots_are_taken(platform: LocalPlatform, pool: ThreadPoolExecutor) -> None:
    running = pool.submit(shop.queued.remote)
    until(lambda: shop.seen == ["queued runs"])
    with pytest.raises(errors.DeadlineExceeded) as raised:
        shop.queued.remote()
    assert raised.value.phase == "queue"
    shop.gate.set()
    running.result(10)
    assert shop.seen == ["queued runs"]


def test_a_caller_can_lower_a_limit_but_not_raise_it(platform: LocalPlatform) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        shop.hold.with_options(timeout=0.05).remote("x")
    with pytest.raises(errors.DeadlineExceeded):
        shop.too_long.with_options(timeout=100.0).remote()


# -- cancellation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count", "acount"])
def test_leaving_a_stream_stops_its_code(platform: LocalPlatform, name: str) -> None:
    stream = getattr(shop, name).stream(10**9)
    assert next(stream) == 0
    stream.close()
    until(lambda: shop.seen == [f"{name} ended"])
    until(lambda: idle(platform))


async def test_cancelling_the_caller_interrupts_running_code(platform: LocalPlatform) -> None:
    task = asyncio.create_task(shop.hold.remote.aio("x"))
    await asyncio.to_thread(until, lambda: shop.seen == ["x"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: shop.seen == ["x", "x cancelled"])
    await asyncio.to_thread(until, lambda: idle(platform))


async def test_a_cancelled_call_that_waits_never_runs(platform: LocalPlatform) -> None:
    running = asyncio.create_task(shop.hold.remote.aio("first"))
    await asyncio.to_thread(until, lambda: shop.seen == ["first"])
    waiting = asyncio.create_task(shop.hold.remote.aio("second"))
    await asyncio.to_thread(until, lambda: platform.dispatcher.waiting() == 1)
    waiting.cancel()
    await asyncio.to_thread(until, lambda: platform.dispatcher.waiting() == 0)
    shop.gate.set()
    assert await running == "first"
    assert shop.seen == ["first"]


def test_code_that_ignores_its_cancellation_is_given_up_and_replaced(platform: LocalPlatform) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        shop.deaf.remote(True)
    assert shop.deaf.remote(False) == "second"
    assert shop.seen == ["ignored"]


# -- life ----------------------------------------------------------------------------------------------------


def test_after_the_block_everything_has_ended_and_calls_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    shop.seen.clear()
    shop.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        with sllm.testing.run(shop.app) as platform:
            assert shop.Greeter(language="nl").hello.remote("x") == "nl: x"
            call = pool.submit(shop.hold.remote, "held")
            until(lambda: "held" in shop.seen)
        with pytest.raises((errors.SllmError, sllm.Cancelled)):
            call.result(10)
    assert "held cancelled" in shop.seen
    assert "exit nl" in shop.seen
    assert idle(platform)
    assert not platform.node.core.instances
    assert platform.backend not in _backend._used


def test_platforms_nest_and_the_innermost_is_used(platform: LocalPlatform) -> None:
    with sllm.testing.run(shop.other), pytest.raises(errors.NotFound):
        shop.square.remote(1)
    assert shop.square.remote(1) == 1


def test_a_redeployed_app_serves_its_new_version(platform: LocalPlatform) -> None:
    assert shop.square.remote(2) == 4
    assert platform.deploy(shop.app) == 1, "unchanged"
    assert platform.deploy(shop.changed) == 3
    assert sllm.Function.from_name("shop", "square").remote(2) == 8
