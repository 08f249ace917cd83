"""Which zygotes to keep: base always, layers while they are worth their memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.containers.keepalive import PRICE, BreakEven, Cost, Fixed, Usage, value
from sllm_invoker.containers.pool import Pool

from sllm_faas.layers import BASE, Layer, path
from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec

LLM = FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("x"))
LIBS = Cost(5.0, 150.0)
TEMPLATE = Cost(0.2, 20.0)
CHEAP = {"base": Cost(0.1, 10.0), "libs": LIBS, "template": TEMPLATE}


def code(*libs: str) -> FunctionSpec:
    return FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), libs=libs)


def template(number: int) -> Layer:
    return Layer(f"template:{number}", "template", BASE)


def admit(pool: Pool, layers: Sequence[Layer], now: float = 0.0) -> None:
    for layer in layers:
        pool.admit(layer, CHEAP[layer.warmth], now)


def test_code_without_heavy_libraries_is_forked_from_base() -> None:
    assert [layer.key for layer in path(code("requests"), "")] == ["base"]
    assert [layer.key for layer in path(None, "")] == ["base"]


def test_the_same_libraries_share_a_zygote_in_whatever_order() -> None:
    assert path(code("torch", "numpy"), "") == path(code("numpy", "torch", "json"), "")
    assert [layer.warmth for layer in path(code("torch"), "")] == ["base", "libs"]


def test_a_language_model_has_a_template_per_checkpoint() -> None:
    one, two = path(LLM, "1"), path(LLM, "2")
    assert [layer.warmth for layer in one] == ["base", "libs", "template"]
    assert one[:2] == two[:2] and one[2] != two[2]
    assert one[2].parent == one[1].key


def test_the_warmest_layer_that_exists_is_where_a_start_begins() -> None:
    pool, layers = Pool(), path(LLM, "1")
    assert pool.warmest(layers) is None
    admit(pool, layers[:2])
    assert pool.warmest(layers) == layers[1]


def test_a_pool_without_memory_has_no_layer_above_base() -> None:
    layers = path(LLM, "1")
    assert Pool(budget_mb=0.0).within(layers) == layers[:1]
    assert Pool().within(layers) == layers


def test_a_layer_of_unknown_use_is_kept_until_break_even_and_base_for_ever() -> None:
    pool, layers = Pool(), path(LLM, "1")
    admit(pool, layers)
    limits = {layer.key: PRICE * CHEAP[layer.warmth].seconds / CHEAP[layer.warmth].memory_mb for layer in layers[1:]}
    assert limits[layers[2].key] < limits[layers[1].key]
    assert pool.surplus(limits[layers[2].key] - 1) == []
    assert pool.surplus(limits[layers[2].key]) == [layers[2].key]
    assert set(pool.surplus(1e9)) == {layers[1].key, layers[2].key}


def test_every_start_through_a_layer_restarts_its_keep_alive() -> None:
    pool, layers = Pool(keep=Fixed(10.0)), path(LLM, "1")
    admit(pool, layers)
    pool.use(layers, 9.0)
    assert pool.surplus(18.9) == []
    pool.use(layers[:2], 18.0)
    assert pool.surplus(19.0) == [layers[2].key]


def used(*waits: float) -> Usage:
    usage, now = Usage(0.0), 0.0
    for wait in waits:
        now += wait
        usage.note(now)
    return usage


LIMIT = PRICE * TEMPLATE.seconds / TEMPLATE.memory_mb


def test_short_waits_alone_are_no_reason_to_give_up_early() -> None:
    assert BreakEven().seconds(TEMPLATE, Usage(0.0)) == LIMIT
    assert BreakEven().seconds(TEMPLATE, used(*[2.0] * 20)) == LIMIT


def test_where_long_waits_were_longer_than_break_even_it_is_kept_for_the_short_ones_only() -> None:
    keep = BreakEven().seconds(TEMPLATE, used(*[2.0, 2.0, 2.0, 10 * LIMIT] * 10))
    assert 2.0 <= keep < 4.0


def test_one_that_is_started_ever_rarer_than_break_even_is_not_kept_at_all() -> None:
    assert BreakEven().seconds(TEMPLATE, used(*[10 * LIMIT] * 5)) == 0.0


@given(st.lists(st.floats(0.0, 1e5), min_size=1, max_size=60), st.floats(0.001, 100.0), st.floats(0.1, 1e4))
def test_idle_memory_never_costs_more_than_the_start_it_may_save(
    waits: list[float], seconds: float, memory: float
) -> None:
    """The competitive bound: between two uses, at most the price of making the layer is spent on holding it."""
    usage, cost, now = Usage(0.0), Cost(seconds, max(1.0, memory)), 0.0
    for wait in waits:
        now += wait
        usage.note(now)
    assert BreakEven().seconds(cost, usage) * cost.memory_mb <= PRICE * seconds * (1 + 1e-9)


def test_over_the_memory_budget_the_least_valuable_goes_first() -> None:
    pool = Pool(budget_mb=50.0)
    admit(pool, [template(number) for number in range(4)])  # 80 MiB
    for now in (1.0, 2.0, 3.0):
        pool.use([template(1), template(3)], now)
    pool.use([template(0)], 3.0)
    assert pool.surplus(4.0) == ["template:2", "template:0"]


def test_what_a_layer_holds_may_become_more() -> None:
    pool = Pool()
    admit(pool, [template(0)])
    before = pool.memory_mb()
    pool.weigh(template(0).key, before + 10.0)
    pool.weigh("template:gone", 1e6)
    assert pool.memory_mb() == before + 10.0


def test_what_two_share_is_worth_the_sum_of_their_starts() -> None:
    shared, own = Usage(0.0), Usage(0.0)
    for k in range(1, 10):
        shared.note(k * 1.0)
        if k % 2:
            own.note(k * 1.0)
    cost = Cost(1.0, 10.0)
    assert value(cost, shared, 9.0) > value(cost, own, 9.0)


def test_a_zygote_that_keeps_dying_is_made_again_ever_later() -> None:
    pool = Pool(first_backoff=0.5, max_backoff=2.0)
    assert [pool.died(BASE, 0.0) for _ in range(5)] == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert pool.wait(BASE, 1.5) == 0.5
    pool.served(BASE)
    assert pool.wait(BASE, 1.5) == 0.0 and pool.died(BASE, 2.0) == 0.0


def test_a_layer_that_died_is_to_be_made_again_parents_first_while_it_is_worth_it() -> None:
    pool, layers = Pool(keep=Fixed(100.0)), path(LLM, "1")
    admit(pool, layers)
    for layer in reversed(layers):
        pool.died(layer.key, 1.0)
    assert pool.missing(1.0) == list(layers)
    pool.admit(layers[0], CHEAP["base"], 2.0)
    assert pool.missing(2.0) == list(layers[1:])
    assert pool.missing(200.0) == []


def test_a_layer_that_was_ended_on_purpose_is_not_missing() -> None:
    pool, layers = Pool(), path(LLM, "1")
    admit(pool, layers)
    pool.leave(layers[2].key)
    assert pool.missing(1.0) == []
    assert pool.memory_mb() == pytest.approx(150.0)
