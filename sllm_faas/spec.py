"""Frozen value types that cross boundaries: what a user registers and what every part calls it.

Standard library only, because `import sllm` needs it. Every type validates itself on construction and raises
`ValueError` with what was wrong, the value and what is allowed; decoders (msgspec, the SDK) turn that into
`BadSpec` or `BadRequest` at their edge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FunctionKind = Literal["function", "class", "llm"]
Encoding = Literal["json", "msgpack"]
Phase = Literal["queue", "startup", "first_output", "idle", "execution"]
Warmth = Literal["cold", "base", "libs", "template", "warm"]
Tier = Literal["remote", "disk", "dram", "gpu"]

APP_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")

MAX_RANKS = 1024
"""Ranks that a checkpoint may be split for."""
MAX_PAYLOAD = 64 * 1024 * 1024
"""Bytes of one argument or result payload; HTTP bodies above it are a 413."""


def _check_name(pattern: re.Pattern[str], what: str, value: str, allowed: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{what} {value!r} is not a valid name; allowed: {allowed}")


def check_app_name(value: str) -> str:
    _check_name(APP_NAME, "app", value, "1-63 lower-case letters, digits and '-', not at either end")
    return value


def check_function_name(value: str) -> str:
    _check_name(FUNCTION_NAME, "function", value, "a letter or '_', then up to 62 letters, digits, '_' or '-'")
    return value


def check_tensor_parallel(value: int) -> None:
    """Ranks that a checkpoint is split for. Raises ValueError."""
    if type(value) is not int or not 1 <= value <= MAX_RANKS:
        raise ValueError(f"tensor_parallel is {value!r}; allowed: an integer, 1 to {MAX_RANKS}")


def _check_range(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{what} is {value!r}; allowed: {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Five limits in seconds, each with one meaning. None switches one off.

    queue: waiting for a slot while instances exist · startup: waiting for an instance to become ready ·
    first_output: from dispatch to the first output (or the result) · idle: between two outputs of a stream ·
    execution: from dispatch to the end.
    """

    queue: float | None = 60.0
    startup: float | None = 300.0
    first_output: float | None = None
    idle: float | None = 120.0
    execution: float | None = 300.0

    def __post_init__(self) -> None:
        for name in ("queue", "startup", "first_output", "idle", "execution"):
            value = getattr(self, name)
            if value is not None:
                _check_range(f"timeout {name} (seconds)", value, 0.001, 7 * 86400.0)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many instances. `scaledown_window` is the seconds an idle instance stays beyond `min_containers`.

    `buffer_containers` are kept ready beyond what running and waiting invocations need, while there are any.
    `target_tokens` is how many tokens, in running contexts and waiting prompts, there may be to an instance of a
    language model before another is wanted; 0: requests alone count.
    """

    min_containers: int = 0
    max_containers: int = 8
    buffer_containers: int = 0
    scaledown_window: float = 60.0
    target_tokens: int = 0

    def __post_init__(self) -> None:
        _check_range("min_containers", self.min_containers, 0, 10_000)
        _check_range("max_containers", self.max_containers, 1, 10_000)
        _check_range("buffer_containers", self.buffer_containers, 0, 10_000)
        _check_range("scaledown_window (seconds)", self.scaledown_window, 0.0, 7 * 86400.0)
        _check_range("target_tokens", self.target_tokens, 0, 10**9)
        if self.min_containers > self.max_containers:
            raise ValueError(
                f"min_containers is {self.min_containers}; allowed: at most max_containers ({self.max_containers})"
            )


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries of calls that failed before their first output. Delay before attempt k (from 1), in seconds:
    min(max_delay, initial_delay * backoff ** (k - 1))."""

    max_retries: int = 0
    initial_delay: float = 1.0
    backoff: float = 2.0
    max_delay: float = 60.0

    def __post_init__(self) -> None:
        _check_range("max_retries", self.max_retries, 0, 100)
        _check_range("initial_delay (seconds)", self.initial_delay, 0.0, 3600.0)
        _check_range("backoff", self.backoff, 1.0, 100.0)
        _check_range("max_delay (seconds)", self.max_delay, 0.0, 3600.0)

    def delay(self, attempt: int) -> float:
        return min(self.max_delay, self.initial_delay * self.backoff ** (attempt - 1))


@dataclass(frozen=True, slots=True)
class Batching:
    """Calls of one method gathered into one call over lists: at most `max_batch_size`, waiting `wait_ms`."""

    max_batch_size: int
    wait_ms: float = 10.0

    def __post_init__(self) -> None:
        _check_range("max_batch_size", self.max_batch_size, 1, 10_000)
        _check_range("wait_ms", self.wait_ms, 0.0, 60_000.0)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One callable of a function. A plain function has exactly one, whose name is the function's."""

    name: str
    stream: bool = False
    """A generator: outputs are streamed."""
    is_async: bool = False
    batching: Batching | None = None
    resumable: bool = False
    """A generator that can go on elsewhere: there it is handed the last value it yielded."""

    def __post_init__(self) -> None:
        check_function_name(self.name)
        if self.resumable and not self.stream:
            raise ValueError(f"method {self.name!r} is resumable and no generator; allowed: only generators")
        if self.stream and self.batching:
            raise ValueError(f"method {self.name!r} is a generator and batched; allowed: one of the two")


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A constructor parameter of a class; instances with different values never share a container."""

    name: str
    type: Literal["str", "int", "float", "bool"]
    required: bool = True
    default: str | int | float | bool | None = None

    def __post_init__(self) -> None:
        check_function_name(self.name)


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """Where weights come from: a Hugging Face repo id, a folder behind https:// or s3://, or a directory of the
    server's machine. `revision` of a URL is the content's digest, `blake3:` and 64 hex digits, or empty.

    `digest` is filled in by the platform once it is ingested. `tensor_parallel`: the ranks that share its weights out,
    each of which reads only its part of them; functions, which run in one process, take checkpoints of 1.
    """

    source: str
    revision: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    digest: str = ""
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_tensor_parallel(self.tensor_parallel)
        if not self.source or len(self.source) > 4096 or "\0" in self.source:
            raise ValueError(f"checkpoint source is {self.source!r}; allowed: a repo id, a URL or a directory")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter of an llm's checkpoint, served beside it as the model `function:name`. `checkpoint` says where it
    comes from; its digest is filled in by the platform."""

    name: str
    checkpoint: CheckpointSpec

    def __post_init__(self) -> None:
        _check_name(FUNCTION_NAME, "adapter", self.name, "a letter or '_', then letters, digits, '_' or '-'")


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """What a user registers. `module` and `qualname` find the object in the bundle; both are empty for `llm`."""

    name: str
    kind: FunctionKind = "function"
    module: str = ""
    qualname: str = ""
    methods: tuple[MethodSpec, ...] = ()
    parameters: tuple[ParameterSpec, ...] = ()
    concurrency: int = 1
    """Slots of one instance: invocations it runs at once."""
    max_queue: int = 1000
    """Invocations that may wait in one gateway; one more is a 429."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    scaling: Scaling = field(default_factory=Scaling)
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    cancel_grace: float = 5.0
    """Seconds that code which ignores a cancellation is given before its container is killed."""
    memory_mb: int = 256
    """Private memory one instance is expected to need, MiB, for admission. Shared weights are counted apart."""
    gpus: int = 0
    """Accelerators an instance holds for itself, for admission."""
    secrets: tuple[str, ...] = ()
    checkpoint: CheckpointSpec | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    libs: tuple[str, ...] = ()
    """Top-level packages the bundle imports; decides which warmth layer an instance is forked from."""

    def __post_init__(self) -> None:
        check_function_name(self.name)
        _check_range("concurrency", self.concurrency, 1, 10_000)
        _check_range("max_queue", self.max_queue, 0, 1_000_000)
        _check_range("cancel_grace (seconds)", self.cancel_grace, 0.0, 3600.0)
        _check_range("memory_mb", self.memory_mb, 1, 64 * 1024 * 1024)
        _check_range("gpus", self.gpus, 0, 1024)
        for name in self.secrets:
            _check_name(SECRET_NAME, "secret", name, "a letter or '_', then letters, digits, '_' or '-'")
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names):
            raise ValueError(f"function {self.name!r} has two methods of one name: {names}")
        if self.kind == "llm":
            if self.checkpoint is None:
                raise ValueError(f"llm {self.name!r} has no checkpoint; it needs one")
        elif not self.methods or not self.module or not self.qualname:
            raise ValueError(f"function {self.name!r} needs a module, a qualname and at least one method")
        if self.kind == "function" and len(self.methods) != 1:
            raise ValueError(f"function {self.name!r} has {len(self.methods)} methods; allowed: exactly one")
        adapters = [adapter.name for adapter in self.adapters]
        if len(set(adapters)) != len(adapters):
            raise ValueError(f"llm {self.name!r} has two adapters of one name: {adapters}")
        for key, checkpoint in self.checkpoints().items():
            if checkpoint.tensor_parallel != 1:
                raise ValueError(
                    f"checkpoint of {key!r} has tensor_parallel {checkpoint.tensor_parallel}; allowed: 1, because "
                    "functions run in one process"
                )
        if self.adapters and self.kind != "llm":
            raise ValueError(f"function {self.name!r} has adapters; allowed: only llms")
        if self.parameters and self.kind != "class":
            raise ValueError(f"function {self.name!r} has parameters; allowed: only classes")

    def checkpoints(self) -> dict[str, CheckpointSpec]:
        """What it needs of the checkpoint store: its own name for the model, `name:adapter` for an adapter."""
        if self.checkpoint is None:
            return {}
        adapters = {f"{self.name}:{adapter.name}": adapter.checkpoint for adapter in self.adapters}
        return {self.name: self.checkpoint, **adapters}

    def resolved(self, digests: Mapping[str, str]) -> FunctionSpec:
        """The same with the digests of its checkpoints filled in, by the keys of `checkpoints`."""
        if self.checkpoint is None:
            return self
        found = {
            key: replace(checkpoint, digest=digests.get(key, checkpoint.digest))
            for key, checkpoint in self.checkpoints().items()
        }
        adapters = tuple(replace(adapter, checkpoint=found[f"{self.name}:{adapter.name}"]) for adapter in self.adapters)
        return replace(self, checkpoint=found[self.name], adapters=adapters)

    def method(self, name: str) -> MethodSpec | None:
        """The method called `name`; the only one of a plain function when `name` is empty."""
        if not name and self.kind == "function":
            return self.methods[0]
        return next((method for method in self.methods if method.name == name), None)


@dataclass(frozen=True, slots=True)
class AppSpec:
    """One deployment of an app. `bundle` is the blake2b-256 hex digest of its source archive, or empty."""

    name: str
    functions: tuple[FunctionSpec, ...]
    bundle: str = ""
    weight: float = 1.0
    """The app's share when apps compete, relative to the others'."""
    max_concurrency: int = 0
    """Invocations of all its functions that may run at once; 0: no cap."""

    def __post_init__(self) -> None:
        check_app_name(self.name)
        _check_range("max_concurrency", self.max_concurrency, 0, 1_000_000)
        _check_range("weight", self.weight, 0.01, 1000.0)
        if not self.functions:
            raise ValueError(f"app {self.name!r} has no functions; register one with @app.function")
        names = [function.name for function in self.functions]
        if len(set(names)) != len(names):
            raise ValueError(f"app {self.name!r} has two functions of one name: {sorted(names)}")
        if self.bundle and not re.fullmatch(r"[0-9a-f]{64}", self.bundle):
            raise ValueError(f"bundle {self.bundle!r} is not a digest; allowed: 64 hex digits")
        if not self.bundle and any(function.kind != "llm" for function in self.functions):
            raise ValueError(f"app {self.name!r} has functions with code but no bundle")

    def function(self, name: str) -> FunctionSpec | None:
        return next((function for function in self.functions if function.name == name), None)


class _Hashed:
    """Room for a hash that is worked out once: a Target is looked up in a dozen tables for every call."""

    __slots__ = ("_hash",)
    _hash: int


@dataclass(frozen=True, slots=True, order=True)
class Target(_Hashed):
    """What an instance serves: one version of a function, with one set of parameter values.

    Written `app/function@version`, with `#parameters` when there are any. `parameters` is the canonical JSON
    of the values (see `canonical`), so equal values are equal targets.
    """

    app: str
    function: str
    version: int
    parameters: str = ""

    def __post_init__(self) -> None:
        check_app_name(self.app)
        check_function_name(self.function)
        _check_range("version", self.version, 1, 2**31)
        object.__setattr__(self, "_hash", hash((self.app, self.function, self.version, self.parameters)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        suffix = f"#{short_digest(self.parameters.encode())}" if self.parameters else ""
        return f"{self.app}/{self.function}@{self.version}{suffix}"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Empty dict gives ''."""
    return "" if value == {} else json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: bytes) -> str:
    """blake2b-256 as 64 hex digits: names bundles."""
    return _blake2b(data, 32)


def short_digest(data: bytes) -> str:
    return _blake2b(data, 4)


def _blake2b(data: bytes, size: int) -> str:
    from hashlib import blake2b  # milliseconds that `import sllm` need not spend

    return blake2b(data, digest_size=size).hexdigest()


@dataclass(frozen=True, slots=True)
class Span:
    """One timed phase. `start` and `seconds` are relative to the owner timeline's beginning, in seconds."""

    name: str
    start: float
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The timed phases of an invocation or of an instance's start. `began` is Unix time."""

    began: float = 0.0
    spans: tuple[Span, ...] = ()
