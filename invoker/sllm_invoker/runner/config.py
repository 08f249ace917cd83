"""What a runner process is told: one frozen value, written by the invoker, read once.

It travels as JSON (through a zygote's control socket or a file), so it holds only what JSON can say. Secrets
are in `env`, so the text is never logged and its repr leaves them out. Invariant: a value that exists is valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from sllm_faas.errors import BadSpec
from sllm_faas.spec import FunctionSpec, Target


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """One instance to serve, or one version to check.

    `specs` is the one function to serve; for mode "check" all functions of the version. `number` is the
    instance's route on its invoker. `source_dir` is the unpacked bundle, `object_dir` the checkpoint's object
    directory; "" where there is none. Three inherited descriptors, filled in where the process is made, or -1: `link`,
    a socket to the invoker (see `wire.stream`), whose end of file means that the invoker is gone; `weights`, a channel
    to the checkpoint store, without which the file in `object_dir` is mapped; `kept`, a channel to the invoker about
    what instances leave on the GPU (see `kept`).
    """

    instance: str
    target: Target
    specs: tuple[FunctionSpec, ...]
    mode: Literal["serve", "check"] = "serve"
    number: int = 0
    source_dir: str = ""
    object_dir: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    node: str = ""
    scratch: str = ""
    link: int = -1
    weights: int = -1
    kept: int = -1

    def __post_init__(self) -> None:
        if not self.instance:
            raise ValueError("instance is ''; allowed: a name")
        if not self.specs or (self.mode == "serve" and len(self.specs) != 1):
            raise ValueError(f"{len(self.specs)} functions to {self.mode}; allowed: exactly one, or more to check")
        if self.mode == "serve" and self.spec.kind == "llm" and not self.object_dir:
            raise ValueError(f"llm {self.spec.name!r} has no object_dir; it needs its checkpoint's")
        if any(spec.kind != "llm" for spec in self.specs) and not self.source_dir:
            raise ValueError("source_dir is ''; functions with code need their unpacked bundle")

    @property
    def spec(self) -> FunctionSpec:
        """The function to serve."""
        return self.specs[0]


def dumps(config: InstanceConfig) -> bytes:
    """The config as JSON."""
    return msgspec.json.encode(config)


def loads(data: bytes) -> InstanceConfig:
    """The config in `data`. Raises BadSpec, without repeating its text: it may hold secrets."""
    try:
        return msgspec.json.decode(data, type=InstanceConfig)
    except msgspec.ValidationError as error:
        raise BadSpec(f"not an instance config: {error}.") from None
    except (msgspec.MsgspecError, ValueError):
        raise BadSpec("not an instance config: it is not JSON.") from None
