"""The waiting line: order, bounds, shares, and constant-time removal."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch.queue import WaitQueue
from sllm_faas.errors import QueueFull
from sllm_faas.spec import Target


@dataclass(eq=False)
class Item:
    target: Target
    name: int = 0
    tokens: int = 3


A, B, C = (Target(app, "f", 1) for app in ("a", "b", "c"))


def test_a_line_is_first_in_first_out_per_target() -> None:
    queue: WaitQueue[Item] = WaitQueue()
    items = [Item(target) for target in (A, B, A, B)]
    for item in items:
        assert queue.push(item, max_queue=9) is None
    assert [queue.pop(A), queue.pop(A), queue.pop(A)] == [items[0], items[2], None]
    assert queue.oldest(B) is items[1]
    assert queue.waiting(B) == len(queue) == 2


def test_what_is_put_to_the_front_comes_first_and_ignores_the_bounds() -> None:
    queue: WaitQueue[Item] = WaitQueue(limit=1)
    first, refused = Item(A), Item(A)
    queue.push(first, max_queue=1)
    queue.push_front(refused)
    assert queue.pop(A) is refused
    assert queue.pop(A) is first


def test_a_full_line_refuses_with_the_bound_and_when_to_try_again() -> None:
    queue: WaitQueue[Item] = WaitQueue()
    queue.push(Item(A), max_queue=1)
    with pytest.raises(QueueFull, match="1 invocations of a/f wait already; allowed: 1") as caught:
        queue.push(Item(A), max_queue=1)
    assert caught.value.retry_after == 1.0
    with pytest.raises(QueueFull):
        WaitQueue[Item]().push(Item(A), max_queue=0)


def test_when_all_is_full_the_app_above_its_share_loses_its_youngest() -> None:
    queue: WaitQueue[Item] = WaitQueue(limit=4)
    flood = [Item(A) for _ in range(4)]
    for item in flood:
        queue.push(item, max_queue=99)
    with pytest.raises(QueueFull, match="4 invocations wait already"):
        queue.push(Item(A), max_queue=99)
    assert queue.push(Item(B), max_queue=99) is flood[3]
    assert queue.push(Item(B), max_queue=99) is flood[2]
    with pytest.raises(QueueFull):
        queue.push(Item(B), max_queue=99)
    queue.validate()


def test_who_was_put_to_the_front_is_not_the_youngest() -> None:
    queue: WaitQueue[Item] = WaitQueue(limit=2)
    young, old = Item(A), Item(A)
    queue.push(young, max_queue=9)
    queue.push_front(old)
    assert queue.push(Item(B), max_queue=9) is young


def test_weights_decide_the_shares() -> None:
    queue: WaitQueue[Item] = WaitQueue(limit=4)
    for _ in range(4):
        queue.push(Item(A), max_queue=99, weight=3.0)
    assert queue.push(Item(B), max_queue=99, weight=1.0) is not None
    with pytest.raises(QueueFull):  # 2 of 1 would be more than 3 of 3
        queue.push(Item(B), max_queue=99, weight=1.0)


def test_a_whole_line_can_be_taken_and_put_back_in_order() -> None:
    queue: WaitQueue[Item] = WaitQueue()
    items = [Item(A, number) for number in range(3)]
    for item in items:
        queue.push(item, max_queue=9)
    last = Item(B)
    queue.push(last, max_queue=9)
    taken = queue.take_all(A)
    assert taken == items
    for item in taken:
        item.target = B
    queue.put_back(taken)
    assert list(queue.items(B)) == [*items, last]
    queue.validate()


def test_removing_what_does_not_wait_is_an_error() -> None:
    with pytest.raises(KeyError):
        WaitQueue[Item]().remove(Item(A))


VERBS = st.sampled_from(["push", "front", "pop", "remove", "take"])


@given(st.lists(st.tuples(VERBS, st.sampled_from([A, B, C]), st.integers(0, 5)), max_size=80), st.integers(1, 6))
def test_the_line_agrees_with_plain_lists(steps: list[tuple[str, Target, int]], limit: int) -> None:
    queue: WaitQueue[Item] = WaitQueue(limit)
    model: dict[Target, list[Item]] = {A: [], B: [], C: []}
    for verb, target, number in steps:
        if verb == "push":
            item = Item(target)
            size = sum(map(len, model.values()))
            try:
                loser = queue.push(item, max_queue=4)
            except QueueFull:
                assert len(model[target]) >= 4 or size >= limit
            else:
                assert (loser is None) == (size < limit)
                if loser is not None:
                    assert loser is model[loser.target][-1], "the youngest"
                    assert len(model[loser.target]) > len(model[target])
                    model[loser.target].remove(loser)
                model[target].append(item)
        elif verb == "front":
            item = Item(target)
            queue.push_front(item)
            model[target].insert(0, item)
        elif verb == "pop":
            expected = model[target].pop(0) if model[target] else None
            assert queue.pop(target) is expected
        elif verb == "remove" and len(model[target]) > number:
            queue.remove(model[target].pop(number))
        elif verb == "take":
            assert queue.take_all(target) == model[target]
            model[target] = []
        queue.validate()
        assert {each: list(queue.items(each)) for each in model} == model
