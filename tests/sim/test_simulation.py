"""The simulation: nobody is lost, time is what the model says, runs repeat, policies differ where they should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_faas.errors import BadRequest
from sllm_faas.sim import presets, scenario
from sllm_faas.sim.node import Host
from sllm_faas.sim.policies import POLICIES
from sllm_faas.sim.results import percentile, summary
from sllm_faas.sim.scenario import FunctionModel, LoadModel, NodeModel, Scenario
from sllm_faas.sim.simulation import Simulation
from sllm_faas.sim.workload import Request

MODEL = FunctionModel(
    "m", count=6, checkpoint_gb=4.0, memory_mb=100, gpus=1, per_input=0.001, per_output=0.02, slo_ttft=5.0
)
SMALL = Scenario(
    "s",
    (NodeModel(2, memory_gb=64.0, gpus=2, dram_gb=8.0, disk=2.0, dram=20.0, container=0.1),),
    (MODEL,),
    LoadModel("gamma", rate=1.0, cv=2.0, popularity=1.0),
    seconds=60.0,
)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_and_nothing_is_left_running(policy):
    simulation = Simulation(SMALL, policy, 3)
    result = simulation.run()
    assert result.requests == result.answered + result.refused > 20
    assert result.refused == result.unfinished == 0
    assert len(simulation.samples.ttft) == result.answered
    simulation.machine.validate()
    simulation.gateway.queue.validate()
    simulation.gateway.slots.validate()
    assert simulation.gateway.slots.in_flight() == 0
    running = {name for node in simulation.nodes.values() for name in node.instances}
    assert running == set(simulation.machine.state.instances)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_repeats_exactly(policy):
    first, second = (Simulation(SMALL, policy, 3).run() for _ in range(2))
    assert first == second
    assert first != Simulation(SMALL, policy, 4).run()


def test_one_cold_request_takes_what_the_model_says():
    """Two messages to the node, one read of 4 GB at 2 GB/s, the container, and its grant back; then the prompt."""
    one = replace(MODEL, count=1, input="fixed:100")
    node = replace(SMALL.nodes[0], count=1, delay=0.01)
    alone = replace(SMALL, nodes=(node,), functions=(one,), load=LoadModel("poisson", rate=0.001), seconds=3000.0)
    simulation = Simulation(alone, "ours", 1)
    simulation.run()
    assert simulation.samples.startup[0] == pytest.approx(2.0 + 0.1 + 3 * 0.01, abs=1e-6)
    assert simulation.samples.ttft[0] == pytest.approx(simulation.samples.startup[0] + 0.1, abs=1e-6)


def test_estimates_become_right_where_nothing_is_random():
    result = Simulation(replace(SMALL, seconds=300.0), "ours", 1).run()
    assert result.cold > 20
    assert result.estimate_error["p50"] < 0.06  # the prediction includes the first token


def test_running_requests_are_moved_or_preempted_only_by_the_policies_that_do():
    crowded = replace(SMALL, nodes=(replace(SMALL.nodes[0], count=3),)).at(2.0)
    results = {policy: Simulation(crowded, policy, 6).run() for policy in POLICIES}
    assert results["ours"].migrations > 0
    assert results["serverlessllm"].migrations > 0
    assert results["preempt"].preemptions > 0
    assert results["preempt-resume"].preemptions > 0
    for policy in ("availability", "balanced", "random"):
        assert results[policy].migrations == results[policy].preemptions == 0
    assert Simulation(replace(crowded, migrate=False), "ours", 6).run().migrations == 0


def test_a_refused_request_is_counted():
    tight = replace(MODEL, max_queue=1, max_containers=1, count=1)
    result = Simulation(replace(SMALL, functions=(tight,)).at(5.0), "ours", 1).run()
    assert result.refused > 0
    assert result.requests == result.answered + result.refused


FLOOD = FunctionModel("flood", gpus=1, memory_mb=100, max_containers=50, app="noisy", seconds=1.0)
EIGHT = replace(SMALL, nodes=(replace(SMALL.nodes[0], gpus=4),))
"""Places for instances with one GPU."""


def held_over(scenario: Scenario, start: float, end: float) -> dict[str, float]:
    """By app, the mean number of instances that served or started over that time."""
    simulation = Simulation(scenario, "ours", 1)
    simulation._next_arrival()
    held: Counter[str] = Counter()
    looks = range(int(start), int(end))
    for second in looks:
        simulation.clock.run(float(second))
        held.update(i.target.app for i in simulation.machine.state.instances.values() if i.state != "draining")
    simulation.machine.validate()
    return {app: count / len(looks) for app, count in held.items()}


@pytest.mark.parametrize(("weight", "noisy", "other"), [(1.0, 4.0, 4.0), (3.0, 2.0, 6.0)])
def test_two_apps_that_flood_a_full_cluster_hold_it_by_their_weights(weight, noisy, other):
    rival = replace(FLOOD, name="rival", app="other", weight=weight)
    both = replace(EIGHT, functions=(FLOOD, rival), load=LoadModel("poisson", rate=40.0))
    held = held_over(both, 60, 120)
    assert held["noisy"] == pytest.approx(noisy, abs=0.3)
    assert held["other"] == pytest.approx(other, abs=0.3)


def test_a_flood_does_not_starve_an_app_that_asks_for_little():
    """Nine of ten requests are the flood's, which is more than the cluster can take; the other's are all served."""
    quiet = replace(FLOOD, name="quiet", app="quiet")
    both = replace(EIGHT, functions=(quiet, FLOOD), load=LoadModel("poisson", rate=20.0, popularity=3.17))
    result = Simulation(both, "ours", 1).run()
    assert set(result.apps) == {"noisy", "quiet"}
    assert result.apps["noisy"]["p50"] > 10.0
    assert result.apps["quiet"]["p95"] < 5.0


@given(
    nodes=st.integers(1, 12),
    gpus=st.integers(1, 4),
    count=st.integers(1, 20),
    rate=st.floats(0.1, 10.0),
    arrivals=st.sampled_from(["gamma", "bursts", "minutes"]),
    where=st.sampled_from(["everywhere", "spread", "remote"]),
    policy=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, derandomize=True)
def test_whatever_the_scenario_nobody_is_lost_and_the_controller_is_consistent(
    nodes, gpus, count, rate, arrivals, where, policy, seed
):
    node = replace(SMALL.nodes[0], count=nodes, gpus=gpus, jitter=0.2)
    load = LoadModel(arrivals, rate=rate, cv=3.0, popularity=1.0)
    functions = (replace(MODEL, count=count, gpus=1 + seed % 2 * (gpus > 1)),)
    simulation = Simulation(
        replace(SMALL, nodes=(node,), functions=functions, load=load, seconds=20.0, placement=where), policy, seed
    )
    result = simulation.run()
    assert result.requests == result.answered + result.refused + result.unfinished
    simulation.machine.validate()
    simulation.gateway.queue.validate()
    simulation.gateway.slots.validate()


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_every_preset_is_valid_and_survives_its_file(name, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(scenario.to_toml(presets.PRESETS[name]))
    assert scenario.read(path) == presets.PRESETS[name]


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 0.0},
        {"nodes": ()},
        {"functions": ()},
        {"load": LoadModel(rate=0.0)},
        {"load": LoadModel("trace")},
        {"nodes": (NodeModel(disk=0.0),)},
        {"functions": (replace(MODEL, name="no name"),)},
        {"functions": (replace(MODEL, per_output=-1.0),)},
    ],
)
def test_a_scenario_that_cannot_be_is_refused(change):
    with pytest.raises(BadRequest):
        Simulation(replace(SMALL, **change))


def test_a_file_with_a_wrong_field_says_where(tmp_path):
    path = tmp_path / "s.toml"
    whole = msgspec.to_builtins(SMALL)
    whole["load"]["arrivals"] = "never"
    with pytest.raises(BadRequest, match=r"load\.arrivals"):
        scenario.parse(whole)
    path.write_text("= 1")
    with pytest.raises(BadRequest, match="not TOML"):
        scenario.read(path)
    with pytest.raises(BadRequest, match="cannot read"):
        scenario.read(tmp_path / "none.toml")
    with pytest.raises(BadRequest, match="unknown"):
        Simulation(SMALL, "best")


def test_percentiles_are_nearest_rank():
    assert percentile([], 50) == 0.0
    assert percentile(list(range(1, 101)), 99) == 99
    assert summary([1.0, 3.0])["mean"] == 2.0


def test_processes_are_started_in_turn_where_a_machine_makes_so_many_at_once() -> None:
    host = Host(2)
    assert [host.seconds(0.0, 1.0) for _ in range(5)] == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert host.seconds(10.0, 1.0) == 1.0
    assert [Host(0).seconds(0.0, 1.0) for _ in range(3)] == [1.0, 1.0, 1.0]


def test_starts_take_what_was_measured_and_arrivals_are_those_given() -> None:
    node = replace(SMALL.nodes[0], count=2, containers=(0.25,), at_once=1, one_machine=True)
    functions = (replace(MODEL, count=2, checkpoint_gb=0.0, seconds=0.1),)
    scenario = replace(SMALL, nodes=(node,), functions=functions, seconds=10.0)
    arrivals = [Request(1.0, 0, 1, 1), Request(1.0, 1, 1, 1)]
    simulation = Simulation(scenario, "ours", 3, arrivals)
    assert simulation.run().requests == 2
    assert sorted(simulation.samples.startup) == pytest.approx([0.25, 0.5], abs=0.01)
