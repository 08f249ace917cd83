"""Writing the weights of a loaded model as a part file, in one pass: bytes, xxh3 and blake3 together, and into memory
where there is some for them.

The file is safetensors with its header padded to a multiple of `DATA_ALIGNMENT`, tensors in execution order,
each aligned by `__pad__` entries. Not here: the manifest around it (`ingest`) and reading it back (`object`).
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
import xxhash

from sllm_faas.errors import CheckpointIncomplete
from sllm_invoker.checkpoints.object import (
    CHUNK_BYTES,
    DATA_ALIGNMENT,
    DTYPE_BYTES,
    PAD_PREFIX,
    TENSOR_ALIGNMENT,
    ByteRange,
    Part,
    Progress,
    Split,
    TensorEntry,
    TensorKind,
    part_names,
)
from sllm_invoker.checkpoints.writer import AT_ONCE, DirectWriter

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a loaded model holds, each tensor once, by name; `ties` maps an alias to the name it is stored under."""

    tensors: dict[str, tuple[TensorKind, torch.Tensor]]
    ties: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of the values; the file takes a header more."""
        return sum(tensor.nbytes for _, tensor in self.tensors.values())


def collect(model: Any) -> Stored:
    """The tensors of a model as it was loaded: call it before its first forward, which repacks quantised weights for
    the instructions of this machine, with loss. Raises CheckpointIncomplete."""
    from sllm_invoker.runner import quantized
    from sllm_invoker.runner.attach import model_tensors

    first: dict[int, str] = {}
    stored = Stored({}, {})
    for name, kind, tensor in model_tensors(model):
        if tensor.is_meta:
            raise CheckpointIncomplete(f"{name} has no value after loading.")
        if id(tensor) in first:
            stored.ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            stored.tensors[name] = (kind, tensor.detach())
    for prefix, module in model.named_modules():
        if quantized.is_quantized(module):
            beside = quantized.companions(module)
            if not beside:
                raise CheckpointIncomplete(f"{prefix} is quantised by its config, and its weight is not.")
            for name, tensor in beside.items():
                stored.tensors[f"{prefix}.{name}"] = ("companion", tensor)
    return stored


def nowhere(_size: int) -> Sequence[memoryview]:
    """The file is all."""
    return ()


def write_parts(
    directory: Path,
    stored: Stored,
    splits: dict[str, Split],
    ranks: int,
    order: dict[str, int],
    report: Progress,
    memory: Callable[[int], Sequence[memoryview]] = nowhere,
) -> tuple[Part, ...]:
    """The weights, for as many ranks: the one part of one, else what they share and what each has. `memory` is for a
    single part."""
    names = part_names(ranks)
    if ranks == 1:
        return (write_part(directory / names[0], stored.tensors, order, report, memory),)
    from sllm_invoker.checkpoints.tensor_parallel import share

    shared = {name: held for name, held in stored.tensors.items() if name not in splits}
    parts: list[Part] = []
    for rank, name in enumerate(names, start=-1):  # the first is nobody's own
        tensors = shared
        if rank >= 0:
            tensors = {
                name: (kind, share(tensor, splits[name], rank, ranks))
                for name, (kind, tensor) in stored.tensors.items()
                if name in splits
            }
        before = sum(part.bytes for part in parts)

        def progress(done: int, total: int, stage: str, before: int = before) -> None:
            report(before + done, max(before + total, stored.bytes), stage)

        parts.append(write_part(directory / name, tensors, order, progress))
    return tuple(parts)


def write_part(
    path: Path,
    tensors: dict[str, tuple[TensorKind, torch.Tensor]],
    order: dict[str, int],
    report: Progress,
    memory: Callable[[int], Sequence[memoryview]] = nowhere,
) -> Part:
    """The weights file. One pass over the bytes. `memory(size)`: where they go too, views of one length, a multiple of
    `CHUNK_BYTES`, that hold `size` bytes together; or none."""
    from sllm_invoker.runner.attach import SAFETENSORS_DTYPES

    names = sorted(tensors, key=lambda name: _position(name, order))  # stable: registration order within a module

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    entries, at = [], 0
    pads: dict[str, int] = {}  # tensor name -> padding bytes before it
    for name in names:
        kind, tensor = tensors[name]
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        if gap := -at % TENSOR_ALIGNMENT:
            header[f"{PAD_PREFIX}.{len(pads)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            pads[name], at = gap, at + gap
        end = at + tensor.numel() * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), at, end, kind))
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)

    total = 8 + len(raw) + at
    with DirectWriter(path) as file:
        writer = _HashingWriter(file, total, report, memory(total))
        writer.write(memoryview(len(raw).to_bytes(8, "little") + raw))
        for name in names:
            if name in pads:
                writer.write(memoryview(bytes(pads[name])))
            writer.write(_raw_bytes(tensors[name][1]))
        writer.end()
    return Part(
        name=path.name,
        bytes=writer.done,
        data_start=8 + len(raw),
        digest=writer.whole.hexdigest(),
        chunks=tuple(writer.chunks),
        tensors=tuple(entries),
        layers=_layers(entries),
    )


def _position(name: str, order: dict[str, int]) -> int:
    """When the module that holds `name` first ran; one that did not run (an idle expert) counts with the
    nearest module around it that did."""
    owner = name.rpartition(".")[0]
    while owner not in order and owner:
        owner = owner.rpartition(".")[0]
    return order.get(owner, 0)


def _layers(tensors: list[TensorEntry]) -> tuple[ByteRange, ...]:
    """Consecutive tensors of one layer (`model.layers.3`) or one module outside the layers."""
    ranges: list[ByteRange] = []
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        name = match[1] if match else tensor.name.rpartition(".")[0]
        if ranges and ranges[-1].name == name:
            ranges[-1] = ByteRange(name, ranges[-1].start, tensor.end)
        else:
            ranges.append(ByteRange(name, tensor.start, tensor.end))
    return tuple(ranges)


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return raw


class _HashingWriter:
    """Gathers chunks, sums them and has them written: blake3 of the whole, xxh3-64 of each. A chunk is gathered where
    it stays, if there is memory for all, and summed and written from there; else in one of a few buffers."""

    def __init__(self, file: DirectWriter, total: int, report: Progress, memory: Sequence[memoryview]) -> None:
        self._file, self._total, self._report, self._memory = file, total, report, memory
        self._buffers = [] if memory else [memoryview(mmap.mmap(-1, CHUNK_BYTES)) for _ in range(1 + AT_ONCE)]
        self.whole = blake3.blake3()
        self.chunks: list[str] = []
        self.done = 0

    def write(self, data: memoryview) -> None:
        while data.nbytes:
            chunk, at = self._chunk(), self.done % CHUNK_BYTES
            piece, data = data[: CHUNK_BYTES - at], data[CHUNK_BYTES - at :]
            chunk[at : at + piece.nbytes] = piece
            self.done += piece.nbytes
            if self.done % CHUNK_BYTES == 0:
                self._end_chunk(chunk)
            self._report(self.done, self._total, "write")

    def end(self) -> None:
        """No more comes."""
        if gathered := self.done % CHUNK_BYTES:
            self._end_chunk(self._chunk()[:gathered])

    def _chunk(self) -> memoryview:
        """Where the one lies that is gathered now."""
        number = len(self.chunks)
        if self._buffers:
            return self._buffers[number % len(self._buffers)]
        index, at = divmod(number * CHUNK_BYTES, len(self._memory[0]))
        return self._memory[index][at : at + CHUNK_BYTES]

    def _end_chunk(self, chunk: memoryview) -> None:
        self._file.write(chunk)  # first: the disk is busy while it is summed
        self.chunks.append(xxhash.xxh3_64_hexdigest(chunk))
        self.whole.update(chunk)
