"""Options of functions: what a user may write, checked where it is written.

`FunctionOptions`, `ClsOptions` and `LlmOptions` list what `@app.function`, `@app.cls` and `app.llm` take. Every
mistake is a `BadSpec` at decoration time that names the option, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypedDict

from sllm_faas.errors import BadSpec
from sllm_faas.spec import AdapterSpec, CheckpointSpec, RetryPolicy, Scaling, Timeouts

if TYPE_CHECKING:
    from pathlib import Path

Checkpoint = CheckpointSpec
Retries = RetryPolicy


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret by name. Its value is set where the server runs and becomes the environment variable NAME in the
    container; it is never part of the source or of a deployment."""

    name: str

    @classmethod
    def from_name(cls, name: str) -> Secret:
        return cls(name)


class _CommonOptions(TypedDict, total=False):
    timeout: float | Timeouts
    """A number is the execution limit; `Timeouts` sets all five."""
    retries: int | Retries
    """Retries of calls that failed before their first output."""
    secrets: Sequence[str | Secret]
    memory: int
    """Private memory an instance is expected to need, MiB."""
    gpu: int | str | None
    """1 or "any": an instance holds a GPU of its node for itself."""
    min_containers: int
    max_containers: int
    buffer_containers: int
    scaledown_window: float
    max_queue: int
    cancel_grace: float


class ClsOptions(_CommonOptions, total=False):
    """Keyword options of `@app.cls`. Durations are in seconds."""

    name: str
    """Public name; default: the Python name."""
    checkpoint: str | Path | CheckpointSpec


class FunctionOptions(ClsOptions, total=False):
    """Keyword options of `@app.function`."""

    resumable: bool
    """A generator that goes on elsewhere from `sllm.resumed()` when its instance is lost."""


class LlmOptions(_CommonOptions, total=False):
    """Keyword options of `app.llm`."""

    concurrency: int
    """Requests one instance works on at once."""
    target_tokens: int
    """Tokens to an instance, running and waiting, before another is wanted; 0: only requests count."""
    adapters: Mapping[str, str | Path | CheckpointSpec]
    """LoRA adapters of the checkpoint by name, each served as the model `function:name`."""


_NUMBERS: dict[str, type] = {
    "memory": int,
    "min_containers": int,
    "max_containers": int,
    "buffer_containers": int,
    "scaledown_window": float,
    "max_queue": int,
    "cancel_grace": float,
    "concurrency": int,
    "target_tokens": int,
}


@contextmanager
def as_bad_spec(prefix: str = "") -> Iterator[None]:
    """Turns the ValueError of a spec type into BadSpec."""
    try:
        yield
    except ValueError as error:
        raise BadSpec(f"{prefix}{error}.") from None


def did_you_mean(name: str, known: Sequence[str]) -> str:
    import difflib  # on failure only

    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def check_known(what: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise BadSpec(f"{what} has no option {name!r}; allowed: {', '.join(known)}.", hint=hint)


def number(name: str, value: object, kind: type) -> Any:
    """`value` if it is an int (or, where `kind` is float, a float) and no bool. Raises BadSpec."""
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise BadSpec(f"{name} is {value!r}; allowed: {'an integer' if kind is int else 'a number of seconds'}.")
    return value


def as_timeouts(value: object) -> Timeouts:
    """A number is the execution limit; the other four keep their defaults."""
    if isinstance(value, Timeouts):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSpec(f"timeout is {value!r}; allowed: seconds, or sllm.Timeouts(execution=…, idle=…).")
    with as_bad_spec():
        return Timeouts(execution=float(value))


def as_gpus(value: object) -> int:
    """How many GPUs `gpu=value` asks for: none or one; which one of a node's is not for the function to say."""
    known = {None: 0, 0: 0, 1: 1, "any": 1, "any:1": 1}
    if isinstance(value, bool) or not isinstance(value, int | str | None) or value not in known:
        raise BadSpec(
            f'gpu is {value!r}; allowed: None, 0, 1 or "any".',
            hint="An instance has one GPU at most, and nodes are not told apart by the kind of theirs yet.",
        )
    return known[value]


def as_retries(value: object) -> RetryPolicy:
    if isinstance(value, Retries):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSpec(f"retries is {value!r}; allowed: a number of retries, or sllm.Retries(max_retries=…).")
    with as_bad_spec():
        return Retries(max_retries=value)


def as_checkpoint(value: object) -> CheckpointSpec:
    """A `Path` is a directory of the server's machine; text is a Hugging Face repo id or an absolute path."""
    if isinstance(value, Checkpoint):
        return value
    if isinstance(value, PathLike):
        from pathlib import Path

        return Checkpoint(str(Path(fspath(value)).expanduser().resolve()))
    if not isinstance(value, str):
        raise BadSpec(f"checkpoint is {value!r}; allowed: a path, a Hugging Face repo id, or sllm.Checkpoint(…).")
    if value.startswith((".", "~")):
        raise BadSpec(
            f"checkpoint {value!r} is a relative path, and it is not said relative to what; "
            "allowed: an absolute path or a Hugging Face repo id.",
            hint="Write Path(__file__).parent / 'model'.",
        )
    with as_bad_spec():
        return Checkpoint(value)


def _as_secrets(value: object) -> tuple[str, ...]:
    if isinstance(value, str | Secret) or not isinstance(value, Sequence):
        raise BadSpec(f"secrets is {value!r}; allowed: a list of names or sllm.Secret.from_name(…).")
    names = [item.name if isinstance(item, Secret) else item for item in value]
    for name in names:
        if not isinstance(name, str):
            raise BadSpec(f"secrets holds {name!r}; allowed: names or sllm.Secret.from_name(…).")
    return tuple(dict.fromkeys(names))


def spec_fields(what: str, options: Mapping[str, Any], known: type) -> dict[str, Any]:
    """The keyword arguments of `FunctionSpec` that the options (without `name`) stand for; `known` is the
    TypedDict they must be of. Raises BadSpec."""
    check_known(what, options, list(known.__annotations__))
    for name, kind in _NUMBERS.items():
        if name in options:
            number(name, options[name], kind)
    fields: dict[str, Any] = {name: options[name] for name in ("max_queue", "cancel_grace") if name in options}
    scaling = {name: options[name] for name in Scaling.__dataclass_fields__ if name in options}
    with as_bad_spec(f"{what}: "):
        fields["scaling"] = Scaling(**scaling)
    if "memory" in options:
        fields["memory_mb"] = options["memory"]
    if "concurrency" in options:
        fields["concurrency"] = options["concurrency"]
    if "gpu" in options:
        fields["gpus"] = as_gpus(options["gpu"])
    if "timeout" in options:
        fields["timeouts"] = as_timeouts(options["timeout"])
    if "retries" in options:
        fields["retries"] = as_retries(options["retries"])
    if "secrets" in options:
        fields["secrets"] = _as_secrets(options["secrets"])
    if "checkpoint" in options:
        fields["checkpoint"] = as_checkpoint(options["checkpoint"])
    if "adapters" in options:
        if not isinstance(options["adapters"], Mapping):
            raise BadSpec(f"adapters is {options['adapters']!r}; allowed: a dict of names and checkpoints.")
        with as_bad_spec(f"{what}: "):
            found = options["adapters"].items()
            fields["adapters"] = tuple(AdapterSpec(name, as_checkpoint(value)) for name, value in found)
    return fields
