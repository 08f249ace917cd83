"""The gateway's part in a move: whether MOVED is the commit. Pure. The protocol is in `sllm_faas.dispatch.moves`."""

from __future__ import annotations

from sllm_faas.dispatch.invocation import TABLE as INVOCATIONS
from sllm_faas.dispatch.invocation import Event, Invocation
from sllm_faas.dispatch.slots import Instance
from sllm_faas.wire.header import Header
from sllm_faas.wire.messages import Moved


def objection(
    inv: Invocation, source: Instance | None, header: Header, moved: Moved, destination: Instance | None
) -> str:
    """Why an invocation stays at `source`, though MOVED came under its fence; empty when it moves.

    `destination` is the instance that this gateway knows under the number which MOVED names."""
    if Event.MOVE not in INVOCATIONS[inv.state]:
        return "not_wanted"
    if header.seq != inv.wanted:
        return "outputs_missing"
    if destination is None or destination.instance != moved.instance:
        return "unknown_destination"
    if destination is source:
        return "already_there"
    if destination.target != inv.target:
        return "other_version"
    if destination.state in ("stopped", "failed"):
        return "destination_ended"
    return ""
