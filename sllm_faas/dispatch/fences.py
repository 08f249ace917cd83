"""Whether a frame about an invocation may be believed. Pure.

Frames carry the fence they speak under and, for outputs, ordinals. Against an invocation's own fence and the
ordinal it wants next:

    frame                                verdict
    older fence                          STALE       an earlier owner speaks: drop, count
    newer fence                          FORGED      nobody but the gateway raises fences: drop, count
    OUTPUT wholly before `wanted`        DUPLICATE   a replay: drop, count
    OUTPUT partly before `wanted`        ACCEPT      the first `skip` items are dropped
    OUTPUT at `wanted`                   ACCEPT
    OUTPUT or DONE beyond `wanted`       GAP         something was lost: the worker is treated as lost
    OUTPUT beyond the credit given       OVERRUN     its sender does not keep to flow control: as lost
    FAILED, CANCELLED, REFUSED           ACCEPT      they end or move it, whatever came before
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sllm_faas.wire.header import NO_LIMIT, Header, Type


class Verdict(Enum):
    ACCEPT = "accept"
    STALE = "stale"
    FORGED = "forged"
    DUPLICATE = "duplicate"
    GAP = "gap"
    OVERRUN = "overrun"


class Judgement(NamedTuple):
    verdict: Verdict
    skip: int = 0


_ACCEPT = Judgement(Verdict.ACCEPT)


def judge(header: Header, *, fence: int, wanted: int, credit: int = NO_LIMIT) -> Judgement:
    """The verdict on a frame for an invocation at `fence` that wants output `wanted` next, `credit` at most."""
    if header.fence != fence:
        return Judgement(Verdict.STALE if header.fence < fence else Verdict.FORGED)
    if header.type is Type.OUTPUT:
        if header.seq > wanted:
            return Judgement(Verdict.GAP)
        end = header.seq + header.items
        if end <= wanted:
            return Judgement(Verdict.DUPLICATE)
        if credit != NO_LIMIT and end > credit:
            return Judgement(Verdict.OVERRUN)
        return Judgement(Verdict.ACCEPT, wanted - header.seq) if header.seq < wanted else _ACCEPT
    if header.type is Type.DONE and header.seq > wanted:
        return Judgement(Verdict.GAP)
    return _ACCEPT
