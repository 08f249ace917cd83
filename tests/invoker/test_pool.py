"""Which zygotes to keep: base always, layers while they are worth their memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.containers.keepalive import PRICE, BreakEven, Cost, Fixed, Usage, value
from sllm_invoker.containers.pool import REMEMBERED, TOGETHER, Pool, Short

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
    pool, layers = Pool(budget_mb=0.0), path(LLM, "1")
    for now in (0.0, 0.1):
        assert pool.wanted(layers, now) == layers[:1]
        pool.use(layers, now)
    assert Pool().wanted(layers, 0.0) == layers


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


LARGE = {**CHEAP, "libs": Cost(5.0, 250.0)}
SMALL = 256.0
"""MiB: less than the large libs and a template."""


def makings(pool: Pool, starts: Iterable[tuple[float, Sequence[Layer]]], *, blind: bool = False) -> list[str]:
    """The layers that were made above base, in order, while `starts` came and an invoker looked every second; `blind`:
    by one that makes whatever is missing."""
    made: list[str] = []
    pool.admit(path(None, "")[0], LARGE["base"], 0.0)
    for (now, layers), (then, _) in pairwise([*starts, (0.0, ())]):
        for layer in layers if blind else pool.wanted(layers, now):
            if layer.key not in pool:
                made.append(layer.warmth)
                pool.admit(layer, LARGE[layer.warmth], now)
        pool.use(layers, now)
        for second in range(int(now) + 1, int(then) + 1):
            for key in pool.surplus(float(second)):
                pool.leave(key)
    return made


ONE = [(5.0 * number, path(LLM, "1")) for number in range(720)]
"""A start every five seconds for an hour."""


def test_a_template_that_does_not_fit_beside_its_libraries_is_made_once() -> None:
    before = makings(Pool(budget_mb=SMALL), ONE, blind=True)
    assert (before.count("libs"), before.count("template")) == (1, 720)
    assert makings(Pool(budget_mb=SMALL), ONE) == ["libs", "template"]


def test_each_of_many_templates_that_do_not_fit_is_made_once() -> None:
    starts = [(5.0 * number, path(LLM, str(number % 10))) for number in range(720)]
    assert makings(Pool(budget_mb=SMALL), starts, blind=True).count("template") == 720
    after = makings(Pool(budget_mb=SMALL), starts)
    assert (after.count("libs"), after.count("template")) == (1, 10)


def test_libraries_larger_than_the_budget_are_made_once_and_their_template_too() -> None:
    assert len(makings(Pool(budget_mb=200.0), ONE, blind=True)) == 1440
    assert makings(Pool(budget_mb=200.0), ONE) == ["libs", "template"]


def test_what_fits_is_made_and_kept_as_before() -> None:
    roomy = LARGE["libs"].memory_mb + LARGE["template"].memory_mb
    assert makings(Pool(budget_mb=roomy), ONE) == makings(Pool(budget_mb=roomy), ONE, blind=True)
    assert makings(Pool(budget_mb=roomy), ONE) == ["libs", "template"]


def test_starts_that_come_together_share_one_making() -> None:
    pool, layers = Pool(budget_mb=SMALL), path(LLM, "1")
    makings(pool, ONE[:2])
    assert pool.wanted(layers, 20.0) == layers[:2]
    pool.use(layers, 20.0)
    assert pool.wanted(layers, 20.0 + TOGETHER / 2) == layers
    assert pool.wanted(layers, 20.0 + TOGETHER) == layers[:2]


def test_a_start_waits_for_what_is_under_way_or_there_though_it_is_not_kept() -> None:
    pool, layers = Pool(budget_mb=SMALL), path(LLM, "1")
    makings(pool, ONE[:2])
    assert pool.wanted(layers, 20.0, making={layers[2].key: None}) == layers
    pool.admit(layers[2], LARGE["template"], 20.0)
    assert pool.wanted(layers, 30.0) == layers


def test_one_that_fits_once_there_is_room_is_made_then() -> None:
    pool, layers = Pool(budget_mb=SMALL), path(LLM, "1")
    makings(pool, ONE[:2])
    pool.weigh(layers[1].key, 200.0)
    assert pool.wanted(layers, 20.0) == layers


def test_one_that_died_and_would_not_be_kept_is_not_made_again() -> None:
    pool, layers = Pool(budget_mb=SMALL), path(LLM, "1")
    for layer in layers:
        pool.admit(layer, LARGE[layer.warmth], 0.0)
    pool.died(layers[2].key, 0.5)
    assert pool.missing(1.0) == []


def test_over_the_budget_of_its_kind_the_least_valuable_of_that_kind_goes() -> None:
    pool = Pool(budgets={"template": 50.0})
    admit(pool, [*path(LLM, "1")[:2], *[template(number) for number in range(4)]])  # 80 MiB of templates
    for now in (1.0, 2.0, 3.0):
        pool.use([template(1), template(3)], now)
    assert pool.surplus(4.0) == ["template:0", "template:2"]


def test_nothing_goes_for_room_that_others_leave_anyway() -> None:
    pool = Pool(budget_mb=200.0, budgets={"template": 20.0})
    admit(pool, [*path(LLM, "1")[:2], template(1), template(2), template(3)])  # 210 MiB
    pool.use([template(1)], 1.0)
    pool.use([template(1)], 2.0)
    assert pool.surplus(3.0) == ["template:2", "template:3"]


def test_what_was_forked_from_a_layer_goes_before_it() -> None:
    pool, layers = Pool(budget_mb=250.0), path(LLM, "1")
    pool.admit(layers[0], LARGE["base"], 0.0)
    pool.admit(layers[1], LARGE["libs"], 0.0)
    pool.admit(layers[2], Cost(50.0, 20.0), 0.0)
    assert pool.surplus(1.0) == [layers[2].key]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 60.0)), max_size=40), st.floats(0.0, 400.0))
def test_a_kind_without_a_budget_of_its_own_may_take_all(uses: list[tuple[int, float]], budget: float) -> None:
    """One budget for all, and the whole for each kind, keep the same."""
    one, each = Pool(budget_mb=budget), Pool(budget_mb=budget, budgets={"libs": budget, "template": budget})
    now = 0.0
    for number, wait in uses:
        now += wait
        layers = path(LLM, str(number))
        for pool in (one, each):
            for layer in pool.wanted(layers, now):
                if layer.key not in pool:
                    pool.admit(layer, LARGE[layer.warmth], now)
            pool.use(layers, now)
        ended = one.surplus(now + 1.0)
        assert sorted(each.surplus(now + 1.0)) == sorted(ended)
        for key in ended:
            one.leave(key)
            each.leave(key)
        assert one.memory_mb() <= budget


def test_a_kind_without_memory_is_not_made() -> None:
    layers = path(LLM, "1")
    assert Pool(budgets={"template": 0.0}).wanted(layers, 0.0) == layers[:2]


def test_the_budget_that_would_hold_a_layer_is_named() -> None:
    pool, layers = Pool(budget_mb=SMALL), path(LLM, "1")
    for layer in layers:
        pool.admit(layer, LARGE[layer.warmth], 0.0)
    assert pool.surplus(1.0) == [layers[2].key]
    assert pool.short(layers[2].key) == Short("", 270.0)
    assert pool.short(layers[1].key) is None
    kinds = Pool(budgets={"template": 10.0})
    kinds.admit(layers[2], LARGE["template"], 0.0)
    assert kinds.short(layers[2].key) == Short("template", 20.0)


def test_what_was_not_used_for_long_is_forgotten_but_nothing_that_exists() -> None:
    pool = Pool()
    admit(pool, [template(0)])
    for number in range(1, REMEMBERED + 10):
        pool.use([template(number)], 1.0)
    assert len(pool._usage) == REMEMBERED + 1
    assert pool.surplus(2.0) == [] and pool.short(template(0).key) is None


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
