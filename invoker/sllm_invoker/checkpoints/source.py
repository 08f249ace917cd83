"""Where a model comes from: a local directory, a Hugging Face repo or a URL, as a list of files on this machine.

It resolves, downloads, refuses (pickled weights, what is no model) and recognises (has anything changed?). It
loads no model and imports no torch. Every safetensors header is checked before anybody maps the file.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import blake3

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, CheckpointUnavailable, StorageFull
from sllm_invoker.checkpoints.fetch import fetch
from sllm_invoker.checkpoints.object import (
    DTYPE_BYTES,
    LAYOUT_VERSION,
    Progress,
    chunks_of,
    first_line,
    read_header,
)
from sllm_invoker.checkpoints.remote import Entry, Remote, look, open_remote, read_small
from sllm_invoker.checkpoints.store import is_full

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """A source: how it is called, its files on this machine, and what changes when any of them does. `adapter`: of a
    model, and not one. A remote one has no files until it is fetched; `settled` says whether `state` can be trusted.
    `sums` are blake3 of files that were hashed as they came."""

    name: str
    directory: Path
    files: tuple[Path, ...]
    revision: str
    adapter: bool
    state: str
    settled: bool = True
    remote: Remote | None = None
    listing: tuple[Entry, ...] = ()
    sums: Mapping[str, str] = field(default_factory=dict)

    def fetched(self, report: Progress) -> Origin:
        """The same with its files here. Raises CheckpointUnavailable, CheckpointIncomplete, CheckpointCorrupt,
        StorageFull."""
        if self.remote is None:
            return self
        if not self.settled:
            shutil.rmtree(self.directory, ignore_errors=True)
        sums = fetch(self.remote, self.listing, self.directory, report)
        return replace(self, files=_files(self.directory), sums=sums)


def resolve(source: str, revision: str, downloads: Path) -> Origin:
    """Find a source and list its files; those of a URL are to be fetched, under `downloads`. Raises BadSpec,
    CheckpointUnavailable, CheckpointCorrupt, CheckpointIncomplete, StorageFull."""
    if "://" in source:
        return _resolve_remote(source, revision, downloads)
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
    directory = directory.resolve()
    files = _files(directory)
    adapter = directory / ADAPTER_CONFIG in files
    return Origin(source, directory, files, found, adapter, f"{directory}\n{stat_lines(files)}", settled(files))


def is_fetched(source: str) -> bool:
    """Whether it comes from elsewhere: a URL, or a Hugging Face repo."""
    if "://" in source:
        return True
    return bool(_REPO_ID.fullmatch(source)) and not Path(source).exists()


def layout_key(dtype: str, base: str, tensor_parallel: int) -> str:
    """What makes an object of a source, its content aside. `base`: the digest of what an adapter adapts."""
    key = f"{LAYOUT_VERSION}|{version('transformers')}|{dtype}"  # not imported: a known source is quick
    if tensor_parallel != 1:
        key = f"{key}|for {tensor_parallel} ranks"
    return f"{key}|{base}" if base else key


def stat_key(origin: Origin, layout: str) -> str:
    """Holds while no file of the source was touched."""
    return _key("stat", layout, origin.state)


def content_key(content: str, layout: str) -> str:
    """Holds while the content is the same."""
    return _key("content", layout, content)


def _key(*facts: str) -> str:
    return blake3.blake3("\0".join(facts).encode()).hexdigest()


def download_bytes(origin: Origin) -> int:
    """What has to be fetched, what is here of it included; 0: nothing."""
    return sum(entry.bytes for entry in origin.listing)


def object_bytes(origin: Origin, dtype: str) -> int:
    """About what the object will take. A remote source tells its sizes alone until it is here."""
    if not origin.files:
        return download_bytes(origin)
    size = _DTYPE_BYTES.get("float32" if origin.adapter else dtype, 0)
    total = 0
    for path in origin.files:
        total += path.stat().st_size
        if size and path.suffix == ".safetensors":
            for tensor in read_header(path).tensors:
                if tensor.dtype in ("F64", "F32", "F16", "BF16"):
                    held = tensor.end - tensor.start
                    total += held // DTYPE_BYTES[tensor.dtype] * size - held
    return total


def _resolve_remote(url: str, revision: str, downloads: Path) -> Origin:
    if revision and not _DIGEST.fullmatch(revision):
        raise BadSpec(
            f"revision {revision!r} is none of a URL; allowed: blake3: and 64 hex digits, the content's.",
            param="revision",
        )
    remote = open_remote(url)
    config = look(remote, ["config.json"])
    if config:
        weights = look(remote, ["model.safetensors.index.json"])
        if weights:
            names = sorted({Path(name).name for name in _shards(read_small(remote, weights[0]), url)})
            shards = look(remote, names)
            if missing := set(names) - {entry.name for entry in shards}:
                raise CheckpointIncomplete(f"{url} has an index that names {min(missing)}, which is not there.")
            weights += shards
        else:
            weights = look(remote, ["model.safetensors"])
        listing = config + weights + look(remote, [name for name in _SIDE_FILES if name != "config.json"])
    else:
        listing = weights = look(remote, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        if len(listing) != 2:
            raise BadSpec(f"{url} has no config.json: it is not a model's folder.", param="source")
    if not weights:
        raise BadSpec(f"{url} has no weights as safetensors.", param="source")
    state = "\n".join([url, *(f"{entry.name} {entry.bytes} {entry.tag}" for entry in listing)])
    directory = downloads / blake3.blake3(state.encode()).hexdigest()
    tagged = all(entry.tag for entry in listing)
    return Origin(url, directory, (), revision, not config, state, tagged, remote, listing)


def _shards(index: bytes, where: object) -> list[str]:
    try:
        return sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{where} is not a safetensors index: {error}.") from error


def _download(repo: str, revision: str) -> Path:
    import huggingface_hub

    try:
        patterns = [*_SIDE_FILES, "model*.safetensors", "model*.safetensors.index.json"]
        patterns += [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, no such repo: many types, one meaning here
        if isinstance(error, OSError) and is_full(error):
            raise StorageFull(
                f"no space left for {repo} in the cache of Hugging Face.", hint="Free space there; HF_HOME moves it."
            ) from error
        raise CheckpointUnavailable(
            f"{repo} could not be fetched from Hugging Face: {first_line(error)}.",
            hint="Check the name, the network, and HF_TOKEN for gated models; a local directory works offline.",
        ) from error


def _files(directory: Path) -> tuple[Path, ...]:
    """The files that make the model, or the adapter. Refuses pickles and checks every safetensors header."""
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        if not (directory / ADAPTER_WEIGHTS).is_file():
            raise BadSpec(f"{directory} has no {ADAPTER_WEIGHTS}.", hint="Save it as safetensors.", param="source")
        read_header(directory / ADAPTER_WEIGHTS)
        return (directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG)
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
    paths = [index.parent / Path(name).name for name in _shards(index.read_bytes(), index)]
    for path in paths:
        if not path.is_file():
            raise CheckpointIncomplete(f"{index} names {path.name}, which is not there.")
    return paths


def stat_lines(files: Iterable[Path]) -> str:
    """What changes when a file is touched."""
    stats = ((path, path.stat()) for path in files)
    return "\n".join(f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for path, s in stats)


def settled(files: Iterable[Path]) -> bool:
    """False while a file is so young that a second write could leave the same stat: then content decides."""
    return all(abs(time.time() - path.stat().st_mtime) > 2.0 for path in files)


def content_digest(files: tuple[Path, ...], report: Progress, sums: Mapping[str, str] | None = None) -> str:
    """blake3 over names and contents, hex. Reads every file whose sum is not in `sums`, by name."""
    total, done = sum(path.stat().st_size for path in files), 0
    whole = blake3.blake3()
    for path in files:
        if sums and path.name in sums:
            whole.update(f"{path.name} {sums[path.name]}\n".encode())
            continue
        hasher = blake3.blake3()
        for chunk in chunks_of(path):
            hasher.update(chunk)
            done += len(chunk)
            report(done, total, "hash")
        whole.update(f"{path.name} {hasher.hexdigest()}\n".encode())
    return whole.hexdigest()
