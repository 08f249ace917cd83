"""What a runner is told: JSON both ways, checked, and silent about secrets."""

from __future__ import annotations

from typing import Any

import pytest
from sllm_invoker.runner.config import InstanceConfig, dumps, loads

from sllm_faas.errors import BadSpec
from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec, Target

FUNCTION = FunctionSpec("f", "function", "app", "f", methods=(MethodSpec("f"),))
LLM = FunctionSpec("m", "llm", checkpoint=CheckpointSpec("s"))
GOOD: dict[str, Any] = {
    "instance": "i",
    "target": Target("a", "f", 1),
    "specs": (FUNCTION,),
    "source_dir": "/src",
    "env": {"KEY": "hidden"},
}


def test_it_survives_json() -> None:
    config = InstanceConfig(**GOOD)
    assert loads(dumps(config)) == config
    assert config.spec is FUNCTION


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instance": ""}, "instance"),
        ({"specs": ()}, "0 functions to serve"),
        ({"specs": (FUNCTION, FUNCTION)}, "2 functions to serve"),
        ({"specs": (LLM,)}, "object_dir"),
        ({"source_dir": ""}, "source_dir"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InstanceConfig(**{**GOOD, **changes})


@pytest.mark.parametrize("data", [b"", b"[]", b'{"instance": "i"}', b'{"env": {"KEY": "hidden"', b"\xff"])
def test_damaged_json_is_a_bad_spec(data: bytes) -> None:
    with pytest.raises(BadSpec, match="not an instance config") as caught:
        loads(data)
    assert "hidden" not in str(caught.value)


def test_secrets_do_not_show_in_its_repr() -> None:
    assert "hidden" not in repr(InstanceConfig(**GOOD))
