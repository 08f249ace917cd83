"""What an invocation's time went into: `Server-Timing`, and the record that `describe` shows. Pure.

Phases, in seconds since submission:

    queue          until it was dispatched             place, then the instance's own spans, when that is what it
    first_output   until its first output              waited for (cold): fork, attach, enter …
    run            from dispatch to the end            and, inside it, the container's own spans
    migration      from the commit of a move, or the   its detail says from where to where, and how it was lost
    or resume      loss of its instance, to the next
                   output

No payload is looked at. A record is JSON-able throughout.
"""

from __future__ import annotations

import re
from typing import Any

from sllm_gateway.exchange import invocation_text
from sllm_gateway.handle import Handle

Phase = tuple[str, float, float, str]
"""name, start, seconds, detail."""

_TOKEN = re.compile(r"[^A-Za-z0-9_-]+")


def is_cold(handle: Handle) -> bool:
    """Whether its instance was started after it was submitted."""
    slot = handle.slot
    return slot is not None and slot.timeline.began >= handle.began > 0 and bool(handle.inv.dispatched)


def phases(handle: Handle) -> list[Phase]:
    inv, slot = handle.inv, handle.slot
    out: list[Phase] = []
    if not inv.dispatched:
        end = inv.ended or inv.submitted
        return [("queue", 0.0, end - inv.submitted, "")]
    queued = max(0.0, inv.dispatched - inv.submitted)
    out.append(("queue", 0.0, queued, ""))
    if slot is not None and is_cold(handle):
        offset = slot.timeline.began - handle.began
        out.append(("place", 0.0, offset, slot.why))
        out += [(span.name, offset + span.start, span.seconds, span.detail) for span in slot.timeline.spans]
    if inv.first_output:
        out.append(("first_output", queued, inv.first_output - inv.dispatched, ""))
    if inv.ended:
        out.append(("run", queued, inv.ended - inv.dispatched, ""))
    for handover in handle.handovers:
        seconds = max(0.0, (handover.ended or inv.ended or handover.began) - handover.began)
        out.append((handover.kind, handover.began - inv.submitted, seconds, handover.detail))
    if handle.ended is not None:
        out += [(name, queued + start, seconds, "") for name, start, seconds in handle.ended.spans]
    return out


def server_timing(handle: Handle) -> bytes:
    """The header's value, milliseconds."""
    inv = handle.inv
    if not is_cold(handle) and not inv.first_output:
        if not inv.ended or not inv.dispatched:
            return b"queue;dur=%.2f" % ((inv.dispatched - inv.submitted) * 1e3 if inv.dispatched else 0.0)
        queued, run = inv.dispatched - inv.submitted, inv.ended - inv.dispatched
        return b"queue;dur=%.2f, run;dur=%.2f" % (queued * 1e3, run * 1e3)
    parts = [f"{_TOKEN.sub('_', name) or 'span'};dur={seconds * 1e3:.2f}" for name, _, seconds, _ in phases(handle)]
    return ", ".join(parts[:32]).encode("latin-1", "replace")


def record(handle: Handle, gateway: str) -> dict[str, Any]:
    """One invocation for people: where it stands, where its time went, never what it said."""
    inv, slot, ended = handle.inv, handle.slot, handle.ended
    error = ended.error if ended is not None else None
    state = inv.state.value if ended is None else ("failed" if error is not None else "done")
    return {
        "invocation": invocation_text(inv.id),
        "app": inv.target.app,
        "function": inv.target.function,
        "version": inv.target.version,
        "target": str(inv.target),
        "method": inv.method,
        "gateway": gateway,
        "state": state,
        "error": None if error is None else {"code": error.code, "message": error.message, "hint": error.hint},
        "began": handle.began,
        "seconds": (inv.ended - inv.submitted) if inv.ended else None,
        "instance": slot.instance if slot is not None else None,
        "node": slot.node if slot is not None else None,
        "why": slot.why if slot is not None else "",
        "cold": is_cold(handle),
        "fence": inv.fence,
        "attempts": inv.attempt + bool(inv.dispatched),
        "resumes": inv.resumes,
        "outputs": inv.wanted,
        "usage": dict(ended.usage) if ended is not None else {},
        "timeline": [
            {"name": name, "start": round(start, 6), "seconds": round(seconds, 6), "detail": detail}
            for name, start, seconds, detail in phases(handle)
        ],
    }
