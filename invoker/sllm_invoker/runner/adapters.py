"""LoRA adapters over one model, unmerged, several in one step: each row of a batch has its own, or none.

    adapters = load(model, {"french": object, …})    in the template process: hooks in place, matrices mapped
    adapters.use(["french", "", "french"])           the next forward has three rows, the second is the base's

A module's output gets B·(A·x)·scale added by a forward hook; the base's weights stay where they are, mapped and
shared. Own code because PEFT replaces modules, which renames every tensor of the checkpoint, and takes the adapters
of the rows as an argument of the outermost forward, where the base has none. Its arithmetic is kept to the operation,
so that answers are those of PEFT.

Invariant: a forward without a preceding `use` of an adapter is the base's, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sllm_faas.errors import BadSpec, CheckpointCorrupt, PlatformError
from sllm_invoker.checkpoints.adapter import read_config
from sllm_invoker.checkpoints.object import CheckpointObject, Part, TensorEntry, verify_object
from sllm_invoker.checkpoints.source import ADAPTER_CONFIG
from sllm_invoker.runner.weights import from_file

Hook = Callable[[Any, tuple[Any, ...], torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class _Delta:
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(linear(x.to(self.a.dtype), self.a), self.b) * self.scale


class Adapters:
    """`names` are those there are. One thread at a time: the plan is for its next forward."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._count = 0
        self._tables: list[dict[str, _Delta]] = []
        """Of each adapted module: its matrices, by adapter."""
        self._groups: dict[str, torch.Tensor | None] = {}
        """Adapter → its rows, None for all of them."""

    def use(self, rows: Sequence[str]) -> None:
        """The adapter of each row of the next forwards, empty for the base. Rows are the first dimension."""
        self._count = len(rows)
        wanted = set(rows)
        if wanted <= {""}:
            self._groups = {}
        elif len(wanted) == 1:
            self._groups = {rows[0]: None}
        else:
            self._groups = {
                name: torch.tensor([at for at, row in enumerate(rows) if row == name]) for name in sorted(wanted - {""})
            }

    def move(self, device: torch.device) -> None:
        """Compute there from now on."""
        for deltas in self._tables:
            for name, delta in deltas.items():
                deltas[name] = _Delta(delta.a.to(device), delta.b.to(device), delta.scale)

    def hook(self, deltas: dict[str, _Delta]) -> Hook:
        """For a module that the adapters in `deltas` adapt."""
        self._tables.append(deltas)

        def add(_module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._groups:
                return None
            x, result = inputs[0], output
            for name, rows in self._groups.items():
                delta = deltas.get(name)
                if delta is None:
                    continue
                if rows is None:
                    result = result + delta.of(x)
                    continue
                if len(x) != self._count:
                    raise PlatformError(f"an adapted module got {len(x)} rows, {self._count} are planned.")
                if result is output:
                    result = output.clone()
                result[rows] += delta.of(x[rows])
            return result.to(output.dtype)

        return add


def load(model: Any, objects: Mapping[str, CheckpointObject], base: str) -> Adapters:
    """Put the hooks of all adapters in place; `base` is the digest of the model's checkpoint. Every byte is checked.

    Raises BadSpec for an adapter of another base, CheckpointCorrupt for one that does not fit the model."""
    adapters = Adapters(tuple(objects))
    modules = dict(model.named_modules())
    table: dict[str, dict[str, _Delta]] = {}
    for name, checkpoint in objects.items():
        if checkpoint.manifest.base != base:
            raise BadSpec(f"adapter {name} is of checkpoint {checkpoint.manifest.base[:12]}, the model is {base[:12]}.")
        verify_object(checkpoint)
        config, part = read_config(checkpoint.directory / ADAPTER_CONFIG), checkpoint.manifest.parts[0]
        buffer = from_file(checkpoint.part_path(), part).buffer
        tensors = {entry.name: _view(buffer, part, entry) for entry in part.tensors}
        for key, a in tensors.items():
            module, _, side = key.rpartition(".")
            if side != "lora_A":
                continue
            b = tensors.get(f"{module}.lora_B")
            if b is None or module not in modules:
                raise CheckpointCorrupt(f"adapter {name} does not fit the model at {module}.")
            table.setdefault(module, {})[name] = _Delta(a, b, config.scale(module, a.shape[0]))
    for module, deltas in table.items():
        modules[module].register_forward_hook(adapters.hook(deltas))
    return adapters


def _view(buffer: Any, part: Part, entry: TensorEntry) -> torch.Tensor:
    count = entry.shape[0] * entry.shape[1]
    return torch.frombuffer(buffer, dtype=torch.float32, count=count, offset=part.data_start + entry.start).view(
        entry.shape
    )
