"""The index of nodes: always in step, and what it yields first is the best there is. The nodes of a machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.controller.index import NodeIndex, Row
from sllm_faas.controller.locality import Locality
from sllm_faas.controller.model import Node
from sllm_faas.controller.placement import Idle, cheapest
from sllm_faas.wire.messages import NodeInfo

rows = st.builds(
    Row, st.sampled_from([1e9, 2e9, 4e9]), st.integers(0, 4), st.integers(0, 5000), st.sampled_from([0.0, 1.0, 2.5])
)
changes = st.lists(st.tuples(st.integers(0, 15), st.one_of(st.none(), rows)), max_size=60)


@given(changes, st.integers(0, 4), st.integers(0, 5000))
def test_whatever_changed_it_yields_all_that_fit_the_fastest_first(history, gpus, mb):
    index, known = NodeIndex(), {}
    for number, row in history:
        name = f"n{number}"
        if row is None:
            index.drop(name)
            known.pop(name, None)
        else:
            index.put(name, row)
            known[name] = row
    index.validate()
    found = list(index.walk(gpus, mb))
    assert sorted(found) == sorted(n for n, row in known.items() if row.gpus >= gpus and row.mb >= mb)
    speeds = [known[name].bandwidth for name in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(index.fits(name, gpus, mb) for name in found)


def test_the_nodes_of_a_machine_are_told_in_one_order_whatever_order_they_came_in():
    names = [f"n{number:02d}" for number in range(20)]
    nodes = {name: Node(name, "up", 0.0, NodeInfo(name, "ipc:///x", host="m")) for name in reversed(names)}
    assert list(Locality(nodes).beside(nodes["n07"])) == names


def test_a_walk_ends_after_its_steps():
    index = NodeIndex()
    for number in range(50):
        index.put(f"n{number:02d}", Row(1e9, 1, 100, 0.0))
    assert len(list(index.walk(1, 100, steps=10))) == 10
    assert list(index.walk(1, 100, {"n30"}, steps=20)) == []


parts = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 2), st.floats(0, 9)).map(
        lambda values: Idle("", values[0], 0.0, values[1], values[2])
    ),
    max_size=7,
)


@given(parts, st.integers(0, 120), st.integers(0, 4))
def test_several_go_only_when_one_is_not_enough_and_then_the_cheapest_set(items, mb, gpus):
    items = [Idle(f"i{n}", i.memory_mb, i.seconds, i.gpus, i.reload) for n, i in enumerate(items)]
    if mb <= 0 and gpus <= 0:
        return
    chosen = cheapest(items, mb, gpus, lambda item: item.reload)

    def enough(group):
        return sum(i.memory_mb for i in group) >= mb and sum(i.gpus for i in group) >= gpus

    groups = [[i for n, i in enumerate(items) if bits >> n & 1] for bits in range(1, 1 << len(items))]
    possible = [group for group in groups if enough(group)]
    if not possible:
        assert chosen == ()
        return
    assert enough(chosen)
    singles = [group for group in possible if len(group) == 1]
    best = min(sum(i.reload for i in group) for group in (singles or possible))
    assert sum(i.reload for i in chosen) <= best + 1e-9
