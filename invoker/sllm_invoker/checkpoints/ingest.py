"""From a model somewhere to a checkpoint object in the store.

    python -m sllm_invoker.checkpoints.ingest --root R --source S --name N [--revision V] [--dtype D]
                                            [--tensor-parallel RANKS] [--forward FD] [--limit BYTES]
                                            [--ahead]

prints one JSON line per step of progress, `{"stage", "done", "total"}`, one per object that made room for this one,
`{"evicted": {"digest", "bytes", "why"}}`, and a last one: `{"result": {"digest", "name", "known"}}`, or
`{"error": ErrorInfo}` with exit status 1. The last one is not its end: what was fetched is removed after it. It is a
process of its own because it needs torch and the agent must not; `run` is the same in a fork that may have that.

Stages: resolve (where is it), hash (is it known), load (transformers converts to the runtime layout), write
(one pass: bytes, xxh3, blake3 and, with a channel to the store process, slabs together), sync and rename.
safetensors only: pickled weights and models that need code of their own are refused. A source is never served
in place: a truncated map is SIGBUS and a rewritten file is silently another model.

Invariant: an object appears in the store complete or not at all, once, however many processes ingest it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, SllmError, to_info
from sllm_faas.spec import check_tensor_parallel
from sllm_invoker.checkpoints import tensor_parallel as parallel
from sllm_invoker.checkpoints import usage
from sllm_invoker.checkpoints.adapter import write_adapter
from sllm_invoker.checkpoints.forward import Forward
from sllm_invoker.checkpoints.object import (
    FORMAT_VERSION,
    LAYOUT_VERSION,
    FileEntry,
    Layout,
    Manifest,
    Progress,
    Source,
    file_digest,
    first_line,
    identity,
)
from sllm_invoker.checkpoints.part import collect, nowhere, write_parts
from sllm_invoker.checkpoints.room import Evicted, Room
from sllm_invoker.checkpoints.source import (
    Origin,
    content_digest,
    content_key,
    download_bytes,
    layout_key,
    object_bytes,
    resolve,
    stat_key,
)
from sllm_invoker.checkpoints.store import CheckpointStore, check_name, is_full, storage_errors

PROCESS = "sllm-ingest"
"""As `ps` shows one that was forked."""
LOWEST = 19
"""Niceness."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Ingested:
    """`known`: nothing had to be written."""

    digest: str
    name: str
    known: bool


def ingest(
    store: CheckpointStore,
    source: str,
    name: str,
    *,
    revision: str = "",
    dtype: str = "auto",
    tensor_parallel: int = 1,
    base: str = "",
    progress: Progress | None = None,
    forward: Forward | None = None,
    limit: int = 0,
    evicted: Callable[[Evicted], None] | None = None,
    ahead: bool = False,
    told: Callable[[Ingested], None] | None = None,
) -> Ingested:
    """Bring `source` (a directory, a URL or a Hugging Face repo id) into the store and point ref `name` at it. A LoRA
    adapter needs its `base`: the name or digest of a checkpoint in the store. `tensor_parallel`: ranks that share
    the weights out, as transformers' plan for the model says; each reads what all have and its own slices. A model that
    had to be written, for one, is in the DRAM tier too where `forward` finds room there. `limit`: bytes that all
    checkpoints may take (0: what the disk has); where there is too little room others leave (`room`), and `evicted` is
    told of each. `ahead`: of need, so none does. `told` is called with the answer
    as soon as there is one: removing a download takes a while.

    Raises BadSpec (not a model, refused, bad name or dtype, no equal shares), CheckpointUnavailable (cannot be
    reached), CheckpointCorrupt, CheckpointIncomplete (a weight is missing), StorageFull.
    """
    if dtype not in DTYPES:
        raise BadSpec(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.", param="dtype")
    check_name(name)
    try:
        check_tensor_parallel(tensor_parallel)
    except ValueError as error:
        raise BadSpec(f"{error}.", param="tensor_parallel") from None
    report = progress or _silent
    began = time.monotonic()
    report(0, 0, "resolve")
    origin = resolve(source, revision, store.root / "downloads")
    if origin.adapter != bool(base):
        what = "is a LoRA adapter and needs its base" if origin.adapter else "is no LoRA adapter and has no base"
        raise BadSpec(f"{source} {what}.", hint="--base names the checkpoint that an adapter adapts.", param="base")
    if base and tensor_parallel != 1:
        raise BadSpec(f"{source} is a LoRA adapter; its tensor_parallel must be 1.", param="tensor_parallel")
    with contextlib.ExitStack() as stack:
        adapted = None
        if base:
            base = store.resolve(base)
            stack.callback(store.use(base).close)
            adapted = store.get(base)
        layout = layout_key(dtype, base, tensor_parallel)
        # Two keys: the cheap one holds while no file was touched, the sure one while content is the same.
        quick = stat_key(origin, layout)
        stack.enter_context(storage_errors(store.root))
        stack.enter_context(store.only_one(quick))
        found = store.known(quick) if origin.settled else None
        digest = found.digest if found is not None else ""
        if not digest:
            room = stack.enter_context(Room(store, name, limit=limit, evicted=evicted, free_only=ahead))
            if origin.remote is not None:
                room.make(download_bytes(origin) + object_bytes(origin, dtype), origin.directory)
            origin = origin.fetched(report)
            content = content_digest(origin.files, report, origin.sums)
            _check_content(origin, content)
            sure = content_key(content, layout)
            stack.enter_context(store.only_one(sure))
            found = store.known(sure)
            if found is None:

                def write(forward: Forward | None) -> str:
                    if adapted is not None:
                        return write_adapter(store, origin, content, adapted, report)
                    return _write(store, origin, content, dtype, tensor_parallel, report, forward, room)

                room.make(download_bytes(origin) + object_bytes(origin, dtype), _download(origin))
                try:
                    digest = write(forward)
                except OSError as error:  # others took what was free
                    if not is_full(error):
                        raise
                    room.make(room.promised, _download(origin))
                    digest = write(None)
                store.remember(sure, digest)
            else:
                digest = found.digest
            store.remember(quick, digest)
        store.set_ref(name, digest)
        took = time.monotonic() - began if found is None else 0.0
        size = (found or store.get(digest)).manifest.total_bytes
        usage.used(store, digest, size, usage.Asked(source, revision, dtype, base, tensor_parallel), took)
        made = Ingested(digest=digest, name=name, known=found is not None)
        if told is not None:
            told(made)
        _forget_download(origin)  # also what one left that was killed just here
        return made


def _download(origin: Origin) -> Path | None:
    return origin.directory if origin.remote is not None else None


def _silent(_done: int, _total: int, _stage: str) -> None:
    pass


def _check_content(origin: Origin, content: str) -> None:
    """That of a URL is what its revision says, if it says so."""
    if origin.remote is not None and origin.revision not in ("", f"blake3:{content}"):
        _forget_download(origin)
        raise CheckpointCorrupt(f"{origin.name} has content blake3:{content}, {origin.revision} was asked for.")


def _forget_download(origin: Origin) -> None:
    if origin.remote is not None:
        shutil.rmtree(origin.directory, ignore_errors=True)


# -- write ---------------------------------------------------------------------------------------------------


def _write(
    store: CheckpointStore,
    origin: Origin,
    content: str,
    dtype: str,
    ranks: int,
    report: Progress,
    forward: Forward | None,
    room: Room,
) -> str:
    if ranks > 1:  # the memory tier holds whole objects
        forward = None
    if forward is not None:  # first: its memory is faulted beside imports and conversion
        forward.expect(sum(path.stat().st_size for path in origin.files if path.suffix == ".safetensors"))
    from sllm_invoker.runner import quantized
    from sllm_invoker.runner.traits import probe

    report(0, 0, "load")
    config, architecture = _described(origin, dtype, ranks)
    splits = parallel.plan(config, architecture, ranks) if ranks > 1 else {}
    model, known_dtype = _load(origin, config, architecture, dtype)
    stored = collect(model)
    parallel.check_ties(stored.ties, splits)
    found = probe(model)
    with store.workspace() as work:
        files = _write_side_files(work, origin, model)
        beside = sum(entry.bytes for entry in files)
        room.make(download_bytes(origin) + stored.bytes + beside, _download(origin))  # what is known by now
        memory = forward.memory if forward else nowhere
        parts = write_parts(work, stored, splits, ranks, found.order, report, memory)
        total = sum(part.bytes for part in parts)
        layout = Layout(LAYOUT_VERSION, version("transformers"), known_dtype, ranks)
        digest = identity(layout, parts, files, "")
        manifest = Manifest(
            format=FORMAT_VERSION,
            digest=digest,
            source=Source(name=origin.name, digest=content, revision=origin.revision),
            layout=layout,
            architecture=architecture,
            parts=parts,
            ties=stored.ties,
            files=files,
            parameters=model.num_parameters(),
            total_bytes=total,
            kv_bytes_per_token=found.kv_bytes_per_token,
            max_context=_max_context(model.config, work),
            vocabulary=found.vocabulary,
            generates=found.generates,
            batched=found.batched,
            chat_template=_has_chat_template(work),
            quantization=quantized.method(model.config),
            splits={name: split for name, split in splits.items() if name in stored.tensors},
        )
        report(total, total, "sync")
        store.finish(work, manifest)
    store.ensure_verified(digest)
    if forward is not None:
        forward.hand_over(digest, store.path(digest), total)
    return digest


def _described(origin: Origin, dtype: str, ranks: int) -> tuple[Any, str]:
    """Its config, and the name of its class. Raises BadSpec when that cannot be had as it was asked for."""
    from sllm_invoker.runner import quantized
    from sllm_invoker.runner.attach import load_config

    config = load_config(origin.directory)
    if quantized.check(config, origin.name):
        if dtype != "auto":
            raise BadSpec(f"{origin.name} is quantised; dtype {dtype!r} cannot be asked of it.", param="dtype")
        if ranks > 1:
            raise BadSpec(f"{origin.name} is quantised; its tensor_parallel must be 1.", param="tensor_parallel")
    names = config.architectures or []
    if len(names) != 1:
        raise BadSpec(f"{origin.name}/config.json must name one architecture; it has {names}.")
    return config, names[0]


def _load(origin: Origin, config: Any, architecture: str, dtype: str) -> tuple[Any, str]:
    """The model as transformers loads it, its dtype's name."""
    from sllm_invoker.runner.attach import model_class

    cls = model_class(architecture)
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
        raise CheckpointCorrupt(
            f"transformers cannot load {origin.name} as {architecture}: {first_line(error)}."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointIncomplete(
            f"{origin.name} lacks {len(missing)} weights that {architecture} needs, the first is {missing[0]}."
        )
    if mismatched := sorted(str(key) for key in info["mismatched_keys"]):
        raise CheckpointCorrupt(f"{origin.name}: {mismatched[0]} has another shape than config.json says.")
    model.eval()
    return model, str(model.dtype).removeprefix("torch.")


def _write_side_files(work: Path, origin: Origin, model: Any) -> tuple[FileEntry, ...]:
    """Config, generation config and tokenizer, as transformers understands them: saved, not copied, so that
    what an old tokenizer_config.json only implies stands in tokenizer.json."""
    model.config.save_pretrained(work)
    if (origin.directory / "generation_config.json").is_file():
        (work / "generation_config.json").write_bytes((origin.directory / "generation_config.json").read_bytes())
    if any((origin.directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(origin.directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # broken JSON, unknown class, missing vocabulary: many types
            raise CheckpointCorrupt(f"the tokenizer of {origin.name} cannot be loaded: {first_line(error)}.") from error
        tokenizer.save_pretrained(work)
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


# -- as a process --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sllm-ingest")
    for name in ("root", "source", "name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--revision", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--base", default="")
    parser.add_argument("--forward", type=int, default=-1)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--ahead", action="store_true")
    options = parser.parse_args(argv)
    if options.ahead:
        os.nice(LOWEST)  # what is needed comes first
    told = ["", 0]

    def progress(done: int, total: int, stage: str) -> None:
        percent = 100 * done // total if total else 0
        if told != [stage, percent]:
            told[:] = [stage, percent]
            _say({"stage": stage, "done": done, "total": total})

    try:
        with contextlib.ExitStack() as stack:
            forward: Forward | None = None
            if options.forward >= 0:
                forward = stack.enter_context(Forward(socket.socket(fileno=options.forward)))
            ingest(
                CheckpointStore(Path(options.root)),
                options.source,
                options.name,
                revision=options.revision,
                dtype=options.dtype,
                tensor_parallel=options.tensor_parallel,
                base=options.base,
                progress=progress,
                forward=forward,
                limit=options.limit,
                evicted=lambda each: _say({"evicted": dataclasses.asdict(each)}),
                ahead=options.ahead,
                told=lambda made: _say({"result": dataclasses.asdict(made)}),
            )
    except SllmError as error:
        info = dataclasses.asdict(to_info(error))
        _say({"error": {key: value for key, value in info.items() if key != "args"}})
        return 1
    return 0


def run(arguments: bytes, descriptors: Mapping[str, int], confined: Callable[[], None]) -> NoReturn:
    """`main` in a fork of a zygote: its arguments as JSON; `weights` is the channel for what it forwards."""
    status = 1
    try:
        confined()
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(PROCESS)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the supervisor's to handle
        forward = ["--forward", str(descriptors["weights"])] if "weights" in descriptors else []
        status = main([*json.loads(arguments), *forward])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
