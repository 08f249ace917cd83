"""A node whose memory for warmth layers is too small: starts go on without them, and the log says what would do."""

from __future__ import annotations

from typing import Any

import pytest
from sllm_invoker.containers.pool import Pool

from sllm_faas.spec import FunctionSpec, MethodSpec

from .conftest import Containers

SPEC = FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), libs=("numpy",))
LIBS = "libs:numpy"


@pytest.fixture
def options() -> dict[str, Any]:
    return {"policy": Pool(budget_mb=1.0)}


async def test_a_layer_that_does_not_fit_is_made_once_and_the_log_says_what_would_hold_it(
    containers: Containers, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = containers.runtime
    one = await containers.start("one", spec=SPEC)
    assert [made.warmth for made in one.handle.made] == ["base", "libs"] and LIBS in runtime.pool
    needed = runtime.pool.memory_mb()
    runtime.tidy()
    assert LIBS not in runtime.pool
    runtime.pool._usage[LIBS].last -= 60.0
    two = await containers.start("two", spec=SPEC)
    runtime.tidy()
    assert (two.handle.warmth, two.handle.made) == ("base", ())
    told: list[dict[str, Any]] = [vars(each)["sllm"] for each in caplog.records if each.msg == "layer_not_kept"]
    assert [(each["layer"], each["setting"], each["budget_mb"]) for each in told] == [(LIBS, "layers_mb", 1)]
    assert needed <= told[0]["needs_mb"] < needed + 1 and f"at least {told[0]['needs_mb']} MiB" in told[0]["hint"]
