"""The checkpoint object: one immutable directory that holds everything a model needs to run.

    objects/<digest>/
        manifest.json               what is below, and how to check it
        part-0-of-1.safetensors     weights in runtime layout, tensors in execution order
        config.json, tokenizer.json, generation_config.json, ...

For N ranks of a tensor-parallel model there are N + 1 parts: `shared-of-N.safetensors` has what every rank holds whole,
`part-R-of-N.safetensors` has rank R's slices of the rest. A rank reads the first and its own.

The part file is plain safetensors that any tool opens; its header is space-padded so that data starts at a
multiple of 4096 (direct reads), and tensors are 64-byte aligned by `__pad__.N` entries. *Runtime layout* means
what the module holds after transformers' own conversion, so that attaching is assigning; tensors that no
source file has (non-persistent buffers) are in it too, and ties are recorded as names.

Not here: where objects come from (`ingest`), how a directory of them is kept (`store`), how a process binds
one (`runner.attach`). This module imports no torch: the agent opens objects too.

Invariant: what `open_object` returns is structurally sound — every byte of the manifest is as it was written, every
byte range lies in a file of the recorded size, tensors neither overlap nor leave holes, header and manifest agree.
Content is `verify_object`'s business, that of the small files `verify_files`'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import blake3
import msgspec
import xxhash

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointUnavailable

FORMAT_VERSION = 2
LAYOUT_VERSION = 2
CHUNK_BYTES = 16 * 1024 * 1024
DATA_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64
MANIFEST = "manifest.json"
PAD_PREFIX = "__pad__"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

TensorKind = Literal["parameter", "buffer", "attribute", "companion"]
"""How the module holds a tensor: a parameter, a registered buffer (persistent or not), a plain attribute; or inside
another: a quantised parameter `w` keeps its scales as `w.<name>`."""

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, stage)."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor. `start` and `end` are byte offsets from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    kind: TensorKind = "parameter"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """What one layer (or what lies between layers) occupies; offsets from the start of the data section."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Split:
    """How the ranks share a tensor out: what lies along dimension `dim` is `groups` equal blocks one after the other
    (2: gate and up in one matrix), and of each of them rank R of N has the R-th N-th."""

    dim: int
    groups: int = 1

    def whole(self, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """The shape of the tensor of which each rank has a share of `shape`."""
        return (*shape[: self.dim], shape[self.dim] * ranks, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file beside the weights. `digest` is blake3, hex."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Part:
    """One weights file. `chunks` are xxh3-64 of consecutive `CHUNK_BYTES` pieces of the whole file, hex;
    `digest` is its blake3, hex; tensors are in execution order."""

    name: str
    bytes: int
    data_start: int
    digest: str
    chunks: tuple[str, ...]
    tensors: tuple[TensorEntry, ...]
    layers: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where it came from. Not part of the object's identity."""

    name: str
    digest: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """What turned the source into these bytes: another value of any field may give other bytes."""

    version: int
    transformers: str
    dtype: str
    tensor_parallel: int = 1
    """Ranks that the weights are split for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`ties` maps an alias to the tensor it shares. `kv_bytes_per_token` is 0 for models without a growing
    cache. `batched` says that the row cache was proved against the model's own cache at ingest. `quantization` is the
    method that transformers calls it by, empty for plain weights. `base` is the digest of the model that an adapter
    adapts, empty for a model; an adapter's model facts are its base's. `splits` says how the ranks share out what each
    has a slice of; the tensors of their parts are slices, and every other number here is of the whole model."""

    format: int
    digest: str
    source: Source
    layout: Layout
    architecture: str
    parts: tuple[Part, ...]
    ties: dict[str, str]
    files: tuple[FileEntry, ...]
    parameters: int
    total_bytes: int
    kv_bytes_per_token: int
    max_context: int
    vocabulary: int
    generates: bool
    batched: bool
    chat_template: bool
    quantization: str = ""
    base: str = ""
    splits: dict[str, Split] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointObject:
    """An opened object: its directory and its manifest, structurally checked against each other."""

    directory: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def part_path(self, index: int = 0) -> Path:
        return self.directory / self.manifest.parts[index].name

    def parts_of(self, rank: int | None) -> tuple[Part, ...]:
        """What a process reads: what all ranks share and then the rank's own; the only part where there are no ranks
        (None). Raises BadSpec for a rank that the object has not got."""
        parts, ranks = self.manifest.parts, self.manifest.layout.tensor_parallel
        if rank is None and ranks == 1:
            return parts
        if rank is None or not 0 <= rank < ranks or ranks == 1:
            has = f"is in parts for {ranks} ranks, 0 to {ranks - 1}" if ranks > 1 else "is not split for ranks"
            asked = "a process that is no rank" if rank is None else f"rank {rank}"
            raise BadSpec(
                f"checkpoint {self.digest[:12]} {has}; {asked} cannot use it.",
                hint="`tensor_parallel` of the checkpoint says for how many ranks it is made; 1: for one process.",
                param="tensor_parallel",
            )
        return parts[0], parts[1 + rank]

    def __repr__(self) -> str:
        m = self.manifest
        return f"<checkpoint {m.source.name} {m.architecture} {m.digest[:12]} {m.total_bytes} bytes>"


Size = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class _HeaderEntry:
    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class _Versioned:
    format: int


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors header: its tensors in file order, and where the data section starts and ends."""

    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_bytes: int


def part_names(ranks: int) -> tuple[str, ...]:
    """The names of an object's parts: what is shared, then each rank's."""
    if ranks == 1:
        return ("part-0-of-1.safetensors",)
    return (f"shared-of-{ranks}.safetensors", *(f"part-{rank}-of-{ranks}.safetensors" for rank in range(ranks)))


def identity(layout: Layout, parts: tuple[Part, ...], files: tuple[FileEntry, ...], base: str) -> str:
    """The digest that names an object: blake3 over layout, weight digests, file digests, and an adapter's base."""
    ranks = [layout.tensor_parallel] if layout.tensor_parallel != 1 else []
    facts = [
        [layout.version, layout.transformers, layout.dtype, *ranks],
        [[part.name, part.digest] for part in parts],
        [[file.name, file.digest] for file in sorted(files, key=lambda f: f.name)],
        base,
    ]
    return blake3.blake3(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


# -- open ----------------------------------------------------------------------------------------------------


def open_object(directory: Path) -> CheckpointObject:
    """Read the manifest and check the directory's structure against it; reads no weights.

    Raises CheckpointUnavailable when there is no such directory and CheckpointCorrupt for everything that is
    not as the manifest says, naming the file.
    """
    manifest = read_manifest(directory)
    for file in manifest.files:
        _check_size(directory / file.name, file.bytes)
    for part in manifest.parts:
        _check_part(directory / part.name, part)
    if manifest.layout.tensor_parallel > 1:
        _check_ranks(directory / MANIFEST, manifest)
    aliased = set(manifest.ties.values())
    stored = {tensor.name for part in manifest.parts for tensor in part.tensors}
    if missing := aliased - stored:
        raise _corrupt(directory / MANIFEST, f"a tie points to a tensor that is not stored: {min(missing)}")
    return CheckpointObject(directory=directory, manifest=manifest)


def read_manifest(directory: Path) -> Manifest:
    """The manifest alone. Raises CheckpointUnavailable, CheckpointCorrupt, or BadSpec for a newer format."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not directory.is_dir():
            raise CheckpointUnavailable(
                f"there is no checkpoint at {directory}.", hint="`sllm checkpoint list` shows what there is."
            ) from None
        raise _corrupt(path, "the file is missing") from None
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}.") from error
    manifest = _decode_manifest(path, raw)
    if not manifest.parts or not is_digest(manifest.digest):
        raise _corrupt(path, "no parts, or no digest")
    ranks = manifest.layout.tensor_parallel
    if ranks < 1 or len(manifest.parts) != (ranks + 1 if ranks > 1 else 1):
        raise _corrupt(path, f"it has {len(manifest.parts)} parts for {ranks} ranks")
    names = [entry.name for entry in manifest.files] + [part.name for part in manifest.parts]
    for name in names:
        if not name or name != Path(name).name or name in (".", ".."):
            raise _corrupt(path, f"{name!r} is not a plain file name")
    if identity(manifest.layout, manifest.parts, manifest.files, manifest.base) != manifest.digest:
        raise _corrupt(path, "its digest is not that of its contents")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The manifest as JSON whose first line is a checksum of all that follows."""
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1).removeprefix(b"{")
    (directory / MANIFEST).write_bytes(_checksum_line(body) + body)


def _checksum_line(body: bytes) -> bytes:
    return b'{"checksum": "%s",' % blake3.blake3(body).hexdigest().encode()


def _decode_manifest(path: Path, raw: bytes) -> Manifest:
    """Raises BadSpec for another format, CheckpointCorrupt when any byte is not as it was written."""
    try:
        version = msgspec.json.decode(raw, type=_Versioned).format
        if version != FORMAT_VERSION:
            raise BadSpec(
                f"{path} has format {version}; this version reads format {FORMAT_VERSION}.",
                hint="Ingest the model again with this version.",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"not a manifest: {error}") from error
    first, newline, rest = raw.partition(b"\n")
    if first != _checksum_line(newline + rest):
        raise _corrupt(path, "it has changed: its checksum is not that of its contents")
    return manifest


def read_header(path: Path) -> Header:
    """A safetensors file's header, checked: no holes, no overlaps, nothing out of range.

    Raises CheckpointCorrupt. Used for sources and for our own part files alike.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _corrupt(path, f"its header claims {length} bytes and the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise _corrupt(path, f"it cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not an object")
    tensors = [_tensor(path, name, value) for name, value in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    data_start, at = 8 + length, 0
    for tensor in tensors:
        if tensor.start != at:
            what = "overlaps the one before it" if tensor.start < at else "leaves a hole before it"
            raise _corrupt(path, f"tensor {tensor.name} {what}")
        at = tensor.end
    if data_start + at != size:
        raise _corrupt(path, f"tensors end at byte {data_start + at} and the file at {size}")
    return Header(tensors=tuple(tensors), data_start=data_start, file_bytes=size)


def _tensor(path: Path, name: str, value: object) -> TensorEntry:
    try:
        entry = msgspec.convert(value, _HeaderEntry)
    except msgspec.ValidationError as error:
        raise _corrupt(path, f"the header entry of tensor {name} is malformed: {error}") from None
    dtype, shape, (start, end) = entry.dtype, entry.shape, entry.data_offsets
    if dtype not in DTYPE_BYTES:
        raise _corrupt(path, f"tensor {name} has unknown dtype {dtype!r}")
    if end - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise _corrupt(path, f"tensor {name} of shape {list(shape)} and dtype {dtype} has {end - start} bytes")
    return TensorEntry(name=name, dtype=dtype, shape=shape, start=start, end=end)


def _check_part(path: Path, part: Part) -> None:
    _check_size(path, part.bytes)
    header = read_header(path)
    if header.data_start != part.data_start or part.data_start % DATA_ALIGNMENT:
        raise _corrupt(path, f"data starts at {header.data_start}, the manifest says {part.data_start}")
    actual = {tensor.name: tensor for tensor in header.tensors if not tensor.name.startswith(PAD_PREFIX)}
    for tensor in part.tensors:
        found = actual.pop(tensor.name, None)
        if found is None:
            raise _corrupt(path, f"tensor {tensor.name} of the manifest is not in the file")
        if (found.dtype, found.shape, found.start) != (tensor.dtype, tensor.shape, tensor.start):
            raise _corrupt(
                path,
                f"tensor {tensor.name} is {found.dtype}{list(found.shape)} at {found.start}, the manifest says "
                f"{tensor.dtype}{list(tensor.shape)} at {tensor.start}",
            )
    if actual:
        raise _corrupt(path, f"tensor {min(actual)} is not in the manifest")
    if len(part.chunks) != -(-part.bytes // CHUNK_BYTES):
        raise _corrupt(path, f"the manifest has {len(part.chunks)} chunk sums for {part.bytes} bytes")


def _check_ranks(path: Path, manifest: Manifest) -> None:
    """Every rank has a share of the same tensors, and they are those that are split."""
    shared, first, *others = manifest.parts
    for part in others:
        if part.tensors != first.tensors:
            raise _corrupt(path, f"{part.name} has other tensors than {first.name}")
    if {tensor.name for tensor in first.tensors} != manifest.splits.keys():
        raise _corrupt(path, f"the tensors of {first.name} are not those that are split")
    for tensor in first.tensors:
        dim, groups = manifest.splits[tensor.name].dim, manifest.splits[tensor.name].groups
        if not (0 <= dim < len(tensor.shape) and groups >= 1 and tensor.shape[dim] % groups == 0):
            what = f"along dimension {dim} in {groups} groups"
            raise _corrupt(path, f"{tensor.name} with shares of shape {list(tensor.shape)} cannot be split {what}")
    if twice := manifest.splits.keys() & {tensor.name for tensor in shared.tensors}:
        raise _corrupt(path, f"{min(twice)} is split and shared")


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise _corrupt(path, "the file is missing") from None
    if size != expected:
        raise _corrupt(path, f"it has {size} bytes, the manifest says {expected}")


# -- verify --------------------------------------------------------------------------------------------------


def chunks_of(path: Path, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(size):
            yield chunk


def hashed(path: Path) -> blake3.blake3:
    """A file's bytes in a hasher that more can be given to."""
    hasher = blake3.blake3()
    for chunk in chunks_of(path):
        hasher.update(chunk)
    return hasher


def file_digest(path: Path) -> str:
    """blake3 of a file, hex."""
    return hashed(path).hexdigest()


def verify_object(checkpoint: CheckpointObject, progress: Progress | None = None) -> None:
    """Check every byte: xxh3 per chunk of the weights, blake3 of the files beside them.

    Raises CheckpointCorrupt naming the file and the first bad chunk.
    """
    verify_files(checkpoint)
    manifest, done = checkpoint.manifest, 0
    for part in manifest.parts:
        path = checkpoint.directory / part.name
        for index, chunk in enumerate(chunks_of(path)):
            if index >= len(part.chunks) or xxhash.xxh3_64_hexdigest(chunk) != part.chunks[index]:
                raise _corrupt(path, f"chunk {index} (bytes from {index * CHUNK_BYTES}) has changed")
            done += len(chunk)
            if progress is not None:
                progress(done, manifest.total_bytes, "verify")


def verify_files(checkpoint: CheckpointObject) -> None:
    """Check every byte of the files beside the weights. Raises CheckpointCorrupt naming the file."""
    for file in checkpoint.manifest.files:
        path = checkpoint.directory / file.name
        if file_digest(path) != file.digest:
            raise _corrupt(path, "its content has changed")


def _corrupt(path: Path, what: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(f"{path}: {what}.", hint="Remove this checkpoint and ingest it again.")


def first_line(error: BaseException) -> str:
    """The first line of a foreign error, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
