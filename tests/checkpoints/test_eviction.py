"""What leaves memory first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sllm_invoker.checkpoints.eviction import CostAware, Lru, OnDisk, Policy, choose, leaving, shortage


def test_lru_offers_the_longest_unused_first():
    policy = Lru()
    for digest in "abcb":
        policy.used(digest, 1, 1.0)
    assert policy.order("abc") == ["a", "c", "b"]


def test_the_cost_aware_policy_keeps_what_is_used_often():
    policy = CostAware()
    for digest in "aaab":
        policy.used(digest, 100, 1.0)
    assert policy.order("ab") == ["b", "a"]


def test_the_cost_aware_policy_keeps_what_is_slow_to_bring_back():
    """Of two used alike, the one from a slow source stays; per byte, because a byte is what is scarce."""
    policy = CostAware()
    policy.used("remote", 100, 9.0)
    policy.used("disk", 100, 1.0)
    policy.used("large", 1000, 1.0)
    assert policy.order(["remote", "disk", "large"]) == ["large", "disk", "remote"]


def test_what_was_popular_once_does_not_stay_for_ever():
    policy = CostAware()
    for _ in range(50):
        policy.used("old", 1, 1.0)
    evictions = 0
    while policy.order(["old", "new"])[0] == "new":
        policy.used("new", 1, 1.0)
        victim = f"once {evictions}"
        policy.used(victim, 1, 1.0)
        policy.evicted(victim)
        evictions += 1
        assert evictions < 200
    assert evictions > 1


def test_too_few_candidates_evict_nothing():
    assert choose(Lru(), {"a": 1, "b": 2}, 4) is None


def test_what_the_rest_makes_needless_stays():
    policy = Lru()
    for digest in "abc":
        policy.used(digest, 1, 1.0)
    assert choose(policy, {"a": 1, "b": 5, "c": 9}, 5) == ["b"]


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 9), max_size=8), st.integers(0, 30))
def test_a_choice_is_enough_and_none_of_it_needless(candidates, needed):
    chosen = choose(CostAware(), candidates, needed)
    if chosen is None:
        assert sum(candidates.values()) < needed
    else:
        got = sum(candidates[digest] for digest in chosen)
        assert got >= needed or needed <= 0
        assert all(got - candidates[digest] < needed for digest in chosen)


def reloaded(policy: Policy, seed: int, capacity: int) -> int:
    """Bytes read for 4,000 requests in Zipf order to 100 checkpoints of 1 to 30 GB, `capacity` GB in memory."""
    chance = random.Random(seed)
    sizes = {f"m{i}": chance.choice([1, 2, 3, 8, 14, 30]) for i in range(100)}
    names = list(sizes)
    weights = [1 / (rank + 1) for rank in range(100)]
    inside: dict[str, int] = {}
    read = 0
    for name in chance.choices(names, weights, k=4000):
        policy.used(name, sizes[name], sizes[name] / 2)
        if name in inside:
            continue
        read += sizes[name]
        victims = choose(policy, inside, sum(inside.values()) + sizes[name] - capacity)
        for victim in victims or ():
            del inside[victim]
            policy.evicted(victim)
        inside[name] = sizes[name]
    return read


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fewer_bytes_are_reloaded_than_by_lru(seed):
    ours, lru = reloaded(CostAware(), seed, 160), reloaded(Lru(), seed, 160)
    assert ours < 0.93 * lru


# -- disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "limit", "promised", "short"),
    [(100, 0, 0, -70), (10, 0, 0, 20), (100, 60, 0, 30), (100, 90, 0, 0), (100, 90, 5, 5), (0, 60, 0, 30)],
)
def test_a_disk_is_short_of_what_it_lacks_or_of_what_checkpoints_may_not_take(free, limit, promised, short):
    """It holds 20 and 30, and 40 more are to come, of which 10 are there."""
    assert shortage([20, 30], total=40, there=10, free=free, limit=limit, promised=promised) == short


def test_only_what_may_leave_does_and_nothing_when_that_is_too_little():
    objects = {"a": OnDisk(5), "b": OnDisk(5, "pinned"), "c": OnDisk(5)}
    policy = Lru()
    for digest in "cba":
        policy.used(digest, 5, 1.0)
    assert leaving(policy, objects, 5) == ["c"]
    assert leaving(policy, objects, 10) == ["c", "a"]
    assert leaving(policy, objects, 11) is None
    assert leaving(policy, objects, 0) == []


def test_a_policy_goes_on_from_its_state_as_it_would_have():
    one = CostAware()
    for digest in "abacb":
        one.used(digest, 10, 1.0)
    one.evicted("a")
    two = CostAware.resume(*one.state())
    for policy in (one, two):
        policy.used("d", 3, 1.0)
        policy.used("c", 10, 1.0)
    assert one.order("abcd") == two.order("abcd")
    assert one.state() == two.state()
