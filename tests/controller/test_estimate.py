"""Predicted start-up times, and what is learned from actual ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sllm_faas.controller import estimate as e
from sllm_faas.layers import Layer
from sllm_faas.spec import Span, Timeline

LIBS = Layer("libs:torch", "libs", "base", ("torch",))
TEMPLATE = Layer("template:d", "template", "libs:torch")
PLAIN = e.Start(node="n", function="app/f", libs="", warmth="base", tier="disk", size=0)
MODEL = e.Start(node="n", function="app/m", libs="torch", warmth="template", tier="disk", size=10**9)
GB = 10**9


def learn(book, start, actual, *spans, predicted=1.0, read=0.0):
    finished = e.Finished(Timeline(0.0, spans), start.size if read else 0, read, predicted, actual)
    e.learn(book, start, finished)


def total(book, start, queue=0.0):
    return e.estimate(book, {}, start, queue).total


def test_the_parts_are_shown_and_the_read_goes_on_beside_the_container():
    guess = e.estimate({}, {"disk": 2e9}, replace(MODEL, size=4 * GB, missing=(LIBS,)), queue=0.5)
    assert guess.total == pytest.approx(max(2.5 + 0.1, 0.5 + 2.0 + 0.1))
    shown = "2.60 s = template container 2.60, beside it queue 0.50 + disk load 2.00 + 0.10 (from 0 starts)"
    assert str(guess) == shown


def test_a_function_without_weights_has_nothing_to_load():
    assert total({}, PLAIN, queue=3.0) == e.OWN


def test_actual_starts_replace_the_guess_step_by_step():
    """The first observation is taken whole, then the k-th counts k times, then WEIGHT."""
    book: e.Book = {}
    learn(book, PLAIN, 2.0)
    assert total(book, PLAIN) == 2.0
    learn(book, PLAIN, 1.0)
    assert total(book, PLAIN) == pytest.approx((2.0 + 2 * 1.0) / 3)
    learn(book, PLAIN, 1.5)
    assert total(book, PLAIN) == pytest.approx((2.0 + 2 * 1.0 + 3 * 1.5) / 6)


def test_one_start_that_is_far_off_moves_little_once_there_are_several():
    book: e.Book = {}
    for actual in (1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0):
        learn(book, PLAIN, actual)
    before = total(book, PLAIN)
    learn(book, PLAIN, 60.0)
    assert total(book, PLAIN) - before < 0.2


def test_a_read_that_took_no_time_tells_how_fast_others_of_its_size_are_and_nothing_of_larger_ones():
    book: e.Book = {}
    small = replace(MODEL, tier="dram", size=1_000_000)
    learn(book, small, 0.05, Span("checkpoint", 0.0, 0.0))
    assert e.bandwidth(book, {}, "n", "dram", small.size) == pytest.approx(1e9)
    assert e.bandwidth(book, {}, "n", "dram", MODEL.size) == e.BANDWIDTH["dram"]


def test_a_change_for_good_is_followed():
    book: e.Book = {}
    for actual in [1.0] * 20 + [3.0] * 30:
        learn(book, PLAIN, actual)
    assert total(book, PLAIN) == pytest.approx(3.0, rel=0.1)


def test_missing_layers_are_learned_apart_from_the_function():
    """So the same function is predicted from every warmth after it was seen from one."""
    book: e.Book = {}
    cold = replace(MODEL, size=0, warmth="base", missing=(LIBS, TEMPLATE))
    learn(book, cold, 4.0, Span("libs", 0.0, 3.0, "made"), Span("template", 3.0, 0.8, "made"))
    assert total(book, replace(cold, missing=())) == pytest.approx(0.2)
    assert total(book, replace(cold, missing=(TEMPLATE,))) == pytest.approx(1.0)
    assert total(book, cold) == pytest.approx(4.0)


def test_the_first_layer_a_start_makes_is_told_from_a_later_one():
    """The first is made beside the read, a later one most often after it."""
    book: e.Book = {}
    for _ in range(5):
        spans = (Span("libs", 0.0, 3.0, "made"), Span("template", 3.0, 0.2, "made"))
        learn(book, replace(MODEL, warmth="base", missing=(LIBS, TEMPLATE)), 3.3, *spans)
        learn(book, replace(MODEL, warmth="libs", missing=(TEMPLATE,)), 0.6, Span("template", 0.0, 0.5, "made"))
    assert e.making_seconds(book, (TEMPLATE,)) == pytest.approx(0.5)
    assert 3.2 < e.making_seconds(book, (LIBS, TEMPLATE)) < 3.5


def test_nodes_whose_pace_differs_by_little_are_alike():
    book: e.Book = {}
    learn(book, PLAIN, 1.0)
    for pace, expected in ((0.96, 1.0), (1.04, 1.0), (1.06, 1.06), (0.9, 0.9)):
        book["pace|n"] = pace
        assert total(book, PLAIN) == pytest.approx(expected)


def test_a_layer_that_was_held_up_counts_for_twice_what_it_takes_at_most():
    book: e.Book = {}
    for seconds in (0.2, 2.0):
        start = replace(MODEL, warmth="libs", missing=(TEMPLATE,))
        learn(book, start, seconds + 0.1, Span("template", 0.0, seconds, "made"))
    assert e.making_seconds(book, (TEMPLATE,)) == pytest.approx(0.2 + 2 / 3 * 0.2)


def test_a_layer_that_took_nothing_the_first_time_is_not_held_up_for_ever_after():
    """As one that another start had nearly made, or whose crowd is thought to have cost as much as it took."""
    book: e.Book = {}
    for seconds in (0.0, *[0.3] * 20):
        start = replace(MODEL, warmth="libs", missing=(TEMPLATE,))
        learn(book, start, seconds + 0.1, Span("template", 0.0, seconds, "made"))
    assert e.making_seconds(book, (TEMPLATE,)) == pytest.approx(0.3, rel=0.1)


def test_a_template_takes_longer_in_a_crowd_and_libraries_that_all_wait_for_do_not():
    book: e.Book = {}
    learn(book, replace(MODEL, warmth="libs", missing=(TEMPLATE,)), 0.3, Span("template", 0.0, 0.2, "made"))
    crowd = replace(MODEL, warmth="base", missing=(LIBS, TEMPLATE), at_once=4.0)
    learn(book, crowd, 4.0, Span("libs", 0.0, 3.0, "made"), Span("template", 3.0, 0.4, "made"))
    assert e.making_seconds(book, (LIBS,)) == e.making_seconds(book, (LIBS,), 4.0) == pytest.approx(3.0)
    assert e.making_seconds(book, (TEMPLATE,)) == pytest.approx(0.2)
    assert book["crowd|template|4"] == pytest.approx(0.2)
    assert e.making_seconds(book, (LIBS, TEMPLATE), 4.0) == pytest.approx(3.4)


def test_where_the_page_cache_nearly_always_has_it_is_learned_by_node():
    book: e.Book = {}
    assert not e.is_cached(book, "n", "d", False)
    e.learn_cached(book, "n", "d", False, "disk")
    assert book == {}
    for tier in ("dram", "disk", "dram", "dram", "dram", "dram"):
        assert not e.is_cached(book, "n", "d", False)
        e.learn_cached(book, "n", "d", False, tier)
    assert e.is_cached(book, "n", "d", False)
    assert e.ever_cached(book, "d")
    assert not e.ever_cached(book, "c")
    assert not e.is_cached(book, "m", "d", False)
    e.forget(book, "n")
    assert not e.is_cached(book, "n", "d", False)


def test_the_page_cache_is_another_one_where_the_dram_tier_has_no_room():
    """Without room the checkpoint is read through it, and past it otherwise."""
    book: e.Book = {}
    for _ in range(e.SEEN):
        e.learn_cached(book, "n", "d", True, "dram")
        e.learn_cached(book, "n", "d", False, "disk")
    assert e.is_cached(book, "n", "d", True)
    assert not e.is_cached(book, "n", "d", False)
    for _ in range(e.SEEN):
        e.learn_cached(book, "n", "small", False, "dram")
    assert e.is_cached(book, "n", "small", True)


def test_a_layer_that_another_start_makes_is_not_learned_from_who_waits_for_it():
    book: e.Book = {}
    cold = replace(MODEL, size=0, missing=(LIBS,))
    learn(book, cold, 3.2, Span("libs", 0.0, 3.0, "made"))
    learn(book, cold, 0.7, Span("libs", 0.0, 0.5, "awaited"))
    assert total(book, cold) == pytest.approx(3.2)
    assert total(book, replace(cold, awaited=2.5)) == pytest.approx(0.7)


def test_a_read_that_held_the_start_up_is_learned_as_bandwidth_and_what_came_after_it():
    book: e.Book = {}
    spans = (Span("checkpoint", 0.0, 2.0, "tier=disk"), Span("attach", 0.1, 1.95))
    learn(book, MODEL, 2.1, *spans, read=2.0)
    assert e.bandwidth(book, {"disk": 9e9}, "n", "disk") == pytest.approx(5e8)
    assert total(book, MODEL) == pytest.approx(2.1)
    assert total(book, replace(MODEL, size=2 * GB)) == pytest.approx(4.1)
    assert total(book, MODEL, queue=1.0) == pytest.approx(3.1)


def test_a_pull_is_learned_as_the_bandwidth_of_what_is_remote_and_not_as_the_functions_own():
    book: e.Book = {}
    pull = Span("pull", 0.0, 20.0, "tier=remote")
    learn(book, MODEL, 21.0, pull, Span("checkpoint", 20.0, 0.1), read=0.1)
    assert total(book, replace(MODEL, tier="dram")) == pytest.approx(1.0, abs=0.2)
    assert total(book, replace(MODEL, tier="remote")) == pytest.approx(20.0, rel=0.1)


def test_a_read_that_ended_before_the_container_was_there_costs_nothing():
    book: e.Book = {}
    spans = (Span("checkpoint", 0.0, 0.5, "tier=disk"), Span("attach", 0.9, 0.1))
    learn(book, MODEL, 1.0, *spans, read=0.5)
    assert total(book, MODEL) == pytest.approx(1.5)  # what comes after the last byte is not known yet
    assert total(book, replace(MODEL, tier="dram")) == pytest.approx(1.0, abs=0.2)


def test_bandwidth_is_learned_by_size_for_the_latency_is_the_same():
    book: e.Book = {}
    small = replace(MODEL, size=10**6)
    read = Span("checkpoint", 0.0, 0.1, "")
    learn(book, small, 0.2, read, read=0.1)
    learn(book, MODEL, 0.6, Span("checkpoint", 0.0, 0.5, ""), read=0.5)
    assert e.bandwidth(book, {}, "n", "disk", 10**6) == pytest.approx(1e7)
    assert e.bandwidth(book, {}, "n", "disk", GB) == pytest.approx(2e9)


def test_starts_at_once_are_learned_by_how_many_there_are():
    book: e.Book = {}
    learn(book, PLAIN, 0.1)
    learn(book, replace(PLAIN, at_once=4.0), 0.3)
    assert total(book, PLAIN) == pytest.approx(0.1)
    assert total(book, replace(PLAIN, at_once=3.8)) == pytest.approx(0.3)


def test_how_much_many_starts_slow_each_other_down_is_carried_over_to_other_functions():
    """In seconds: one that waits for something else, however long, is not slowed by the others meanwhile."""
    book: e.Book = {}
    for _ in range(3):
        learn(book, PLAIN, 0.1)
        learn(book, replace(PLAIN, at_once=4.0), 0.3)
    other = replace(PLAIN, function="app/g")
    learn(book, other, 5.0)
    assert total(book, replace(other, at_once=4.0)) == pytest.approx(5.2)
    crowded = replace(PLAIN, function="app/h", at_once=4.0)
    learn(book, crowded, 0.5)
    assert total(book, replace(crowded, at_once=1.0)) == pytest.approx(0.3)


def test_an_unknown_function_is_taken_for_one_with_the_same_libraries():
    book: e.Book = {}
    learn(book, PLAIN, 0.05)
    learn(book, replace(MODEL, size=0), 0.4)
    assert total(book, replace(PLAIN, function="app/new")) == pytest.approx(0.05)
    assert total(book, replace(MODEL, function="app/new", size=0)) == pytest.approx(0.4)


def test_a_slow_node_is_found_out():
    book: e.Book = {}
    for _ in range(40):
        learn(book, PLAIN, 0.1)
        learn(book, replace(PLAIN, node="slow"), 0.3)
    assert total(book, replace(PLAIN, node="slow")) == pytest.approx(0.3, rel=0.1)
    assert total(book, PLAIN) == pytest.approx(0.1, rel=0.1)


def test_a_calibration_of_zero_is_no_calibration():
    assert e.bandwidth({}, {"disk": 0.0}, "n", "disk") == e.BANDWIDTH["disk"]


def test_the_error_of_predictions_is_kept_and_is_the_margin_of_the_next():
    book: e.Book = {}
    learn(book, PLAIN, 1.5, predicted=1.0)
    assert book["error"] == book["error|n"] == pytest.approx(0.5)
    assert book["starts"] == 1
    guess = e.estimate(book, {}, PLAIN, 0.0)
    assert (guess.margin, guess.starts) == (pytest.approx(0.5), 1)
    assert str(guess) == "1.50 ± 0.50 s = base container 1.50 (from 1 starts)"


def test_a_node_that_is_gone_is_forgotten_the_rest_is_not():
    book: e.Book = {}
    learn(book, MODEL, 2.0, Span("checkpoint", 0.0, 1.0, ""), read=1.0)
    learn(book, MODEL, 2.0, Span("checkpoint", 0.0, 1.0, ""), read=1.0)
    e.forget(book, "n")
    assert not any("|n|" in key or key.endswith("|n") for key in book)
    assert e.own_seconds(book, MODEL.function, MODEL.libs, 1) == (pytest.approx(2.0), True)


@given(
    st.lists(st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.floats(1.0, 100.0), st.integers(0, 2)), max_size=30)
)
@example([(0.0, 0.0, 2.0, 1), (2.3e-309, 0.0, 1.0, 0), (1.0, 0.0, 2.0, 0), (0.0, 0.0, 2.0, 0)])
def test_whatever_is_learned_predictions_stay_finite_and_not_negative(seen):
    book: e.Book = {}
    for actual, read, at_once, which in seen:
        start = replace((PLAIN, MODEL, replace(MODEL, node="m"))[which], at_once=at_once)
        learn(book, start, actual, Span("checkpoint", 0.0, read, ""), Span("attach", 0.0, read), read=read)
        for node in ("n", "m"):
            assert 0 <= total(book, replace(MODEL, node=node, missing=(LIBS,)), queue=1.0) < 1e12
