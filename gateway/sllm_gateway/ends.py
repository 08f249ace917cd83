"""What invocations end with when it is the gateway that ends them: the errors, worded once. Pure."""

from __future__ import annotations

from sllm_faas.dispatch.invocation import Invocation
from sllm_faas.errors import Cancelled, DeadlineExceeded, ErrorInfo, NotFound, QueueFull, WorkerLost, to_info
from sllm_faas.spec import Phase, Target

_AGAIN = "It can be called again."


def cancelled() -> ErrorInfo:
    return to_info(Cancelled("The invocation was cancelled."))


def node_lost(node: str) -> ErrorInfo:
    return to_info(WorkerLost(f"The invoker {node} was lost while the invocation ran there.", hint=_AGAIN))


def stopped() -> ErrorInfo:
    return to_info(WorkerLost("The instance was stopped while the invocation ran.", hint=_AGAIN))


def refused(reason: str) -> ErrorInfo:
    return to_info(WorkerLost(f"The invoker refused it: {reason}.", hint=_AGAIN))


def version_gone(target: Target) -> ErrorInfo:
    return to_info(
        WorkerLost(
            f"The instance was lost and version {target.version} of {target.app}/{target.function}, which gave the "
            "answer so far, serves no more.",
            hint=_AGAIN,
        )
    )


def broken(why: str, wanted: int) -> ErrorInfo:
    return to_info(WorkerLost(f"The stream broke: {why} at output {wanted}.", hint=_AGAIN))


def overdue(inv: Invocation, phase: Phase) -> ErrorInfo:
    limit = getattr(inv.timeouts, phase)
    return to_info(
        DeadlineExceeded(
            f"The {phase} timeout of {inv.target.app}/{inv.target.function} passed ({limit:g} s).",
            phase=phase,
            hint="No instance became ready in time." if phase == "startup" else "",
        )
    )


def shed(app: str, limit: int) -> ErrorInfo:
    return to_info(
        QueueFull(
            f"The whole queue is full ({limit}) and app {app!r} has more than its share of it.",
            hint="The platform is overloaded; try again later.",
            retry_after=1.0,
        )
    )


def method_gone(target: Target, method: str) -> ErrorInfo:
    return to_info(
        NotFound(f"{target.app}/{target.function} has no method {method!r} any more, since version {target.version}.")
    )
