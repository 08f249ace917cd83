"""Values for the constructor parameters of a class: one rule for the SDK, the gateway and the container.

All of them must agree on the complete, typed values, because these name the target: equal values, however
written (default left out, 1 for 1.0), must reach the same instances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sllm_faas.errors import BadRequest
from sllm_faas.spec import ParameterSpec

Value = str | int | float | bool


def bind(specs: tuple[ParameterSpec, ...], given: Mapping[str, object]) -> dict[str, Value]:
    """All parameters with their values, defaults filled in. Raises BadRequest naming the parameter."""
    unknown = sorted(given.keys() - {spec.name for spec in specs})
    if unknown:
        allowed = ", ".join(spec.name for spec in specs) or "none"
        raise BadRequest(f"parameter {unknown[0]!r} is not known; allowed: {allowed}.", param=unknown[0])
    values: dict[str, Value] = {}
    for spec in specs:
        if spec.name in given:
            values[spec.name] = convert(spec, given[spec.name])
        elif spec.required or spec.default is None:
            raise BadRequest(f"parameter {spec.name!r} ({spec.type}) is missing.", param=spec.name)
        else:
            values[spec.name] = convert(spec, spec.default)
    return values


def convert(spec: ParameterSpec, value: object) -> Value:
    """`value` as the parameter's type; only an int is taken for a float. Raises BadRequest."""
    if spec.type == "str" and isinstance(value, str):
        return str(value)
    if spec.type == "bool" and isinstance(value, bool):
        return value
    if spec.type == "int" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return int(value)
    if spec.type == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 2**1023 else math.inf
        if math.isfinite(number):
            return number
    raise BadRequest(
        f"parameter {spec.name!r} is {value!r} ({type(value).__name__}); allowed: {spec.type}.", param=spec.name
    )
