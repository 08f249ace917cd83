"""From a model somewhere to a checkpoint object in the store.

    python -m sllm_invoker.checkpoints.ingest --root R --source S --name N [--revision V] [--dtype D]

prints one JSON line per step of progress, `{"stage", "done", "total"}`, and a last one: `{"result": {"digest",
"name", "known"}}`, or `{"error": ErrorInfo}` with exit status 1. It runs as a process of its own because it
needs torch and the agent must not.

Stages: resolve (where is it), hash (is it known), load (transformers converts to the runtime layout), write
(one pass: bytes, xxh3 and blake3 together), sync and rename. safetensors only: pickled weights and models that
need code of their own are refused. A source is never served in place: a truncated map is SIGBUS and a
rewritten file is silently another model.

Invariant: an object appears in the store complete or not at all, once, however many processes ingest it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
import xxhash

from sllm_faas.errors import (
    BadSpec,
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointUnavailable,
    SllmError,
    to_info,
)
from sllm_invoker.checkpoints.object import (
    CHUNK_BYTES,
    DATA_ALIGNMENT,
    DTYPE_BYTES,
    FORMAT_VERSION,
    LAYOUT_VERSION,
    PAD_PREFIX,
    TENSOR_ALIGNMENT,
    ByteRange,
    FileEntry,
    Layout,
    Manifest,
    Part,
    Progress,
    Source,
    TensorEntry,
    TensorKind,
    chunks_of,
    file_digest,
    identity,
    read_header,
    write_manifest,
)
from sllm_invoker.checkpoints.store import CheckpointStore, check_name, storage_errors, sync_directory

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
PART_NAME = "part-0-of-1.safetensors"

_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Ingested:
    """`known`: nothing had to be written."""

    digest: str
    name: str
    known: bool


@dataclass(frozen=True, slots=True)
class _Origin:
    """A source that is on this machine: its files, and how it is called."""

    name: str
    directory: Path
    files: tuple[Path, ...]
    revision: str


def ingest(
    store: CheckpointStore,
    source: str,
    name: str,
    *,
    revision: str = "",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Ingested:
    """Bring `source` (a directory or a Hugging Face repo id) into the store and point ref `name` at it.

    Raises BadSpec (not a model, refused, bad name or dtype), CheckpointUnavailable (cannot be reached),
    CheckpointCorrupt, CheckpointIncomplete (a weight is missing), StorageFull.
    """
    if dtype not in DTYPES:
        raise BadSpec(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.", param="dtype")
    check_name(name)
    report = progress or _silent
    report(0, 0, "resolve")
    origin = _resolve(source, revision)
    import transformers

    layout_key = f"{LAYOUT_VERSION}|{transformers.__version__}|{dtype}"
    with storage_errors(store.root):
        # Two keys: the cheap one holds while no file was touched, the sure one while content is the same.
        quick = _key("stat", layout_key, str(origin.directory), _stat_lines(origin.files))
        found = store.known(quick) if _settled(origin.files) else None
        if found is None:
            content = _content_digest(origin.files, report)
            sure = _key("content", layout_key, content)
            with store.only_one(sure):
                found = store.known(sure)
                if found is None:
                    digest = _write(store, origin, content, dtype, report)
                    store.remember(sure, digest)
                    store.remember(quick, digest)
                    store.set_ref(name, digest)
                    return Ingested(digest=digest, name=name, known=False)
            store.remember(quick, found.digest)
        store.set_ref(name, found.digest)
        return Ingested(digest=found.digest, name=name, known=True)


def _silent(_done: int, _total: int, _stage: str) -> None:
    pass


# -- resolve -------------------------------------------------------------------------------------------------


def _resolve(source: str, revision: str) -> _Origin:
    if "://" in source:
        raise BadSpec(
            f"{source.split('://')[0]}:// sources are not supported.",
            hint="Give a local directory or a Hugging Face repo id (owner/name).",
            param="source",
        )
    directory = Path(source).expanduser()
    if directory.is_dir():
        found = revision
    elif directory.exists():
        raise BadSpec(f"{source} is a file.", hint="Give the directory that holds config.json.", param="source")
    elif _REPO_ID.fullmatch(source) and not source.startswith((".", "/", "~")):
        directory = _download(source, revision)
        found = directory.name
    else:
        raise CheckpointUnavailable(
            f"there is no directory {source}, and it is not a Hugging Face repo id (owner/name)."
        )
    return _Origin(name=source, directory=directory.resolve(), files=_files(directory.resolve()), revision=found)


def _download(repo: str, revision: str) -> Path:
    import huggingface_hub

    try:
        patterns = [*_SIDE_FILES, "model*.safetensors", "model*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, no such repo: many types, one meaning here
        raise CheckpointUnavailable(
            f"{repo} could not be fetched from Hugging Face: {_line(error)}.",
            hint="Check the name, the network, and HF_TOKEN for gated models; a local directory works offline.",
        ) from error


def _files(directory: Path) -> tuple[Path, ...]:
    """The files that make the model. Refuses pickles and checks every safetensors header."""
    if not (directory / "config.json").is_file():
        raise BadSpec(f"{directory} has no config.json: it is not a model directory.", param="source")
    weights = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    extra = []
    if index.is_file():
        weights, extra = _indexed(index), [index]
    elif (directory / "model.safetensors").is_file():
        weights = [directory / "model.safetensors"]
    if not weights:
        pickles = [path.name for path in directory.iterdir() if path.suffix in _PICKLES]
        what = f"only pickled weights ({min(pickles)}), which are refused" if pickles else "no weights"
        raise BadSpec(f"{directory} has {what}.", hint="Save the model as safetensors.", param="source")
    for path in weights:
        read_header(path)
    return (*weights, *extra, *(directory / n for n in _SIDE_FILES if (directory / n).is_file()))


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{index} is not a safetensors index: {error}.") from error
    for path in paths:
        if not path.is_file():
            raise CheckpointIncomplete(f"{index} names {path.name}, which is not there.")
    return paths


# -- recognise -----------------------------------------------------------------------------------------------


def _stat_lines(files: Iterable[Path]) -> str:
    stats = ((path, path.stat()) for path in files)
    return "\n".join(f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for path, s in stats)


def _settled(files: Iterable[Path]) -> bool:
    """False while a file is so young that a second write could leave the same stat: then content decides."""
    return all(abs(time.time() - path.stat().st_mtime) > 2.0 for path in files)


def _content_digest(files: tuple[Path, ...], report: Progress) -> str:
    total, done = sum(path.stat().st_size for path in files), 0
    whole = blake3.blake3()
    for path in files:
        hasher = blake3.blake3()
        for chunk in chunks_of(path):
            hasher.update(chunk)
            done += len(chunk)
            report(done, total, "hash")
        whole.update(f"{path.name} {hasher.hexdigest()}\n".encode())
    return whole.hexdigest()


def _key(*facts: str) -> str:
    return blake3.blake3("\0".join(facts).encode()).hexdigest()


# -- write ---------------------------------------------------------------------------------------------------


def _write(store: CheckpointStore, origin: _Origin, content: str, dtype: str, report: Progress) -> str:
    import transformers

    from sllm_invoker.runner.attach import probe

    report(0, 0, "load")
    model, architecture, known_dtype = _load(origin, dtype)
    found = probe(model)
    with store.workspace() as work:
        files = _write_side_files(work, origin, model)
        part, ties = _write_part(work / PART_NAME, model, found.order, report)
        layout = Layout(version=LAYOUT_VERSION, transformers=transformers.__version__, dtype=known_dtype)
        digest = identity(layout, (part,), files)
        manifest = Manifest(
            format=FORMAT_VERSION,
            digest=digest,
            source=Source(name=origin.name, digest=content, revision=origin.revision),
            layout=layout,
            architecture=architecture,
            parts=(part,),
            ties=ties,
            files=files,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            total_bytes=part.bytes,
            kv_bytes_per_token=found.kv_bytes_per_token,
            max_context=_max_context(model.config, work),
            vocabulary=found.vocabulary,
            generates=found.generates,
            batched=found.batched,
            chat_template=_has_chat_template(work),
        )
        write_manifest(work, manifest)
        report(part.bytes, part.bytes, "sync")
        for path in work.iterdir():
            _sync_and_seal(path)
        sync_directory(work)
        store.adopt(work, digest)
    store.ensure_verified(digest)
    return digest


def _load(origin: _Origin, dtype: str) -> tuple[Any, str, str]:
    """The model as transformers loads it, its class name, its dtype's name."""
    from sllm_invoker.runner.attach import load_config, model_class

    config = load_config(origin.directory)
    if getattr(config, "quantization_config", None) is not None:
        raise BadSpec(f"{origin.name} is quantised, which is not supported.", hint="Use the unquantised model.")
    names = config.architectures or []
    if len(names) != 1:
        raise BadSpec(f"{origin.name}/config.json must name one architecture; it has {names}.")
    cls = model_class(names[0])
    try:
        model, info = cls.from_pretrained(
            origin.directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever its conversion meets in a broken source
        raise CheckpointCorrupt(f"transformers cannot load {origin.name} as {names[0]}: {_line(error)}.") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointIncomplete(
            f"{origin.name} lacks {len(missing)} weights that {names[0]} needs, the first is {missing[0]}."
        )
    if mismatched := sorted(str(key) for key in info["mismatched_keys"]):
        raise CheckpointCorrupt(f"{origin.name}: {mismatched[0]} has another shape than config.json says.")
    model.eval()
    return model, names[0], str(model.dtype).removeprefix("torch.")


def _write_part(path: Path, model: Any, order: dict[str, int], report: Progress) -> tuple[Part, dict[str, str]]:
    """The weights file and the ties. One pass over the bytes."""
    from sllm_invoker.runner.attach import SAFETENSORS_DTYPES, model_tensors

    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    stored: dict[str, tuple[TensorKind, torch.Tensor]] = {}
    for name, kind, tensor in model_tensors(model):
        if tensor.is_meta:
            raise CheckpointIncomplete(f"{name} has no value after loading.")
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            stored[name] = (kind, tensor.detach())
    names = sorted(stored, key=lambda name: _position(name, order))  # stable: registration order within a module

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors, at = [], 0
    pads: dict[str, int] = {}  # tensor name -> padding bytes before it
    for name in names:
        kind, tensor = stored[name]
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        if gap := -at % TENSOR_ALIGNMENT:
            header[f"{PAD_PREFIX}.{len(pads)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            pads[name], at = gap, at + gap
        end = at + tensor.numel() * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        tensors.append(TensorEntry(name, dtype, tuple(tensor.shape), at, end, kind))
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)

    writer = _HashingWriter(path, 8 + len(raw) + at, report)
    with writer:
        writer.write(memoryview(len(raw).to_bytes(8, "little") + raw))
        for name in names:
            if name in pads:
                writer.write(memoryview(bytes(pads[name])))
            writer.write(_raw_bytes(stored[name][1]))
    part = Part(
        name=path.name,
        bytes=writer.done,
        data_start=8 + len(raw),
        digest=writer.whole.hexdigest(),
        chunks=tuple(writer.chunks),
        tensors=tuple(tensors),
        layers=_layers(tensors),
    )
    return part, ties


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
    """Writes a file and sums it: blake3 of the whole, xxh3-64 of each chunk."""

    def __init__(self, path: Path, total: int, report: Progress) -> None:
        self._file = path.open("wb")
        self._total, self._report = total, report
        self._chunk = xxhash.xxh3_64()
        self.whole = blake3.blake3()
        self.chunks: list[str] = []
        self.done = 0

    def __enter__(self) -> _HashingWriter:
        return self

    def write(self, data: memoryview) -> None:
        while data.nbytes:
            room = CHUNK_BYTES - self.done % CHUNK_BYTES
            piece, data = data[:room], data[room:]
            self._file.write(piece)
            self.whole.update(piece)
            self._chunk.update(piece)
            self.done += piece.nbytes
            if self.done % CHUNK_BYTES == 0:
                self._end_chunk()
            self._report(self.done, self._total, "write")

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self.done % CHUNK_BYTES:
            self._end_chunk()

    def _end_chunk(self) -> None:
        self.chunks.append(self._chunk.hexdigest())
        self._chunk = xxhash.xxh3_64()


def _write_side_files(work: Path, origin: _Origin, model: Any) -> tuple[FileEntry, ...]:
    """Config, generation config and tokenizer, as transformers understands them: saved, not copied, so that
    what an old tokenizer_config.json only implies stands in tokenizer.json."""
    model.config.save_pretrained(work)
    if (origin.directory / "generation_config.json").is_file():
        (work / "generation_config.json").write_bytes((origin.directory / "generation_config.json").read_bytes())
    if any((origin.directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(origin.directory, trust_remote_code=False, local_files_only=True)
            tokenizer.save_pretrained(work)
        except Exception as error:  # broken JSON, unknown class, missing vocabulary: many types
            raise CheckpointCorrupt(f"the tokenizer of {origin.name} cannot be loaded: {_line(error)}.") from error
    paths = sorted(path for path in work.iterdir() if path.is_file())
    return tuple(FileEntry(path.name, path.stat().st_size, file_digest(path)) for path in paths)


def _has_chat_template(work: Path) -> bool:
    if (work / "chat_template.jinja").is_file():
        return True
    path = work / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_bytes()).get("chat_template"))


def _max_context(config: Any, work: Path) -> int:
    """Positions the model was made for. Models without a limit take the tokenizer's, else 32768."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    path = work / "tokenizer_config.json"
    limit = json.loads(path.read_bytes()).get("model_max_length") if path.is_file() else None
    return limit if isinstance(limit, int) and 0 < limit < 10**8 else 32768


def _sync_and_seal(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.fchmod(handle, 0o444)
    finally:
        os.close(handle)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


# -- as a process --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sllm-ingest")
    for name in ("root", "source", "name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--revision", default="")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(argv)
    told = ["", 0]

    def progress(done: int, total: int, stage: str) -> None:
        percent = 100 * done // total if total else 0
        if told != [stage, percent]:
            told[:] = [stage, percent]
            _say({"stage": stage, "done": done, "total": total})

    try:
        store = CheckpointStore(Path(options.root))
        result = ingest(
            store,
            options.source,
            options.name,
            revision=options.revision,
            dtype=options.dtype,
            progress=progress,
        )
    except SllmError as error:
        info = dataclasses.asdict(to_info(error))
        _say({"error": {key: value for key, value in info.items() if key != "args"}})
        return 1
    _say({"result": dataclasses.asdict(result)})
    return 0


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
