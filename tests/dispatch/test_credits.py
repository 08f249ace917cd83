"""The credit book: slots are leases, never oversubscribed, never lost, and whoever wants one gets its turn."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sllm_faas.dispatch.credits import CreditBook, Granted
from sllm_faas.errors import IllegalTransition

A, B, C = b"a", b"b", b"c"


def limits(grants: list[Granted]) -> dict[bytes, int]:
    return {grant.gateway: grant.limit for grant in grants}


def ready(capacity: int, *gateways: bytes) -> CreditBook:
    """A book with one instance, number 1, its first grants acknowledged."""
    book = CreditBook()
    for gateway in gateways:
        book.connect(gateway)
    book.open(1, capacity)
    acknowledge(book, book.settle())
    return book


def acknowledge(book: CreditBook, grants: list[Granted], wants: dict[bytes, int] | None = None) -> None:
    for grant in grants:
        book.want(grant.instance, grant.gateway, grant.seq, (wants or {}).get(grant.gateway, 0))


def test_ready_splits_evenly_with_the_remainder_to_the_first() -> None:
    book = CreditBook()
    for gateway in (A, B, C):
        book.connect(gateway)
    book.open(1, 8)
    assert limits(book.settle()) == {A: 3, B: 3, C: 2}


def test_an_instance_that_is_not_ready_is_announced_with_limit_zero() -> None:
    book = CreditBook()
    book.connect(A)
    book.open(1, 0)
    assert limits(book.settle()) == {A: 0}
    book.open(1, 4)
    assert limits(book.settle()) == {A: 4}


def test_a_gateway_that_joins_later_is_told_of_every_instance() -> None:
    book = ready(2, A)
    book.connect(B)
    assert limits(book.settle()) == {B: 0}


def test_a_recalled_slot_is_granted_again_only_after_the_acknowledgement() -> None:
    book = ready(2, A, B)
    book.want(1, B, book.ordinal(), 1)
    recall = book.settle()
    assert limits(recall) == {A: 0}
    assert book.settle() == []
    acknowledge(book, recall)
    assert limits(book.settle()) == {B: 2}


def test_what_was_sent_under_the_older_limit_keeps_its_slot() -> None:
    book = ready(1, A)
    book.connect(B)
    acknowledge(book, book.settle(), {B: 1})
    recall = book.settle()
    assert limits(recall) == {A: 0}
    assert book.take(1, A)
    acknowledge(book, recall)
    assert book.settle() == []
    book.give(1, A)
    assert limits(book.settle()) == {B: 1}


def test_no_slot_means_no_slot() -> None:
    book = ready(1, A)
    assert book.take(1, A)
    assert not book.take(1, A)
    assert not book.take(2, A)
    assert not book.take(1, B)


def test_a_gateway_alone_keeps_all_its_slots_and_no_frame_is_sent_per_invocation() -> None:
    book = ready(3, A)
    for _ in range(5):
        assert book.take(1, A)
        book.give(1, A)
        assert book.settle() == []


def test_a_lost_gateways_slots_return_when_its_orphans_end() -> None:
    book = ready(2, A, B)
    assert book.take(1, A)
    book.disconnect(A)
    book.want(1, B, book.ordinal(), 1)
    assert book.settle() == []
    book.give(1, None)
    assert limits(book.settle()) == {B: 2}


def test_an_adopted_orphan_counts_for_its_new_gateway() -> None:
    book = ready(2, A, B)
    assert book.take(1, A)
    book.disconnect(A)
    book.adopt(1, B)
    assert book.running(1) == 1
    book.give(1, B)
    assert book.running(1) == 0
    book.validate()


def test_a_slot_cannot_be_given_back_twice() -> None:
    book = ready(1, A)
    assert book.take(1, A)
    book.give(1, A)
    with pytest.raises(IllegalTransition):
        book.give(1, A)


def test_a_closed_instance_grants_nothing_and_lets_the_running_end() -> None:
    book = ready(2, A)
    assert book.take(1, A)
    book.close(1)
    assert limits(book.settle()) == {A: 0}
    assert not book.take(1, A)
    book.give(1, A)
    assert book.running(1) == 0


def test_two_gateways_that_always_want_one_slot_take_turns() -> None:
    book = ready(1, A)
    book.connect(B)
    acknowledge(book, book.settle(), {B: 1})
    served: list[bytes] = []
    holder: bytes | None = None
    for _ in range(12):
        for gateway in (A, B):
            if holder is None and book.take(1, gateway):
                holder = gateway
                served.append(gateway)
        for grant in book.settle():
            book.want(1, grant.gateway, grant.seq, 1 if grant.limit == 0 else 0)
        if holder is not None:
            book.give(1, holder)
            holder = None
        for grant in book.settle():
            book.want(1, grant.gateway, grant.seq, 1 if grant.limit == 0 else 0)
    assert served.count(A) >= 4 and served.count(B) >= 4


def test_the_table_can_be_printed() -> None:
    book = ready(2, A)
    assert "(orphans)" in str(book) and " a " in str(book)


class Gateways(RuleBasedStateMachine):
    """A book and model gateways joined by FIFO links that deliver when Hypothesis says so."""

    names = (A, B, C)

    @initialize(capacity=st.integers(1, 5))
    def begin(self, capacity: int) -> None:
        self.book = CreditBook()
        self.capacity = capacity
        self.down: dict[bytes, deque[Granted]] = {}
        self.up: dict[bytes, deque[tuple[str, int, int]]] = {}
        self.limit: dict[bytes, int] = {}
        self.seq: dict[bytes, int] = {}
        self.flying: dict[bytes, int] = {}
        self.waiting: dict[bytes, int] = {}
        self.asked: dict[bytes, int] = {}
        self.running: dict[bytes | None, int] = {None: 0}
        self.book.open(1, capacity)
        self.settle()

    def settle(self) -> None:
        for grant in self.book.settle():
            self.down[grant.gateway].append(grant)

    @rule(name=st.sampled_from(names))
    def connect(self, name: bytes) -> None:
        if name in self.down:
            self.lose(name)
        self.down[name], self.up[name] = deque(), deque()
        self.limit[name] = self.seq[name] = self.flying[name] = self.waiting[name] = self.asked[name] = 0
        self.running[name] = 0
        self.book.connect(name)
        self.settle()

    @rule(name=st.sampled_from(names))
    def lose(self, name: bytes) -> None:
        if name not in self.down:
            return
        self.running[None] += self.running.pop(name)
        for table in (self.down, self.up, self.limit, self.seq, self.flying, self.waiting, self.asked):
            del table[name]
        self.book.disconnect(name)
        self.settle()

    @rule(name=st.sampled_from(names), count=st.integers(1, 4))
    def arrive(self, name: bytes, count: int) -> None:
        if name in self.down:
            self.waiting[name] += count
            self.dispatch(name)

    def dispatch(self, name: bytes) -> None:
        while self.waiting[name] and self.flying[name] < self.limit[name]:
            self.waiting[name] -= 1
            self.flying[name] += 1
            self.up[name].append(("invoke", 0, 0))
        self.ask(name, force=False)

    def ask(self, name: bytes, force: bool) -> None:
        if force or self.asked[name] != self.waiting[name]:
            self.asked[name] = self.waiting[name]
            self.up[name].append(("want", self.seq[name], self.waiting[name]))

    @rule(name=st.sampled_from(names))
    def grant_arrives(self, name: bytes) -> None:
        if self.down.get(name):
            grant = self.down[name].popleft()
            self.limit[name], self.seq[name] = grant.limit, grant.seq
            self.dispatch(name)
            self.ask(name, force=True)

    @rule(name=st.sampled_from(names))
    def frame_arrives(self, name: bytes) -> None:
        if self.up.get(name):
            kind, seq, slots = self.up[name].popleft()
            if kind == "invoke":
                assert self.book.take(1, name), "an invocation within the gateway's limit was refused"
                self.running[name] += 1
            else:
                self.book.want(1, name, seq, slots)
            self.settle()

    @rule(name=st.sampled_from((*names, None)))
    def end(self, name: bytes | None) -> None:
        if self.running.get(name):
            self.running[name] -= 1
            if name is not None:
                self.flying[name] -= 1
            self.book.give(1, name)
            self.settle()
            if name is not None:
                self.dispatch(name)

    @precondition(lambda self: self.running[None] > 0)
    @rule(name=st.sampled_from(names))
    def adopt(self, name: bytes) -> None:
        if name in self.down:
            self.running[None] -= 1
            self.running[name] += 1
            self.flying[name] += 1
            self.book.adopt(1, name)
            self.settle()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "book"):
            return
        self.book.validate()
        assert self.book.running(1) == sum(self.running.values()) <= self.capacity
        on_wire = sum(1 for queue in self.up.values() for kind, _, _ in queue if kind == "invoke")
        assert on_wire + sum(self.running.values()) <= self.capacity

    def teardown(self) -> None:
        """Left alone, everything that waits is served and the links fall silent."""
        if not hasattr(self, "book"):
            return
        for _ in range(2000):
            busy = [name for name in self.down if self.down[name] or self.up[name]]
            if busy:
                for name in busy:
                    self.grant_arrives(name)
                    self.frame_arrives(name)
                continue
            active = [name for name, count in self.running.items() if count]
            if not active:
                break
            self.end(active[0])
        assert not any(self.waiting.values()), f"still waiting: {self.waiting}\n{self.book}"
        assert not any(self.down.values()) and not any(self.up.values())


TestGateways = Gateways.TestCase
TestGateways.settings = settings(max_examples=120, stateful_step_count=50, derandomize=True)
