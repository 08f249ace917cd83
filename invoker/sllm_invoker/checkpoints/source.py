"""Where a model comes from: a local directory or a Hugging Face repo, as a list of files on this machine.

It resolves, downloads, refuses (pickled weights, what is no model) and recognises (has anything changed?). It
loads no model and imports no torch. Every safetensors header is checked before anybody maps the file.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import blake3

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, CheckpointUnavailable
from sllm_invoker.checkpoints.object import Progress, chunks_of, read_header

_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """A source that is on this machine: its files, and how it is called."""

    name: str
    directory: Path
    files: tuple[Path, ...]
    revision: str


def resolve(source: str, revision: str) -> Origin:
    """Find a source and list its files. Raises BadSpec, CheckpointUnavailable, CheckpointCorrupt,
    CheckpointIncomplete."""
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
    return Origin(name=source, directory=directory.resolve(), files=_files(directory.resolve()), revision=found)


def _download(repo: str, revision: str) -> Path:
    import huggingface_hub

    try:
        patterns = [*_SIDE_FILES, "model*.safetensors", "model*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, no such repo: many types, one meaning here
        raise CheckpointUnavailable(
            f"{repo} could not be fetched from Hugging Face: {first_line(error)}.",
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


def stat_lines(files: Iterable[Path]) -> str:
    """What changes when a file is touched."""
    stats = ((path, path.stat()) for path in files)
    return "\n".join(f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for path, s in stats)


def settled(files: Iterable[Path]) -> bool:
    """False while a file is so young that a second write could leave the same stat: then content decides."""
    return all(abs(time.time() - path.stat().st_mtime) > 2.0 for path in files)


def content_digest(files: tuple[Path, ...], report: Progress) -> str:
    """blake3 over names and contents, hex. Reads everything."""
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


def first_line(error: BaseException) -> str:
    """The first line of a foreign error, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
