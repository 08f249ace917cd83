"""Arrivals, popularity and lengths: what was asked for comes out, the same for the same seed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.errors import BadRequest
from sllm_faas.sim import workload
from sllm_faas.sim.scenario import FunctionModel, LoadModel, NodeModel, Scenario

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.0000000,12,7
"""


def intervals(times):
    times = list(times)
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_cv(cv):
    gaps = intervals(islice(workload.gamma(Random(1), 2.0, cv), 40_000))
    assert mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv, rel=0.1)


def test_bursts_are_silent_in_between_and_have_the_mean_rate():
    gaps = intervals(islice(workload.bursts(Random(1), 5.0, 10.0, 40.0), 50_000))
    assert mean(gaps) == pytest.approx(0.2, rel=0.15)
    assert max(gaps) > 60


def test_minutes_keep_the_mean_rate_and_the_order():
    times = list(islice(workload.minutes(Random(2), 10.0), 60_000))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.25)


@given(st.integers(1, 500), st.floats(0, 3))
def test_popularity_falls_and_adds_up(count, exponent):
    shares = workload.zipf(count, exponent)
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)


def test_lognormal_lengths_have_the_mean_and_the_99th_percentile():
    draw = workload.lengths("lognormal:1155:4142", (), Random(3))
    values = sorted(draw() for _ in range(40_000))
    assert mean(values) == pytest.approx(1155, rel=0.05)
    assert values[39_600] == pytest.approx(4142, rel=0.1)


@pytest.mark.parametrize("text", ["", "fixed:x", "lognormal:10:5", "lognormal:1", "trace", "uniform:3"])
def test_what_is_not_a_length_is_refused(text):
    with pytest.raises(BadRequest, match="token lengths"):
        workload.lengths(text, (), Random(0))


def test_a_trace_is_sorted_and_starts_at_zero(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text(TRACE)
    trace = workload.read_trace(path)
    assert trace.arrivals == pytest.approx((0.0, 1.31941, 4.314579))
    assert trace.inputs == (374, 12, 396)


def test_a_trace_at_its_own_rate_keeps_its_times_and_begins_anew_after_a_mean_interval(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text(TRACE)
    trace = workload.read_trace(path)
    assert trace.rate == pytest.approx(2 / 4.314579)
    times = [at for at, _, _ in islice(workload.replay(trace, trace.rate), 5)]
    again = 4.314579 * 3 / 2
    assert times == pytest.approx((0.0, 1.31941, 4.314579, again, again + 1.31941))
    many = [at for at, _, _ in islice(workload.replay(trace, 5.0), 30_001)]
    assert many[-1] == pytest.approx(6000.0)


def test_requests_of_one_moment_have_no_rate_of_their_own(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(TRACE.splitlines()[:2]))
    trace = workload.read_trace(path)
    with pytest.raises(BadRequest, match="rate of its own"):
        _ = trace.rate
    assert [at for at, _, _ in islice(workload.replay(trace, 2.0), 3)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "text", ["", "a,b,c\n", TRACE + "x,1,2\n", TRACE.splitlines()[0] + "\n", TRACE + "2023-11-16 18:15:46,a,1"]
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BadRequest):
        workload.read_trace(path)
    with pytest.raises(BadRequest, match="cannot read"):
        workload.read_trace(tmp_path / "none")


@pytest.mark.parametrize("arrivals", ["gamma", "bursts", "minutes", "poisson", "trace"])
@pytest.mark.parametrize("per_function", [False, True])
def test_requests_are_in_order_and_the_same_for_the_same_seed(tmp_path: Path, arrivals, per_function):
    path = tmp_path / "t.csv"
    path.write_text(TRACE)
    load = LoadModel(arrivals, rate=5.0, cv=2.0, popularity=1.0, per_function=per_function, trace=str(path))
    scenario = Scenario("s", (NodeModel(),), (FunctionModel("f", count=7, input="trace"),), load, seconds=50.0)
    first = list(workload.requests(scenario, Random(4)))
    assert first == list(workload.requests(scenario, Random(4)))
    assert first != list(workload.requests(scenario, Random(5)))
    assert [request.at for request in first] == sorted(request.at for request in first)
    assert {request.function for request in first} <= set(range(7))
    assert {request.input for request in first} <= {374, 12, 396}
