"""Predicted start-up times, and what is learned from actual ones."""

from __future__ import annotations

import pytest

from sllm_faas.controller import estimate as e
from sllm_faas.spec import Span, Timeline


def learn(book, actual, *, predicted=1.0, size=0, load=0.0, node="n", warmth="libs"):
    spans = (Span("checkpoint", 0.0, load, "disk"),) if load else ()
    e.learn(
        book,
        node=node,
        function="app/f",
        warmth=warmth,
        tier="disk",
        size=size,
        timeline=Timeline(0.0, spans),
        predicted=predicted,
        actual=actual,
    )


def test_the_parts_add_up_and_are_shown():
    guess = e.estimate({}, {"disk": 2e9}, "n", "app/f", "libs", "disk", 4 * 10**9, queue=0.5)
    assert guess.total == pytest.approx(0.5 + 0.1 + 2.0 + 0.05)
    assert str(guess) == "2.65 s = queue 0.50 + libs container 0.10 + disk load 2.00 + first 0.05"


def test_a_function_without_weights_has_nothing_to_load():
    guess = e.estimate({}, {}, "n", "app/f", "template", "disk", 0, queue=0.0)
    assert guess.total == pytest.approx(0.05)


def test_actual_starts_replace_the_guess_step_by_step():
    """The first observation is taken whole, later ones by WEIGHT."""
    book: e.Book = {}
    learn(book, 2.0)
    assert e.container_seconds(book, "n", "libs", "app/f") == 2.0
    learn(book, 1.0)
    assert e.container_seconds(book, "n", "libs", "app/f") == pytest.approx(2.0 - 0.3)


def test_the_most_particular_constant_is_used():
    book: e.Book = {}
    learn(book, 2.0)
    assert e.container_seconds(book, "n", "libs", "app/other") == 2.0
    assert e.container_seconds(book, "other", "libs", "app/f") == 2.0
    assert e.container_seconds(book, "n", "base", "app/f") == e.CONTAINER["base"]


def test_bandwidth_is_learned_apart_from_the_container():
    book: e.Book = {}
    learn(book, 3.0, size=10**9, load=2.0)
    assert e.bandwidth(book, {"disk": 9e9}, "n", "disk") == pytest.approx(5e8)
    assert e.container_seconds(book, "n", "libs", "app/f") == pytest.approx(1.0)


def test_a_calibration_of_zero_is_no_calibration():
    assert e.bandwidth({}, {"disk": 0.0}, "n", "disk") == e.BANDWIDTH["disk"]


def test_the_error_of_predictions_is_kept():
    book: e.Book = {}
    learn(book, 1.5, predicted=1.0)
    assert book["error"] == book["error|n"] == pytest.approx(0.5)
    assert book["starts"] == 1


def test_a_node_that_is_gone_is_forgotten_the_rest_is_not():
    book: e.Book = {}
    learn(book, 2.0, node="n")
    e.forget(book, "n")
    assert e.container_seconds(book, "n", "libs", "app/f") == 2.0
    assert not any("|n|" in key or key.endswith("|n") for key in book)
