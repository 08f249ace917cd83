"""Parameter values of a class: complete, of their types, and equal when they mean the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.errors import BadRequest
from sllm_faas.parameters import bind
from sllm_faas.spec import ParameterSpec, canonical

SPECS = (
    ParameterSpec("name", "str"),
    ParameterSpec("size", "int", required=False, default=1),
    ParameterSpec("rate", "float", required=False, default=0.5),
    ParameterSpec("loud", "bool", required=False, default=False),
)


def test_defaults_are_filled_in_and_whole_numbers_are_taken_for_floats() -> None:
    values = bind(SPECS, {"name": "a", "rate": 2})
    assert values == {"name": "a", "size": 1, "rate": 2.0, "loud": False}
    assert canonical(values) == '{"loud":false,"name":"a","rate":2.0,"size":1}'


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "name"),
        ({"name": 3}, "name"),
        ({"name": "a", "size": "1"}, "size"),
        ({"name": "a", "size": 1.0}, "size"),
        ({"name": "a", "size": True}, "size"),
        ({"name": "a", "size": 2**63}, "size"),
        ({"name": "a", "rate": float("inf")}, "rate"),
        ({"name": "a", "rate": 10**400}, "rate"),
        ({"name": "a", "rate": False}, "rate"),
        ({"name": "a", "loud": 1}, "loud"),
        ({"name": None}, "name"),
        ({"name": "a", "colour": 1}, "colour"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=f"{named!r}") as caught:
        bind(SPECS, values)
    assert caught.value.param == named


values_of_any_type = st.none() | st.text() | st.integers() | st.floats() | st.booleans()


@given(st.dictionaries(st.sampled_from(["name", "size", "rate", "loud", "x"]), values_of_any_type))
def test_binding_is_refused_or_stable(values: dict[str, Any]) -> None:
    try:
        bound = bind(SPECS, values)
    except BadRequest:
        return
    assert bind(SPECS, bound) == bound
    assert list(bound) == [spec.name for spec in SPECS]
