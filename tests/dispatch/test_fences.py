"""Which frames about an invocation are believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch.fences import Verdict, judge
from sllm_faas.wire.header import NO_LIMIT, Header, Type

ID = b"i" * 16


@pytest.mark.parametrize(
    ("kind", "fence", "seq", "items", "verdict", "skip"),
    [
        (Type.OUTPUT, 2, 5, 1, Verdict.ACCEPT, 0),
        (Type.OUTPUT, 2, 3, 4, Verdict.ACCEPT, 2),
        (Type.OUTPUT, 2, 3, 2, Verdict.DUPLICATE, 0),
        (Type.OUTPUT, 2, 5, 0, Verdict.DUPLICATE, 0),
        (Type.OUTPUT, 2, 6, 1, Verdict.GAP, 0),
        (Type.OUTPUT, 2, 5, 6, Verdict.OVERRUN, 0),
        (Type.OUTPUT, 1, 5, 1, Verdict.STALE, 0),
        (Type.OUTPUT, 3, 5, 1, Verdict.FORGED, 0),
        (Type.DONE, 2, 5, 0, Verdict.ACCEPT, 0),
        (Type.DONE, 2, 6, 0, Verdict.GAP, 0),
        (Type.DONE, 1, 5, 0, Verdict.STALE, 0),
        (Type.FAILED, 2, 0, 0, Verdict.ACCEPT, 0),
        (Type.CANCELLED, 2, 9, 0, Verdict.ACCEPT, 0),
        (Type.REFUSED, 1, 0, 0, Verdict.STALE, 0),
    ],
)
def test_the_table(kind: Type, fence: int, seq: int, items: int, verdict: Verdict, skip: int) -> None:
    found = judge(Header(kind, ID, fence, seq=seq, items=items), fence=2, wanted=5, credit=10)
    assert found.verdict is verdict
    assert found.skip == skip


def test_without_a_credit_limit_nothing_overruns() -> None:
    header = Header(Type.OUTPUT, ID, 1, seq=0, items=60_000)
    assert judge(header, fence=1, wanted=0, credit=NO_LIMIT).verdict is Verdict.ACCEPT


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=50))
def test_whatever_is_replayed_the_accepted_items_are_each_ordinal_once(frames: list[tuple[int, int]]) -> None:
    wanted, seen = 0, []
    for seq, items in frames:
        verdict, skip = judge(Header(Type.OUTPUT, ID, 1, seq=seq, items=items), fence=1, wanted=wanted)
        if verdict is Verdict.ACCEPT:
            seen += range(seq + skip, seq + items)
            wanted = seq + items
    assert seen == list(range(len(seen)))
