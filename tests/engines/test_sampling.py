"""Drawing is a pure function of logits, history, seed and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sllm_invoker.runner.engines.base import Sampling
from sllm_invoker.runner.sampling import draw, gumbel_of, gumbel_of_all, philox

RNG = np.random.default_rng(5)


def _draw_one(logits, sampling, history=()):
    return draw(np.asarray([logits], dtype=np.float32), [sampling], [list(history)])[0].token


def _words(value: int) -> np.ndarray:
    return np.array([[value]], dtype=np.uint64)


def test_philox_gives_the_published_test_vectors():
    """Random123's known answers for philox4x32-10 (key and counter all zeros, all ones)."""
    zeros = philox(_words(0), _words(0), _words(0))[:, 0, 0]
    assert [int(w) for w in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox(_words(2**64 - 1), _words(2**64 - 1), _words(2**64 - 1))[:, 0, 0]
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("fixed", ["seed", "position"])
def test_draws_follow_the_softmax(temperature, fixed):
    """Chi-square over 20,000 draws, along positions of one seed and along seeds at one position."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, 0.2], dtype=np.float32)
    count, size = 20_000, len(logits)
    keys = [(11, i) if fixed == "seed" else (i, 3) for i in range(count)]
    drawn = (logits / temperature + gumbel_of_all(keys, size)).argmax(axis=1)
    expected = np.exp(logits.astype(float) / temperature)
    expected *= count / expected.sum()
    observed = np.bincount(drawn, minlength=size)
    assert ((observed - expected) ** 2 / expected).sum() < 22.46  # chi-square, 6 degrees, p = 0.001


def test_draw_uses_that_noise():
    logits = RNG.normal(size=50).astype(np.float32)
    for position in range(30):
        expected = int((logits.astype(float) + gumbel_of_all([(9, position)], 50)).argmax())
        assert _draw_one(logits, Sampling(seed=9), [1] * position) == expected


def test_the_noise_of_some_tokens_is_that_of_all():
    keys = [(1, 5), (2**63 + 1, 0), (1, 6)]
    every = gumbel_of_all(keys, 41)
    tokens = [np.array([40, 0, 7]), np.arange(41), np.array([3])]
    for row, some, noise in zip(every, tokens, gumbel_of(keys, tokens), strict=True):
        assert (row[some] == noise).all()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_row_draws_the_same_alone_and_in_a_batch(rows, size, seed, top_k, top_p, temperature):
    logits = np.random.default_rng(seed % 1000).normal(size=(rows, size)).astype(np.float32)
    histories = [[i % size] * i for i in range(rows)]
    samplings = [
        Sampling(temperature, top_p, top_k, 0.5, 0.2, seed + i if seed + i < 2**64 else i)
        if i % 2
        else Sampling(temperature, seed=seed)
        for i in range(rows)
    ]
    together = draw(logits, samplings, histories)
    alone = [draw(logits[i : i + 1], [samplings[i]], [histories[i]])[0] for i in range(rows)]
    assert together == alone


def test_the_same_seed_draws_the_same_and_another_differs():
    logits = np.zeros(1000, dtype=np.float32)
    first = [_draw_one(logits, Sampling(seed=1), [0] * i) for i in range(20)]
    assert first == [_draw_one(logits, Sampling(seed=1), [0] * i) for i in range(20)]
    assert first != [_draw_one(logits, Sampling(seed=2), [0] * i) for i in range(20)]
    assert len(set(first)) > 15  # and positions differ


def test_filters_leave_the_noise_of_the_others_as_it_is():
    """A draw that falls among the candidates is the same with and without the filter."""
    logits = RNG.normal(size=64).astype(np.float32)
    for position in range(40):
        free = _draw_one(logits, Sampling(seed=4), [0] * position)
        kept = _draw_one(logits, Sampling(seed=4, top_k=32), [0] * position)
        if free in np.argsort(-logits)[:32]:
            assert kept == free


def test_temperature_zero_takes_the_best_and_the_first_of_equals():
    assert _draw_one([0.0, 3.0, 3.0, 1.0], Sampling(temperature=0)) == 1


def test_top_k_one_and_a_tiny_top_p_are_greedy():
    logits = RNG.normal(size=300).astype(np.float32)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-9)):
        assert {_draw_one(logits, sampling, [0] * i) for i in range(20)} == {int(logits.argmax())}


def test_top_k_beyond_the_vocabulary_changes_nothing():
    logits = RNG.normal(size=30).astype(np.float32)
    for i in range(20):
        assert _draw_one(logits, Sampling(top_k=500), [0] * i) == _draw_one(logits, Sampling(), [0] * i)


def test_top_k_breaks_ties_at_its_border_by_token_id():
    logits = np.array([1.0, 2.0, 1.0, 1.0], dtype=np.float32)
    drawn = {_draw_one(logits, Sampling(top_k=2), [0] * i) for i in range(200)}
    assert drawn == {0, 1}


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for top_p, kept in [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2}), (0.999, {0, 1, 2, 3})]:
        drawn = {_draw_one(logits, Sampling(top_p=top_p - 1e-6), [0] * i) for i in range(300)}
        assert drawn == kept, top_p


def test_top_p_counts_within_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    drawn = {_draw_one(logits, Sampling(top_k=2, top_p=0.5), [0] * i) for i in range(200)}
    assert drawn == {0}  # 0.4 of 0.7 is above one half


def test_top_p_over_a_flat_large_vocabulary_keeps_its_share():
    """More candidates than the first guess sorts."""
    logits = np.zeros(5000, dtype=np.float32)
    drawn = {_draw_one(logits, Sampling(top_p=0.5), [0] * i) for i in range(400)}
    assert max(drawn) < 2501
    assert max(drawn) > 1500


def test_penalties_are_subtracted_by_openai_definition():
    logits = np.array([1.0, 1.2, 0.9], dtype=np.float32)
    assert _draw_one(logits, Sampling(temperature=0, presence_penalty=0.25), [1]) == 0
    assert _draw_one(logits, Sampling(temperature=0, presence_penalty=0.15), [1, 1, 1]) == 1
    assert _draw_one(logits, Sampling(temperature=0, frequency_penalty=0.15), [1]) == 1
    assert _draw_one(logits, Sampling(temperature=0, frequency_penalty=0.15), [1, 1]) == 0
    assert _draw_one(logits, Sampling(temperature=0, presence_penalty=-0.3), [2]) == 1
    assert _draw_one(logits, Sampling(temperature=0, presence_penalty=-0.31), [2]) == 2


def test_logprobs_are_those_of_the_raw_logits():
    logits = np.array([[1.0, 3.0, 2.0, 3.0]], dtype=np.float32)
    drawn = draw(logits, [Sampling(temperature=0, presence_penalty=2.0, logprobs=3)], [[1]])[0]
    logs = logits[0] - math.log(np.exp(logits[0].astype(float)).sum())
    assert drawn.token == 3
    assert drawn.logprob == pytest.approx(logs[3], abs=1e-6)
    assert [entry.token for entry in drawn.top] == [1, 3, 2]
    assert [entry.logprob for entry in drawn.top] == pytest.approx([logs[1], logs[3], logs[2]], abs=1e-6)


def test_no_logprobs_unless_asked_and_none_beside_with_zero():
    logits = np.zeros((2, 4), dtype=np.float32)
    without, with_zero = draw(logits, [Sampling(), Sampling(logprobs=0)], [[], []])
    assert without.logprob is None
    assert with_zero.logprob == pytest.approx(-math.log(4))
    assert with_zero.top == ()
